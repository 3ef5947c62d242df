"""Time as a constructor argument: the monotonic clock in production, whatever a test needs elsewhere."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic clock; only differences on one machine mean anything."""


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()
