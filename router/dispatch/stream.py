"""Buffers tokens between the dispatcher and the tasks that write them to clients.

A stream holds token ids and packed logprobs, not text: a slow client costs little, and its backlog is sent in one
chunk. Nodes do not wait for clients, so the backlog is bounded, for each stream and for all together.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass

from baton import errors
from baton.observe import Relay
from baton.types import PositionLogprobs, TokenLogprob
from router.flow.messages import Outcome
from router.turns import Turns


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens since the last batch, at most as many as one turn may take; with ``outcome`` the stream is over."""

    token_ids: list[int]
    logprobs: list[PositionLogprobs]
    # Of the prompt, before any token.
    scored: list[PositionLogprobs]
    outcome: Outcome | None
    # Further tokens have arrived.
    has_more: bool


# Bytes of a Python int with its list entry, and the overhead of a bytes object with its list entry.
_TOKEN_BYTES = 36
_BYTES_BYTES = 41
# Readers that are woken in one turn of the event loop.
_MAX_AWAKE = 512
# Tokens that a reader gets at once: converting and writing them takes 1 us a token, with 20 logprobs each 150 us.
_MAX_BATCH = 512
_MAX_BATCH_WITH_LOGPROBS = 16


class Backlog:
    """Bytes kept for clients and their limits: for one stream or whole answer, and for all together.

    If all together exceed the limit, the streams that are behind fail; a stream whose reader keeps up has almost no
    backlog and is not affected.
    """

    def __init__(self, *, max_stream_bytes: int, max_answer_bytes: int, max_bytes: int) -> None:
        self._max_stream_bytes = max_stream_bytes
        self._max_answer_bytes = max_answer_bytes
        self._max_bytes = max_bytes
        # Bytes from which a stream counts as behind.
        self._behind_bytes = max_stream_bytes // 32
        self.num_bytes = 0

    def complaint(self, stream_bytes: int, scored_bytes: int = 0) -> str | None:
        """The reason why a stream with this backlog must end; None if it need not. ``scored_bytes`` of it are of its
        prompt, whose length bounds them: they may come faster than they are written."""
        if stream_bytes - scored_bytes > self._max_stream_bytes:
            return f"{stream_bytes} bytes of its output wait for the client, the limit is {self._max_stream_bytes}"
        if self.num_bytes > self._max_bytes and stream_bytes > self._behind_bytes:
            return (
                f"the output that waits for all clients has {self.num_bytes} bytes, the limit is {self._max_bytes}; "
                f"{stream_bytes} of them wait for this client"
            )
        return None

    def keep_answer(self, num_bytes: int, answer_bytes: int) -> None:
        """Adds bytes of an answer that is being built, which then has ``answer_bytes``. Raises if that is too much;
        the caller subtracts them again, whether it raised or not."""
        self.num_bytes += num_bytes
        if answer_bytes > self._max_answer_bytes:
            raise errors.InvalidRequest(
                f"the answer has grown beyond {self._max_answer_bytes} bytes; use stream, or ask for fewer choices, "
                "tokens or logprobs",
                param="stream",
            )
        if self.num_bytes > self._max_bytes and answer_bytes > self._behind_bytes:
            raise errors.Overloaded(
                f"answers that wait for their end or for clients have {self.num_bytes} bytes, the limit is "
                f"{self._max_bytes}; use stream, or try again later"
            )


def _packed(position: PositionLogprobs) -> bytes:
    """A tenth of the objects' memory. Logprobs come over the wire as float32, so the packing is exact."""
    tokens = (position.chosen, *position.top)
    ids, values = [t.token_id for t in tokens], [t.logprob for t in tokens]
    return struct.pack(f"<I{len(tokens)}I{len(tokens)}f", position.rank, *ids, *values)


def _size(packed: list[bytes]) -> int:
    return sum(map(len, packed)) + _BYTES_BYTES * len(packed)


def _unpacked(data: bytes) -> PositionLogprobs:
    num = (len(data) - 4) // 8
    rank, *rest = struct.unpack(f"<I{num}I{num}f", data)
    chosen, *top = map(TokenLogprob, rest[:num], rest[num:])
    return PositionLogprobs(chosen, rank, tuple(top))


class Pacer:
    """Wakes the readers of many streams together, and less often when the process is behind.

    Waking a reader costs tens of microseconds. While a round of wake-ups takes less than a millisecond, every token is
    sent at once. Above, the next round waits for twice the time of the last one (at most ``max_hold_s``), so that
    writing takes at most about a third of the time and several tokens share a chunk.
    """

    _QUICK_S = 0.001

    def __init__(self, max_hold_s: float, turns: Turns) -> None:
        self._max_hold_s = max_hold_s
        self.turns = turns
        self._dirty: list[TokenStream] = []
        self._is_scheduled = False
        self._hold_s = 0.0
        self._last_s = 0.0

    def mark(self, stream: TokenStream) -> None:
        self._dirty.append(stream)
        if self._is_scheduled:
            return
        self._is_scheduled = True
        loop = asyncio.get_running_loop()
        if self._hold_s == 0.0:
            loop.call_soon(self._flush)
        else:
            loop.call_at(self._last_s + self._hold_s, self._flush)

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        dirty, self._dirty = self._dirty[:_MAX_AWAKE], self._dirty[_MAX_AWAKE:]
        self._is_scheduled = bool(self._dirty)
        start_s = loop.time()
        for stream in dirty:
            stream.wake()
        if self._dirty:
            loop.call_soon(self._flush)
        # Runs after the readers that were just woken.
        loop.call_soon(self._measure, start_s)

    def _measure(self, start_s: float) -> None:
        if self.turns.num_waiting:
            asyncio.get_running_loop().call_soon(self._measure, start_s)
            return
        now = asyncio.get_running_loop().time()
        took_s = now - start_s
        self._last_s = now
        self._hold_s = 0.0 if took_s < self._QUICK_S else min(2 * took_s, self._max_hold_s)


class TokenStream:
    """A stream with one reader. The writer side is synchronous."""

    __slots__ = ("_backlog", "_has_started", "_is_marked", "_kept_bytes", "_logprobs", "_outcome", "_pacer", "_scored",
                 "_scored_bytes", "_tokens", "_waiter", "embedding", "relay")  # fmt: skip

    def __init__(self, pacer: Pacer, backlog: Backlog) -> None:
        self._pacer = pacer
        self._backlog = backlog
        self._kept_bytes = 0
        self._tokens: list[int] = []
        self._logprobs: list[bytes] = []
        self._scored: list[bytes] = []
        self._scored_bytes = 0
        self._outcome: Outcome | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._has_started = False
        self._is_marked = False
        # Of the prompt, before the first token.
        self.embedding = b""
        # Set together with the outcome.
        self.relay: Relay | None = None

    def push(self, token_ids: tuple[int, ...], logprobs: tuple[PositionLogprobs, ...]) -> None:
        self._tokens += token_ids
        num_bytes = _TOKEN_BYTES * len(token_ids)
        if logprobs:
            packed = [_packed(position) for position in logprobs]
            self._logprobs += packed
            num_bytes += _size(packed)
        self._keep(num_bytes)
        if not self._has_started:
            self._has_started = True
            self.wake()  # the first token is not held back
        else:
            self._mark()

    def push_scored(self, logprobs: tuple[PositionLogprobs, ...]) -> None:
        """Of the next tokens of the prompt."""
        packed = [_packed(position) for position in logprobs]
        self._scored += packed
        num_bytes = _size(packed)
        self._scored_bytes += num_bytes
        self._keep(num_bytes)
        self._mark()

    def _mark(self) -> None:
        if not self._is_marked:
            self._is_marked = True
            self._pacer.mark(self)

    def _keep(self, num_bytes: int) -> None:
        self._kept_bytes += num_bytes
        self._backlog.num_bytes += num_bytes

    @property
    def complaint(self) -> str | None:
        """The reason why the reader is too far behind; None if it is not."""
        return self._backlog.complaint(self._kept_bytes, self._scored_bytes)

    def drop(self) -> None:
        """Discards the content: there is no reader any more."""
        self._take(len(self._tokens))
        self._take_scored(len(self._scored))

    def _take(self, count: int) -> tuple[list[int], list[bytes]]:
        """The next tokens, with their logprobs if any."""
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        logprobs, self._logprobs = self._logprobs[:count], self._logprobs[count:]
        self._keep(-_TOKEN_BYTES * len(tokens) - _size(logprobs))
        return tokens, logprobs

    def _take_scored(self, count: int) -> list[bytes]:
        scored, self._scored = self._scored[:count], self._scored[count:]
        num_bytes = _size(scored)
        self._scored_bytes -= num_bytes
        self._keep(-num_bytes)
        return scored

    def end(self, outcome: Outcome, relay: Relay) -> None:
        self._outcome = outcome
        self.relay = relay
        self.wake()

    def wake(self) -> None:
        self._is_marked = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Batch:
        """What has come since the last call, or as much as one turn has time for; waits while there is nothing."""
        while not (self._tokens or self._scored) and self._outcome is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        await self._pacer.turns.wait()
        if self._scored:
            scored = self._take_scored(_MAX_BATCH_WITH_LOGPROBS)
            has_more = bool(self._tokens or self._scored)
            reports = [_unpacked(data) for data in scored]
            return Batch([], [], reports, None if has_more else self._outcome, has_more)
        token_ids, logprobs = self._take(_MAX_BATCH_WITH_LOGPROBS if self._logprobs else _MAX_BATCH)
        has_more = bool(self._tokens)
        outcome = None if has_more else self._outcome
        return Batch(token_ids, [_unpacked(data) for data in logprobs], [], outcome, has_more)
