"""How long one turn of the event loop may last. Work in pieces asks before each piece, and waits for a later turn if
the present one has lasted long enough; small work does not wait. Knows nothing of the work.

Whoever is ready when the loop polls runs before it polls again: a hundred readers with a few milliseconds each stop
everything else as long as one with all of it.
"""

from __future__ import annotations

import asyncio
from collections import deque

# Waiting pieces that are let go in one turn: each takes a few milliseconds at most.
_AT_ONCE = 8


class Turns:
    def __init__(self, max_turn_s: float) -> None:
        self._max_turn_s = max_turn_s
        # When the first piece of the present turn began; None before.
        self._began_s: float | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def is_over(self) -> bool:
        """What is left should wait for the next turn."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._began_s is None:
            self._began_s = now
            loop.call_soon(self._next)
        return now - self._began_s >= self._max_turn_s

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    async def wait(self) -> None:
        """Until there is time for a piece; those that wait are served in order."""
        if not self._waiters and not self.is_over:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _next(self) -> None:
        self._began_s = None
        for _ in range(min(_AT_ONCE, len(self._waiters))):
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._waiters:
            self._began_s = asyncio.get_running_loop().time()
            asyncio.get_running_loop().call_soon(self._next)
