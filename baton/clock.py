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


# A process that looks at its timers later than this was busy or stopped, and has not read what came meanwhile.
_LATE_S = 0.1
_MAX_CATCH_UP_S = 1.0


def catch_up_s(late_s: float) -> float:
    """How long to go on reading before a limit is judged that was looked at ``late_s`` too late; 0: judge it now."""
    return 0.0 if late_s < _LATE_S else min(late_s, _MAX_CATCH_UP_S)
