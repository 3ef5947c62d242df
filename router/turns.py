"""How long one turn of the event loop may last. Work in pieces asks before each piece, and waits for a later turn if
the present one has lasted long enough; small work does not wait. Knows nothing of the work.

Whoever is ready when the loop polls runs before it polls again: a hundred readers with a few milliseconds each stop
everything else as long as one with all of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

# Waiting pieces that are let go in one turn: so many at first, as each may take some milliseconds, then as many as turn
# out to fit.
_FIRST_AT_ONCE = 4
_MAX_AT_ONCE = 64


class Turns:
    def __init__(self, max_turn_s: float) -> None:
        self._max_turn_s = max_turn_s
        # When the first piece of the present turn began; None before.
        self._began_s: float | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._at_once = _FIRST_AT_ONCE

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
        if not self._waiters:
            self._began_s = None
            self._at_once = _FIRST_AT_ONCE
            return
        loop = asyncio.get_running_loop()
        assert self._began_s is not None
        now = loop.time()
        took_s, self._began_s = now - self._began_s, now
        if took_s > self._max_turn_s:
            self._at_once = max(1, self._at_once // 2)
        elif took_s < self._max_turn_s / 2:
            self._at_once = min(_MAX_AT_ONCE, 2 * self._at_once)
        for _ in range(min(self._at_once, len(self._waiters))):
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
        # Once more, whether any are left or not: what was let go is a part of this turn.
        loop.call_soon(self._next)


class Stepwise:
    """Synchronous work of many small steps: as many at once as a turn has time for, the rest in the turns after it."""

    def __init__(self, step: Callable[[], bool], max_turn_s: float) -> None:
        """``step`` returns False when there is nothing left to do."""
        self._step = step
        self._max_turn_s = max_turn_s
        self._is_running = False
        self._is_due = False

    def run(self) -> None:
        """At least one step, unless steps are under way or due."""
        if self._is_running or self._is_due:
            return
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._max_turn_s
        self._is_running = True
        try:
            while self._step():
                if loop.time() >= end_s:
                    self._is_due = True
                    loop.call_soon(self._run_on)
                    break
        finally:
            self._is_running = False

    def _run_on(self) -> None:
        self._is_due = False
        self.run()
