"""Time as a constructor argument: the monotonic clock in production, one that tests turn by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic clock; only differences on one machine mean anything."""


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """Stands still until ``advance`` is called."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, "time does not run backwards"
        self._now_s += seconds
