"""However a reply is cut, it says the same; nothing is lost, and calls that are written come out."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.reply.formats import MARKS, CallFormat, ReasoningFormat
from router.text.deltas import CallArguments, CallBegin, ContentText
from tests.support.replies import TOOLS, parser, read

WORDS = [
    *sorted(MARKS), "<parameter=city>", "</parameter>", "</function>", "weather", "add>", "{", "}", "[", "]", '"', "\\",
    ",", ":", ";", " ", "\n", "\n\n", "text", "é😀", "null", "12", '{"name": ', '"weather"',
    ', "arguments": ', ', "parameters": ', '{"city": "Paris"}', "<tool_call>\n<function=weather>\n<parameter=city>\n",
    '<tool_call>{"name": "add", "arguments": {',
    '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}', '{"name": "weather", "parameters": {"city": "',
]  # fmt: skip
REPLIES = st.lists(st.sampled_from(WORDS), max_size=24).map("".join)
CUTS = st.lists(st.integers(1, 9), max_size=60)
FORMATS = st.sampled_from([None, *CallFormat])
REASONING = st.sampled_from([None, *ReasoningFormat])
PROMPT_ENDS = st.sampled_from(["", "<think>\n", "</think>\n\n"])


def pieces(text: str, cuts: list[int]) -> list[str]:
    found, at = [], 0
    for cut in cuts:
        found.append(text[at : at + cut])
        at += cut
    return [*found, text[at:]]


@given(
    text=REPLIES, cuts=CUTS, calls=FORMATS, reasoning=REASONING, prompt_end=PROMPT_ENDS,
    max_calls=st.sampled_from([None, 1]),
)  # fmt: skip
def test_any_pieces_say_the_same(
    text: str,
    cuts: list[int],
    calls: CallFormat | None,
    reasoning: ReasoningFormat | None,
    prompt_end: str,
    max_calls: int | None,
) -> None:
    settings: dict[str, Any] = {"max_calls": max_calls}
    whole = read(parser(calls, reasoning, prompt_end, **settings), [text])
    assert read(parser(calls, reasoning, prompt_end, **settings), pieces(text, cuts)) == whole
    assert read(parser(calls, reasoning, prompt_end, **settings), text) == whole
    if not any(isinstance(delta, CallBegin) for delta in whole) and reasoning is None:
        assert whole == ([ContentText(text)] if text else [])


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<[{"), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=3)
NAMES = st.sampled_from([tool.name for tool in TOOLS])


def written(calls: CallFormat, found: list[tuple[str, Any]]) -> str:
    """The calls as a model of the format writes them."""
    match calls:
        case CallFormat.HERMES:
            each = [{"name": name, "arguments": arguments} for name, arguments in found]
            return "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in each)
        case CallFormat.MISTRAL:
            return "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": arguments} for name, arguments in found])
        case CallFormat.LLAMA3_JSON:
            return "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in found)
        case CallFormat.QWEN3_CODER:
            return "\n".join(
                f"<tool_call>\n<function={name}>\n"
                + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
                + "</function>\n</tool_call>"
                for name, arguments in found
            )


def calls_of(deltas: list[Any]) -> list[tuple[str, Any]]:
    names = [delta.name for delta in deltas if isinstance(delta, CallBegin)]
    texts = [delta.text for delta in deltas if isinstance(delta, CallArguments)]
    return list(zip(names, map(json.loads, texts), strict=True))


@given(
    before=TEXTS,
    found=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3),
    calls=st.sampled_from([CallFormat.HERMES, CallFormat.MISTRAL, CallFormat.LLAMA3_JSON]),
    cuts=CUTS,
)
def test_calls_in_json_come_out_as_they_went_in(
    before: str, found: list[tuple[str, Any]], calls: CallFormat, cuts: list[int]
) -> None:
    if calls is CallFormat.LLAMA3_JSON:
        before = ""
    deltas = read(parser(calls), pieces(before + written(calls, found), cuts))
    assert calls_of(deltas) == found
    assert "".join(d.text for d in deltas if isinstance(d, ContentText)).strip() == before.strip()


@given(
    found=st.lists(
        st.tuples(NAMES, st.dictionaries(st.sampled_from(["city", "note", "more"]), TEXTS, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    cuts=CUTS,
)
def test_texts_as_parameters_come_out_as_they_went_in(found: list[tuple[str, Any]], cuts: list[int]) -> None:
    text = written(CallFormat.QWEN3_CODER, found)
    assert calls_of(read(parser(CallFormat.QWEN3_CODER), pieces(text, cuts))) == found
