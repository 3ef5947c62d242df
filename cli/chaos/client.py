"""Clients of a chaos run: each asks over HTTP, keeps every token with its time, asks again when it is refused, and goes
on at another router when it has lost its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cli.chaos.load import Behaviour, Manner
from cli.chaos.verdict import Heard
from loadgen.client import Reply, Server, exchange

_OK = 200
# Refused for now: no node, or too many requests. Asked again so often before it counts as an error.
_REFUSALS = (429, 503)
_MAX_TRIES = 40
# A stream that brings nothing for so long has no outcome; the request's own timeout comes first.
_SILENCE_S = 180.0
_MAX_ERROR_CHARS = 300
# Events get ids, by which another router goes on with a lost stream.
_RESUMABLE = {"x-baton-resumable": "true"}


class _End(Enum):
    # Nothing more is to come, whatever there is.
    OVER = "over"
    REFUSED = "refused"
    # The connection is gone, and the stream may go on over another one.
    LOST = "lost"


@dataclass(slots=True)
class Stream:
    """What has come of one request so far. ``stamps_s``: when each token came."""

    token_ids: list[int] = field(default_factory=list)
    stamps_s: list[float] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    num_refused: int = 0
    num_resumed: int = 0
    has_left: bool = False
    # Of the newest whole event.
    event_id: str = ""

    @property
    def heard(self) -> Heard:
        return Heard(tuple(self.token_ids), "".join(self.parts), self.finish_reason, self.error, self.has_left)

    @property
    def longest_gap_s(self) -> float:
        return max((b - a for a, b in zip(self.stamps_s, self.stamps_s[1:], strict=False)), default=0.0)

    def take(self, event: bytes, at_s: float) -> None:
        """The lines of one server-sent event."""
        for line in event.split(b"\n"):
            name, _, value = line.partition(b":")
            if name == b"id":
                self.event_id = value.strip().decode()
            elif name == b"data" and value.strip() != b"[DONE]":
                self._data(json.loads(value), at_s)

    def _data(self, said: Mapping[str, Any], at_s: float) -> None:
        if "error" in said:
            self.error = str(said["error"])[:_MAX_ERROR_CHARS]
        for choice in said.get("choices") or ():
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


@dataclass(frozen=True, slots=True)
class Caller:
    """What all requests have in common. ``servers``: routers of one cluster. ``again_s``: between tries at one."""

    servers: Sequence[Server]
    headers: Mapping[str, str]
    now: Callable[[], float]
    again_s: float = 1.0

    async def ask(self, number: int, path: str, body: bytes, behaviour: Behaviour) -> Stream:
        """To its end, whatever that is. Only a cancellation is raised."""
        stream = Stream()
        for tries in range(_MAX_TRIES):
            end = await self._try(self.servers[(number + tries) % len(self.servers)], path, body, behaviour, stream)
            if end is _End.OVER or (end is _End.LOST and stream.token_ids and not stream.event_id):
                break
            stream.num_refused += end is _End.REFUSED
            stream.num_resumed += end is _End.LOST and bool(stream.event_id)
            if tries + 1 < _MAX_TRIES:
                # That of the last try is the stream's.
                stream.error = None
                await asyncio.sleep(self.again_s if end is _End.REFUSED or len(self.servers) == 1 else 0.0)
        return stream

    async def _try(self, server: Server, path: str, body: bytes, behaviour: Behaviour, stream: Stream) -> _End:
        goes_on = {"last-event-id": stream.event_id} if stream.event_id else _RESUMABLE
        try:
            async with exchange(server, "POST", path, body, {**self.headers, **goes_on}) as reply:
                if reply.status != _OK:
                    said = (await reply.body()).decode(errors="replace")
                    stream.error = f"HTTP {reply.status}: {said[:_MAX_ERROR_CHARS]}"
                    return _End.REFUSED if reply.status in _REFUSALS else _End.OVER
                await self._read(reply, behaviour, stream)
        except TimeoutError:
            # Neither an end nor an error.
            return _End.OVER
        except (OSError, ValueError) as error:
            if not stream.token_ids:
                stream.error = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]
            return _End.LOST
        return _End.OVER

    async def _read(self, reply: Reply, behaviour: Behaviour, stream: Stream) -> None:
        parts, rest = reply.parts(), b""
        while True:
            async with asyncio.timeout(_SILENCE_S):
                part = await anext(parts, None)
            if part is None:
                return
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                stream.take(event, self.now())
            if behaviour.manner is Manner.LEAVES and len(stream.token_ids) >= behaviour.after:
                stream.has_left = stream.finish_reason is None
                return
            if behaviour.manner is Manner.DAWDLES:
                await asyncio.sleep(behaviour.pause_s)
