"""However an answer is cut into parts, its stream re-assembles to the whole answer, for every endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.types import FinishReason
from router.api.answer import Form
from router.frontend.generation import Accepted, Ending
from router.frontend.request import Caller
from router.messages.response import MessageForm
from router.openai.request import ChatBody, CompletionBody, parse
from router.openai.response import Envelope
from router.responses.response import Heading, ResponseForm
from router.text.deltas import CallArguments, CallBegin, ContentText, Delta, ReasoningText
from router.text.detokenizer import Part
from tests.support.answers import ending, events, streamed, whole

TEXTS = st.text(min_size=1, max_size=12)
ARGUMENTS = st.dictionaries(TEXTS, st.one_of(TEXTS, st.integers(), st.none()), max_size=3).map(json.dumps)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[tuple[str, str]], list[Part]]:
    """What a choice says, as (kind or name, text), and parts that say it."""
    said = draw(st.lists(st.tuples(st.sampled_from(["think", "say", "call"]), TEXTS), max_size=5))
    found: list[tuple[str, str]] = []
    deltas: list[Delta] = []
    for kind, text in said:
        if kind == "call":
            arguments = draw(ARGUMENTS)
            index = sum(name not in ("think", "say") for name, _ in found)
            found.append((f"tool_{index}", arguments))
            deltas.append(CallBegin(index, f"call_{index}", f"tool_{index}"))
            deltas += [CallArguments(index, piece) for piece in draw(pieces(arguments))]
        else:
            found.append((kind, text))
            make = ReasoningText if kind == "think" else ContentText
            deltas += [make(piece) for piece in draw(pieces(text))]
    return found, draw(parts(deltas))


@st.composite
def pieces(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if text[a:b]]


@st.composite
def parts(draw: st.DrawFn, deltas: list[Delta]) -> list[Part]:
    found: list[Part] = []
    while deltas:
        count = draw(st.integers(0, len(deltas)))
        taken, deltas = deltas[:count], deltas[count:]
        content = "".join(d.text for d in taken if isinstance(d, ContentText))
        found.append(Part(content, (7,), deltas=taken))
    return found


def openai_form(kind: type[ChatBody] | type[CompletionBody]) -> Form:
    asked = {"messages": [{"role": "user", "content": "a"}]} if kind is ChatBody else {"prompt": "a"}
    body = parse(kind, json.dumps(asked).encode())
    generation = cast(Any, SimpleNamespace(prompt_token_ids=(1, 2)))
    return Envelope(body, body.request(Caller()), Accepted("1", "tiny", (), [generation]), None)


def openai_events(text: str) -> list[dict[str, Any]]:
    blocks = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    assert blocks[-1] == "[DONE]"
    return [json.loads(block) for block in blocks[:-1]]


def joined_completion(text: str) -> Any:
    return "".join(event["choices"][0]["text"] for event in openai_events(text))


def joined_chat(text: str) -> Any:
    message: dict[str, Any] = {"content": ""}
    calls: dict[int, list[str]] = {}
    for event in openai_events(text):
        delta = event["choices"][0]["delta"]
        message["content"] += delta.get("content", "")
        if "reasoning" in delta:
            message["reasoning"] = message.get("reasoning", "") + delta["reasoning"]
        for call in delta.get("tool_calls", ()):
            mine = calls.setdefault(call["index"], [call["function"].get("name", ""), ""])
            mine[1] += call["function"]["arguments"]
    return message, list(calls.values())


def whole_chat(answer: dict[str, Any]) -> Any:
    message = answer["choices"][0]["message"]
    calls = [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", ())]
    kept = {"content": message["content"] or ""}
    return kept | ({"reasoning": message["reasoning"]} if "reasoning" in message else {}), calls


def joined_message(text: str) -> Any:
    message: dict[str, Any] = {}
    inputs: dict[int, str] = {}
    for kind, data in events(text):
        match kind:
            case "message_start":
                message = data["message"]
            case "content_block_start":
                assert data["index"] == len(message["content"])
                message["content"].append(data["content_block"])
            case "content_block_delta":
                block, delta = message["content"][data["index"]], data["delta"]
                if delta["type"] == "input_json_delta":
                    inputs[data["index"]] = inputs.get(data["index"], "") + delta["partial_json"]
                else:
                    name = delta["type"].removesuffix("_delta")
                    block[name] += delta[name]
            case "content_block_stop":
                if data["index"] in inputs:
                    message["content"][data["index"]]["input"] = json.loads(inputs[data["index"]])
            case "message_delta":
                message |= data["delta"] | {"usage": data["usage"]}
    return message


def joined_response(text: str) -> Any:
    found = events(text)
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    items: list[dict[str, Any]] = []
    for kind, data in found:
        match kind.removeprefix("response."):
            case "output_item.added":
                assert data["output_index"] == len(items)
                items.append(data["item"])
            case "content_part.added":
                items[data["output_index"]]["content"].append(data["part"])
            case "output_text.delta" | "reasoning_text.delta":
                items[data["output_index"]]["content"][data["content_index"]]["text"] += data["delta"]
            case "function_call_arguments.delta":
                items[data["output_index"]]["arguments"] += data["delta"]
            case "output_item.done":
                items[data["output_index"]]["status"] = data["item"]["status"]
                assert items[data["output_index"]] == data["item"]
    last = found[-1][1]["response"]
    assert last["output"] == items
    return last


ENDPOINTS: dict[str, tuple[Callable[[], Form], Callable[[str], Any], Callable[[dict[str, Any]], Any]]] = {
    "completions": (lambda: openai_form(CompletionBody), joined_completion, lambda a: a["choices"][0]["text"]),
    "chat": (lambda: openai_form(ChatBody), joined_chat, whole_chat),
    "messages": (lambda: MessageForm("msg_1", "tiny", 2), joined_message, lambda a: a),
    "responses": (lambda: ResponseForm(Heading("1", 1, "tiny", 2, 1.0, 1.0, ""), None), joined_response, lambda a: a),
}


@pytest.mark.parametrize("name", ENDPOINTS)
@given(answer=answers(), reason=st.sampled_from(FinishReason), num_cached=st.integers(0, 2))
def test_a_stream_is_its_whole_answer(
    name: str, answer: tuple[list[tuple[str, str]], list[Part]], reason: FinishReason, num_cached: int
) -> None:
    said, cut = answer
    make, joined, kept = ENDPOINTS[name]
    calls = [text for kind, text in said if kind not in ("think", "say")]
    end: Ending = ending(reason, num_cached_tokens=num_cached, has_tool_calls=bool(calls))
    if name == "completions":
        cut = [Part(part.text, part.token_ids) for part in cut]
    found = joined(streamed(make(), cut, end))
    # The whole answer, from other parts: all of it at once.
    at_once = [Part("".join(part.text for part in cut), (7,), deltas=[d for part in cut for d in part.deltas])]
    assert found == kept(whole(make(), cut, end)) == kept(whole(make(), at_once, end))
    shown = json.dumps(found, ensure_ascii=False)
    for kind, text in said:
        if kind == "say":
            assert json.dumps(text, ensure_ascii=False)[1:-1] in shown
