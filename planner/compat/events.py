"""Simulated time, and what is due in it. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable

# The public simulator begins no event after so many seconds.
_LAST_S = 86_400.0


class Event(float):
    """Something due at this time. Compared by time alone, see Events."""

    __slots__ = ("action",)

    # None: cancelled.
    action: Callable[[], None] | None


class Events:
    """A heap of events by time, and the clock that they move on.

    Events of the same time come in the order that a binary heap leaves them in, which is not the order in which they
    were added. The public simulator has the same, and a cancelled event stays in its heap until its time: so the order
    is its order as long as both add the same events.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[Event] = []

    def __len__(self) -> int:
        """Cancelled ones count."""
        return len(self._heap)

    def after(self, delay_s: float, action: Callable[[], None]) -> Event | None:
        """At once if there is no delay: then there is no event."""
        if delay_s == 0:
            action()
            return None
        event = Event(self.now + delay_s)
        event.action = action
        heapq.heappush(self._heap, event)
        return event

    def run(self) -> None:
        heap = self._heap
        while heap and self.now < _LAST_S:
            event = heapq.heappop(heap)
            if event.action is not None:
                self.now = float(event)
                event.action()
