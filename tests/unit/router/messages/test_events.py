"""The Messages API's events, byte for byte (`*.events`), and the whole message that they are the pieces of."""

from __future__ import annotations

from pathlib import Path

from baton.errors import NodeLost, Overloaded
from baton.types import FinishReason
from router.messages.response import MessageForm
from router.text.deltas import CallArguments, CallBegin, ContentText
from router.text.detokenizer import Part
from tests.support.answers import AGENT, ending, events, part, streamed, whole


def golden(name: str) -> str:
    return Path(__file__).with_name(f"{name}.events").read_text()


def form() -> MessageForm:
    return MessageForm("msg_1", "tiny", 20)


def test_text() -> None:
    parts = [Part("Hel", (5,)), Part("lo é\n", (6, 7))]
    assert streamed(form(), parts, ending(num_cached_tokens=16)) == golden("text")
    assert whole(form(), parts, ending(num_cached_tokens=16)) == {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "tiny",
        "content": [{"type": "text", "text": "Hello é\n"}], "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {
            "input_tokens": 4, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 16, "output_tokens": 9
        },
    }  # fmt: skip


def test_thoughts_text_and_calls() -> None:
    end = ending(has_tool_calls=True)
    assert streamed(form(), [part(delta) for delta in AGENT], end) == golden("agent")
    for parts in ([part(delta) for delta in AGENT], [part(*AGENT)]):
        found = whole(form(), parts, end)
        assert found["stop_reason"] == "tool_use"
        assert found["content"] == [
            {"type": "thinking", "thinking": "Let me see.", "signature": "msg_1"},
            {"type": "text", "text": "I look\nit up: é😀"},
            {"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Oslo"}},
            {"type": "tool_use", "id": "call_b", "name": "time", "input": {}},
        ]


def test_a_part_whose_text_is_held_back_says_nothing_yet() -> None:
    held = Part("", (7,))
    assert "content_block" not in streamed(form(), [held], ending())
    assert whole(form(), [held], ending())["content"] == []


def test_reasons_to_stop() -> None:
    cases = [
        (ending(FinishReason.LENGTH), "max_tokens", None),
        (ending(FinishReason.LENGTH, has_tool_calls=True), "max_tokens", None),
        (ending(FinishReason.STOP, "###"), "stop_sequence", "###"),
        (ending(FinishReason.STOP, 13), "end_turn", None),
    ]
    for end, reason, sequence in cases:
        found = whole(form(), [Part("a", (1,))], end)
        assert (found["stop_reason"], found["stop_sequence"]) == (reason, sequence)
        delta = dict(events(streamed(form(), [Part("a", (1,))], end)))["message_delta"]["delta"]
        assert delta == {"stop_reason": reason, "stop_sequence": sequence}


def test_a_call_that_was_cut_off_has_what_there_is_of_its_input() -> None:
    cut = [part(ContentText("x"), CallBegin(0, "c", "f"), CallArguments(0, '{"a": 1, "b": "tw'))]
    assert whole(form(), cut, ending(FinishReason.LENGTH))["content"][1]["input"] == {"a": 1}
    for arguments in ("", "{", "nul", "[1]"):
        cut = [part(CallBegin(0, "c", "f"), CallArguments(0, arguments))]
        assert whole(form(), cut, ending(FinishReason.LENGTH))["content"][0]["input"] == {}


def test_a_stream_that_fails_ends_with_the_error() -> None:
    for error, kind in ((NodeLost("decode-0 is gone"), "overloaded_error"), (Overloaded("full"), "rate_limit_error")):
        ((name, data),) = events(form().failed(error).decode())
        assert name == data["type"] == "error"
        assert data["error"] == {"type": kind, "message": error.message}
