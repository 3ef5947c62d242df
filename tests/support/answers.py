"""Writes the answers of any API from parts, without a router."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from baton.observe import Relay
from baton.types import FinishReason
from router.api.answer import Form
from router.frontend.generation import Ending
from router.text.deltas import CallArguments, CallBegin, ContentText, Delta, ReasoningText
from router.text.detokenizer import Part

RELAY = Relay("prefill-0", "decode-0", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1)
# A model that thinks, speaks and calls twice.
AGENT: tuple[Delta, ...] = (
    ReasoningText("Let me "),
    ReasoningText("see."),
    ContentText("I look\n"),
    ContentText("it up: \u00e9\U0001f600"),
    CallBegin(0, "call_a", "weather"),
    CallArguments(0, '{"city":'),
    CallArguments(0, ' "Oslo"}'),
    CallBegin(1, "call_b", "time"),
    CallArguments(1, "{}"),
)


def ending(
    reason: FinishReason = FinishReason.STOP, stop_reason: str | int | None = None, *, num_tokens: int = 9,
    num_cached_tokens: int = 0, num_reasoning_tokens: int = 0, has_tool_calls: bool = False,
) -> Ending:  # fmt: skip
    return Ending(reason, stop_reason, num_tokens, num_cached_tokens, RELAY, num_reasoning_tokens, has_tool_calls)


def part(*deltas: Delta) -> Part:
    """As a parser of the model's format makes it."""
    return Part("?", (7,), deltas=deltas)


def streamed(form: Form, parts: Sequence[Part], end: Ending) -> str:
    (writer,) = form.writers
    text = writer.begin() + "".join(map(writer.chunk, parts)) + writer.end(end)
    return text + form.closing([end]).decode()


def whole(form: Form, parts: Sequence[Part], end: Ending) -> dict[str, Any]:
    (writer,) = form.writers
    kept = writer.whole()
    for one in parts:
        kept.add(one)
    answer = form.whole([kept.json(end)], [end])
    content = b"".join(answer.pieces())
    assert len(content) == answer.num_bytes
    found: dict[str, Any] = json.loads(content)
    return found


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each server-sent event."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, _, data = block.partition("\ndata: ")
        assert name.startswith("event: "), block
        found.append((name.removeprefix("event: "), json.loads(data)))
    return found
