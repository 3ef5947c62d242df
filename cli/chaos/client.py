"""Clients of a chaos run: each asks over HTTP, keeps every token with its time, and asks again when it is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cli.chaos.load import Behaviour, Manner
from cli.chaos.verdict import Heard
from loadgen.client import Server, exchange

_OK = 200
# Refused for now: no node, or too many requests. Asked again so often before it counts as an error.
_REFUSALS = (429, 503)
_MAX_TRIES = 40
_AGAIN_S = 1.0
# A stream that brings nothing for so long has no outcome; the request's own timeout comes first.
_SILENCE_S = 180.0
_MAX_ERROR_CHARS = 300


@dataclass(slots=True)
class Stream:
    """What has come of one request so far. ``stamps_s``: when each token came."""

    token_ids: list[int] = field(default_factory=list)
    stamps_s: list[float] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    num_refused: int = 0
    has_left: bool = False

    @property
    def heard(self) -> Heard:
        return Heard(tuple(self.token_ids), "".join(self.parts), self.finish_reason, self.error, self.has_left)

    @property
    def longest_gap_s(self) -> float:
        return max((b - a for a, b in zip(self.stamps_s, self.stamps_s[1:], strict=False)), default=0.0)

    def take(self, event: Mapping[str, Any], at_s: float) -> None:
        if "error" in event:
            self.error = str(event["error"])[:_MAX_ERROR_CHARS]
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids") or ()
            self.token_ids += ids
            self.stamps_s += [at_s] * len(ids)
            self.parts.append(_text(choice))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason


def _text(choice: Mapping[str, Any]) -> str:
    """Of calls of tools their names and arguments; not their ids, which are drawn anew."""
    delta = choice.get("delta")
    if delta is None:
        return str(choice.get("text") or "")
    calls = [call.get("function") or {} for call in delta.get("tool_calls") or ()]
    called = "".join(f"{call.get('name') or ''}{call.get('arguments') or ''}" for call in calls)
    return f"{delta.get('content') or ''}{called}"


async def ask(
    server: Server, path: str, body: bytes, headers: Mapping[str, str], behaviour: Behaviour, now: Callable[[], float]
) -> Stream:
    """To its end, whatever that is. Only a cancellation is raised."""
    stream = Stream()
    while await _is_refused(stream, server, path, body, headers, behaviour, now):
        stream.num_refused += 1
        if stream.num_refused >= _MAX_TRIES:
            break
        stream.error = None
        await asyncio.sleep(_AGAIN_S)
    return stream


async def _is_refused(
    stream: Stream, server: Server, path: str, body: bytes, headers: Mapping[str, str], behaviour: Behaviour,
    now: Callable[[], float],
) -> bool:  # fmt: skip
    try:
        async with exchange(server, "POST", path, body, headers) as reply:
            if reply.status != _OK:
                said = (await reply.body()).decode(errors="replace")
                stream.error = f"HTTP {reply.status}: {said[:_MAX_ERROR_CHARS]}"
                return reply.status in _REFUSALS
            await _read(stream, reply.parts(), behaviour, now)
    except TimeoutError:
        # Neither an end nor an error.
        return False
    except (OSError, ValueError) as error:
        if not stream.token_ids:
            # As a refusal: it was not taken in.
            stream.error = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]
            return True
    return False


async def _read(stream: Stream, parts: Any, behaviour: Behaviour, now: Callable[[], float]) -> None:
    rest = b""
    while True:
        async with asyncio.timeout(_SILENCE_S):
            part = await anext(parts, None)
        if part is None:
            return
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                stream.take(json.loads(data), now())
        if behaviour.manner is Manner.LEAVES and len(stream.token_ids) >= behaviour.after:
            stream.has_left = stream.finish_reason is None
            return
        if behaviour.manner is Manner.DAWDLES:
            await asyncio.sleep(behaviour.pause_s)
