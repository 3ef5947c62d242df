"""The clock that code takes as a constructor argument: the monotonic clock in production, a fake one in tests."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic clock; only differences on one machine mean anything."""


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()


# A timer that fires later than this means that the process was busy or stopped and has unread input.
_LATE_S = 0.1
_MAX_CATCH_UP_S = 1.0


def catch_up_s(late_s: float) -> float:
    """Time to read pending input before a deadline is judged whose timer fired ``late_s`` late; 0: judge it now."""
    return 0.0 if late_s < _LATE_S else min(late_s, _MAX_CATCH_UP_S)
