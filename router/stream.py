"""Where tokens wait between the dispatcher and whoever writes them to the client.

A stream holds token ids (at most max_tokens of them, eight bytes each), never text: a slow client costs next to
nothing, and what piled up leaves in one chunk.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from baton.observe import Relay
from baton.types import PositionLogprobs
from router.flow_messages import Outcome


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens since the last batch; with ``outcome`` the stream is over."""

    token_ids: list[int]
    logprobs: list[PositionLogprobs]
    outcome: Outcome | None


class Pacer:
    """Wakes the readers of many streams together, and less often when the process is behind.

    Waking a reader per token costs tens of microseconds each. While a round of wake-ups takes under a millisecond,
    every token leaves at once. Above, the next round waits for twice as long as the last one took (at most
    ``max_hold_s``), so that writing never takes more than about a third of the time and several tokens share a chunk.
    """

    _QUICK_S = 0.001

    def __init__(self, max_hold_s: float) -> None:
        self._max_hold_s = max_hold_s
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
        self._is_scheduled = False
        dirty, self._dirty = self._dirty, []
        start_s = loop.time()
        for stream in dirty:
            stream.wake()
        # Runs behind the readers that were just woken.
        loop.call_soon(self._measure, start_s)

    def _measure(self, start_s: float) -> None:
        now = asyncio.get_running_loop().time()
        took_s = now - start_s
        self._last_s = now
        self._hold_s = 0.0 if took_s < self._QUICK_S else min(2 * took_s, self._max_hold_s)


class TokenStream:
    """One reader. The writer side is synchronous."""

    __slots__ = ("_has_started", "_is_marked", "_logprobs", "_outcome", "_pacer", "_tokens", "_waiter", "relay")

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._tokens: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._outcome: Outcome | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._has_started = False
        self._is_marked = False
        # Set with the outcome.
        self.relay: Relay | None = None

    def push(self, token_ids: tuple[int, ...], logprobs: tuple[PositionLogprobs, ...]) -> None:
        self._tokens += token_ids
        if logprobs:
            self._logprobs += logprobs
        if not self._has_started:
            self._has_started = True
            self.wake()  # nobody waits for company with the first token
        elif not self._is_marked:
            self._is_marked = True
            self._pacer.mark(self)

    def end(self, outcome: Outcome, relay: Relay) -> None:
        self._outcome = outcome
        self.relay = relay
        self.wake()

    def wake(self) -> None:
        self._is_marked = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Batch:
        """Everything that came since the last call; waits while there is nothing."""
        while not self._tokens and self._outcome is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        batch = Batch(self._tokens, self._logprobs, self._outcome)
        self._tokens, self._logprobs = [], []
        return batch
