"""Limits the duration of one turn of the event loop. Work in pieces calls it before each piece, and waits for a later
turn if the present one has lasted too long; small work does not wait.

All callbacks that are ready run before the loop polls again, so a hundred readers with a few milliseconds each block
other work as long as one reader with all of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

# Waiting pieces that are resumed in one turn: this many at first, as each may take milliseconds, then as many as fit.
_FIRST_AT_ONCE = 4
_MAX_AT_ONCE = 64


class Turns:
    def __init__(self, max_turn_s: float) -> None:
        self._max_turn_s = max_turn_s
        # Start of the first piece of the present turn; None before.
        self._began_s: float | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._at_once = _FIRST_AT_ONCE

    @property
    def is_over(self) -> bool:
        """Whether the rest should wait for the next turn."""
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
        """Waits until there is time for a piece; waiting pieces are served in order."""
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
        # Scheduled again even if none are left: the resumed pieces are part of this turn.
        loop.call_soon(self._next)


class Stepwise:
    """Synchronous work of many small steps: as many as a turn has time for, the rest in later turns."""

    def __init__(self, step: Callable[[], bool], max_turn_s: float) -> None:
        """``step`` returns False when no step is left."""
        self._step = step
        self._max_turn_s = max_turn_s
        self._is_running = False
        self._is_due = False

    def run(self) -> None:
        """Runs at least one step, unless steps are running or scheduled."""
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
