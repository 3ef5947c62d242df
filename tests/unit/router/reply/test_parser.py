"""What each format's text says: calls, content around them, reasoning before them, and what only looks like a call."""

from __future__ import annotations

import json

import pytest

from router.reply.arguments import Parameters
from router.reply.feed import MAX_KEPT_CHARS
from router.reply.formats import CallFormat, ReasoningFormat
from router.text.deltas import CallArguments, CallBegin, ContentText, ReasoningText
from tests.support.replies import parser, read, shown

PARIS = '{"city": "Paris"}'
BEGIN, CALL, SEP, END, LAST = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
)  # fmt: skip
FENCED = f"{CALL}function{SEP}weather\n```json\n{PARIS}\n```{END}"
BARE = f"{CALL}weather{SEP}{PARIS}{END}"
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
XML = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"

CASES: list[tuple[CallFormat, str, list[str]]] = [
    (CallFormat.HERMES, "Just text. ", ["Just text. "]),
    (CallFormat.HERMES, HERMES, [f"weather{PARIS}"]),
    (CallFormat.HERMES, f"Let me see.\n\n{HERMES}\n{HERMES}\n", ["Let me see.", f"weather{PARIS}", f"weather{PARIS}"]),
    (CallFormat.HERMES, f"{HERMES}\nDone.", [f"weather{PARIS}", "Done."]),
    (CallFormat.HERMES, '<tool_call>{"name":"a.b-c","arguments":{}}</tool_call>', ["a.b-c{}"]),
    (CallFormat.HERMES, '<tool_call>{"name": "f"}</tool_call>', ["f{}"]),
    (CallFormat.HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', ["f{}"]),
    (CallFormat.HERMES, '<tool_call>{"arguments": {"a": [1]}, "name": "f"}</tool_call>', ['f{"a": [1]}']),
    (CallFormat.HERMES, '<tool_call>{"id": 7, "name": "f", "parameters": {"a": 1}}</tool_call>', ['f{"a": 1}']),
    (CallFormat.HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\\\n\\"}"}', ['f{"a": "\\n"}']),
    # The mark, brackets and quotes inside of a text.
    (
        CallFormat.HERMES,
        '<tool_call>{"name": "f", "arguments": {"x": "a}\\"]</tool_call><tool_call>{"}}</tool_call>!',
        ['f{"x": "a}\\"]</tool_call><tool_call>{"}', "!"],
    ),
    # A brace too few, a brace too many, no end.
    (CallFormat.HERMES, f'<tool_call>{{"name": "f", "arguments": {PARIS}\n</tool_call>.', [f"f{PARIS}", "."]),
    (CallFormat.HERMES, f'<tool_call>{{"name": "f", "arguments": {PARIS}}}}}\n</tool_call>.', [f"f{PARIS}", "."]),
    (CallFormat.HERMES, f'<tool_call>{{"name": "f", "arguments": {PARIS}}}', [f"f{PARIS}"]),
    # Cut inside of the arguments.
    (CallFormat.HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b', ['f{"a": "b']),
    # No calls.
    (CallFormat.HERMES, "I use <tool_call> tags.", ["I use <tool_call> tags."]),
    (CallFormat.HERMES, "a \n<tool_call>\n[1]</tool_call>", ["a \n<tool_call>\n[1]</tool_call>"]),
    (CallFormat.HERMES, '<tool_call>{"name": 7, "arguments": {}}', ['<tool_call>{"name": 7, "arguments": {}}']),
    (CallFormat.HERMES, '<tool_call>{"name": "f", "arguments": 7}', ['<tool_call>{"name": "f", "arguments": 7}']),
    # Half of a surrogate pair in a name, or in arguments as text.
    (CallFormat.HERMES, '<tool_call>{"name": "\\ud83d", "arg', ['<tool_call>{"name": "\\ud83d", "arg']),
    (
        CallFormat.HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\udc00\\"}"}',
        ['<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\udc00\\"}"}'],
    ),
    (CallFormat.HERMES, '<tool_call>{"arguments": {}}', ['<tool_call>{"arguments": {}}']),
    (CallFormat.HERMES, '<tool_call>{"name": "f", "argum', ['<tool_call>{"name": "f", "argum']),
    (CallFormat.HERMES, "<tool_call>", ["<tool_call>"]),
    (CallFormat.HERMES, "half a mark <tool_", ["half a mark <tool_"]),
    (CallFormat.HERMES, f"<tool_call>{HERMES}", ["<tool_call>", f"weather{PARIS}"]),
    (CallFormat.LLAMA3_JSON, f'{{"name": "weather", "parameters": {PARIS}}}', [f"weather{PARIS}"]),
    (
        CallFormat.LLAMA3_JSON,
        f'\n{{"type": "function", "name": "weather", "parameters": {PARIS}}}',
        [f"weather{PARIS}"],
    ),
    (CallFormat.LLAMA3_JSON, f'<|python_tag|>{{"name": "add", "parameters": {{}}}}; {{"name": "weather", "parameters": '
     f"{PARIS}}}", ["add{}", f"weather{PARIS}"]),
    (CallFormat.LLAMA3_JSON, '{"name": "Ada", "parameters": {}}', ['{"name": "Ada", "parameters": {}}']),
    (CallFormat.LLAMA3_JSON, '{"name": "add", "parameters": {}}; and', ["add{}", "; and"]),
    (CallFormat.LLAMA3_JSON, ' {"a": [1, {"b": 2}]} ', [' {"a": [1, {"b": 2}]} ']),
    (CallFormat.LLAMA3_JSON, 'See {"name": "add", "parameters": {}}', ['See {"name": "add", "parameters": {}}']),
    (CallFormat.LLAMA3_JSON, "<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
    (
        CallFormat.MISTRAL,
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}, "id": "abcdefghi"}}]',
        [f"weather{PARIS}"],
    ),
    (CallFormat.MISTRAL, 'Yes.[TOOL_CALLS][{"name": "f", "arguments": {}}, {"arguments": {"a": 1}, "name": "g"}]',
     ["Yes.", "f{}", 'g{"a": 1}']),
    (CallFormat.MISTRAL, f"[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{{}}",
     [f"weather{PARIS}", "f{}"]),
    (CallFormat.MISTRAL, f"[TOOL_CALLS]weather{PARIS}", [f"weather{PARIS}"]),
    (CallFormat.MISTRAL, "[TOOL_CALLS][]", ["[TOOL_CALLS][]"]),
    (CallFormat.MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"x": 1}]', ["f{}", ', {"x": 1}]']),
    (CallFormat.MISTRAL, "[TOOL_CALLS]weather in Paris", ["[TOOL_CALLS]weather in Paris"]),
    (CallFormat.QWEN3_CODER, f"I look.\n\n{XML}\n{XML}", ["I look.", f"weather{PARIS}", f"weather{PARIS}"]),
    (CallFormat.QWEN3_CODER, XML.removeprefix("<tool_call>\n"), [f"weather{PARIS}"]),
    (CallFormat.QWEN3_CODER, "<tool_call><function=now></function></tool_call>", ["now{}"]),
    (
        CallFormat.QWEN3_CODER,
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nNone\n</parameter>\n<parameter=label>"
        "\n12\n</parameter>\n<parameter=items>\n[1, [2]]\n</parameter>\n"
        "<parameter=other>\n true\n\n</parameter>\n</function>",
        ['add{"a": 1, "b": null, "label": "12", "items": [1, [2]], "other": " true\\n"}'],
    ),
    (CallFormat.QWEN3_CODER, "<tool_call><function=add><parameter=a>one</parameter></function>", ['add{"a": "one"}']),
    (
        CallFormat.QWEN3_CODER,
        '<function=weather><parameter=city>\nSão "P"\n<b>\n</parameter></function></tool_call>',
        ['weather{"city": "São \\"P\\"\\n<b>"}'],
    ),
    (CallFormat.QWEN3_CODER, "<tool_call><function=weather><parameter=city>Par", ['weather{"city": "Par']),
    (CallFormat.QWEN3_CODER, "<tool_call> none </tool_call>", ["<tool_call> none </tool_call>"]),
    (CallFormat.QWEN3_CODER, "<function=>", ["<function=>"]),
    (CallFormat.DEEPSEEK_V3, f"I look.\n\n{BEGIN}{FENCED}\n{FENCED}{LAST}",
     ["I look.", f"weather{PARIS}", f"weather{PARIS}"]),
    (CallFormat.DEEPSEEK_V31, f"I look.{BEGIN}{BARE}{BARE}{LAST}Done.",
     ["I look.", f"weather{PARIS}", f"weather{PARIS}", "Done."]),
    # Either is read whichever is expected; so are calls without what goes around them, without a fence and an end.
    (CallFormat.DEEPSEEK_V3, f"{BEGIN}{BARE}{LAST}", [f"weather{PARIS}"]),
    (CallFormat.DEEPSEEK_V31, f"{BEGIN}\n{FENCED}{LAST}", [f"weather{PARIS}"]),
    (CallFormat.DEEPSEEK_V3, FENCED, [f"weather{PARIS}"]),
    (CallFormat.DEEPSEEK_V3, f"{BEGIN}{CALL}function{SEP}a.b-c\n{{}}{END}{LAST}", ["a.b-c{}"]),
    (CallFormat.DEEPSEEK_V31, f"{BEGIN}{CALL}weather{SEP}{PARIS}", [f"weather{PARIS}"]),
    (CallFormat.DEEPSEEK_V3, f"{BEGIN}{CALL}function{SEP}f\n```\n{{}}\n```", ["f{}"]),
    # Marks and fences inside of a text; cut.
    (CallFormat.DEEPSEEK_V31, f'{BEGIN}{CALL}f{SEP}{{"a": "{END}```"}}{END}', [f'f{{"a": "{END}```"}}']),
    (CallFormat.DEEPSEEK_V3, f'{BEGIN}{CALL}function{SEP}f\n```json\n{{"a": "b', ['f{"a": "b']),
    # No calls.
    (CallFormat.DEEPSEEK_V3, f"{BEGIN}no", [f"{BEGIN}no"]),
    (CallFormat.DEEPSEEK_V3, f"{BEGIN}{CALL}function", [f"{BEGIN}{CALL}function"]),
    (CallFormat.DEEPSEEK_V31, f"{CALL}f{SEP}[1]{END}", [f"{CALL}f{SEP}[1]{END}"]),
    (CallFormat.DEEPSEEK_V31, "half a mark <｜tool▁call", ["half a mark <｜tool▁call"]),
]  # fmt: skip


@pytest.mark.parametrize(("calls", "text", "expected"), CASES)
def test_a_whole_reply_and_one_in_single_characters(calls: CallFormat, text: str, expected: list[str]) -> None:
    assert shown(read(parser(calls), [text])) == expected
    assert shown(read(parser(calls), text)) == expected


def test_calls_are_numbered_and_have_ids() -> None:
    assert read(parser(CallFormat.HERMES), [HERMES + HERMES]) == [
        CallBegin(0, "0", "weather"), CallArguments(0, PARIS), CallBegin(1, "1", "weather"), CallArguments(1, PARIS),
    ]  # fmt: skip


@pytest.mark.parametrize("calls", CallFormat)
def test_text_and_arguments_come_as_soon_as_they_are_certain(calls: CallFormat) -> None:
    reader = parser(calls)
    assert reader.push("Hello") == [ContentText("Hello")]
    assert reader.push(" world") == [ContentText(" world")]
    # Space may stand before a call, and the beginning of a mark may be one.
    assert reader.push(" ") == []
    assert reader.push("<") in ([], [ContentText(" <")])
    assert shown([*reader.push("b")])[-1].endswith("b")


def test_arguments_are_streamed() -> None:
    reader = parser(CallFormat.HERMES)
    assert reader.push('<tool_call>{"name": "f", ') == []
    assert reader.push('"arguments": {"te') == [CallBegin(0, "0", "f"), CallArguments(0, '{"te')]
    assert reader.push('xt": "a') == [CallArguments(0, 'xt": "a')]
    reader = parser(CallFormat.QWEN3_CODER)
    reader.push("<tool_call>\n<function=weather>\n<parameter=city>\n")
    assert reader.push("Pa") == [CallArguments(0, "Pa")]
    assert reader.push('"\n') == [CallArguments(0, '\\"')]


def test_one_call_alone() -> None:
    text = f"Two:\n{HERMES}\n{HERMES} end"
    assert shown(read(parser(CallFormat.HERMES, max_calls=1), [text])) == ["Two:", f"weather{PARIS}"]
    reader = parser(CallFormat.HERMES, max_calls=1)
    assert shown(read(reader, text)) == ["Two:", f"weather{PARIS}"]
    assert reader.num_calls == 1


def test_what_never_becomes_a_call_is_not_kept_for_ever() -> None:
    text = '<tool_call>{"arguments": {"a": "' + "x" * (MAX_KEPT_CHARS + 100)
    for pieces in ([text], [text[:1000], text[1000:]], list(text)):
        reader = parser(CallFormat.HERMES)
        found = [delta for piece in pieces for delta in reader.push(piece)]
        assert "".join(shown(found)) == text


QWEN, R1 = ReasoningFormat.QWEN3, ReasoningFormat.DEEPSEEK_R1
REASONING: list[tuple[ReasoningFormat, str, str, list[str]]] = [
    (QWEN, "assistant\n", "<think>\nhm\n</think>\n\nyes\n", ["(hm)", "yes\n"]),
    (QWEN, "assistant\n", "\n<think>\n\n</think>\n\nyes", ["yes"]),
    (QWEN, "assistant\n", " plain", [" plain"]),
    (QWEN, "assistant\n", "I say <think>no</think>", ["I say <think>no</think>"]),
    (QWEN, "<think>\n", "hm\n</thin</think>yes", ["(hm\n</thin)", "yes"]),
    (QWEN, "<think>\n", "never ends\n", ["(never ends\n)"]),
    (QWEN, "<think>\n\n</think>\n\n", "yes", ["yes"]),
    (R1, "<｜Assistant｜><think>\n", "hm</think>\n\nyes", ["(hm)", "yes"]),
    (R1, "<｜Assistant｜>", "<think>\nhm\n</think>\n\nyes", ["(hm)", "yes"]),
    (R1, "<｜Assistant｜>", "hm</think>yes", ["(hm)", "yes"]),
    (R1, "<｜Assistant｜></think>", "yes", ["yes"]),
    (QWEN, "x", f"<think>\nI use {HERMES}\n</think>\n\n{HERMES}", [f"(I use {HERMES})", f"weather{PARIS}"]),
]


@pytest.mark.parametrize(("reasoning", "prompt_end", "text", "expected"), REASONING)
def test_reasoning_before_the_answer(
    reasoning: ReasoningFormat, prompt_end: str, text: str, expected: list[str]
) -> None:
    assert shown(read(parser(CallFormat.HERMES, reasoning, prompt_end), [text])) == expected
    assert shown(read(parser(CallFormat.HERMES, reasoning, prompt_end), text)) == expected


def test_without_calls_marks_of_calls_are_text() -> None:
    assert shown(read(parser(None, QWEN, ""), [f"<think>a</think>{HERMES} "])) == ["(a)", f"{HERMES} "]
    assert read(parser(None, QWEN, "<think>"), ["a"]) == [ReasoningText("a")]


def test_types_of_an_argument_are_looked_for_in_a_bounded_part_of_the_schema() -> None:
    many = [{"type": "integer"}] * 100 + [{"$ref": f"#/x/{'a' * 2000}"}] * 100
    wide = {"anyOf": [{"type": "string"}, *({**schema} for schema in many * 3)]}
    assert not Parameters({"properties": {"a": wide}}).may_be_text("a")
    wide["anyOf"] = wide["anyOf"][-200:] + wide["anyOf"][:1]
    assert Parameters({"properties": {"a": wide}}).may_be_text("a")


def test_arguments_of_plain_text_are_json() -> None:
    values = {
        "a": ["1", "x", "1e999999", "NaN", "[", "9" * 5000],
        "b": ["-1.5", "null", "{}"],
        "label": ["True", "null"],
    }
    for key, texts in values.items():
        for text in texts:
            call = f"<function=add><parameter={key}>\n{text}\n</parameter></function>"
            (found,) = shown(read(parser(CallFormat.QWEN3_CODER), [call]))
            arguments = json.loads(found.removeprefix("add"), parse_constant=pytest.fail)
            assert list(arguments) == [key]
