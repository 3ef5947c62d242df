"""Simulated time: what happens next, in the order of time, and of its scheduling where times are equal."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Events:
    """The clock of a simulation."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, bool, Callable[..., None], tuple[Any, ...]]] = []
        self._num_made = 0
        self._num_due = 0

    def now(self) -> float:
        return self.now_s

    def at(self, when_s: float, what: Callable[..., None], *args: Any) -> None:
        self._num_made += 1
        self._num_due += 1
        heapq.heappush(self._heap, (when_s, self._num_made, True, what, args))

    def regularly(self, when_s: float, what: Callable[..., None], *args: Any) -> None:
        """Like ``at``, but nothing that has to be waited for."""
        self._num_made += 1
        heapq.heappush(self._heap, (when_s, self._num_made, False, what, args))

    def run(self, is_busy: Callable[[], bool]) -> None:
        """Until nothing is due, and nothing waits for its time alone either (``is_busy``)."""
        heap = self._heap
        while self._num_due or is_busy():
            self.now_s, _, counts, what, args = heapq.heappop(heap)
            self._num_due -= counts
            what(*args)
