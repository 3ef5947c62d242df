"""Simulated time."""

from __future__ import annotations

import heapq
from functools import partial

from planner.compat.events import Events


def test_events_come_by_time_without_the_cancelled_ones_and_without_delay_at_once() -> None:
    events, came = Events(), list[tuple[float, str]]()

    def note(name: str) -> None:
        came.append((events.now, name))

    events.after(2.0, lambda: note("c"))
    cancelled = events.after(3.0, lambda: note("never"))
    events.after(1.0, lambda: (note("b"), events.after(0.5, lambda: note("b, later")))[0])
    assert events.after(0.0, lambda: note("a")) is None
    assert cancelled is not None
    cancelled.action = None
    events.run()
    assert came == [(0.0, "a"), (1.0, "b"), (1.5, "b, later"), (2.0, "c")]
    # The clock does not move to a cancelled event.
    assert events.now == 2.0
    assert len(events) == 0


class Timed:
    """What the public simulator has in its heap: it knows only which of two is earlier."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __lt__(self, other: Timed) -> bool:
        return False


def test_equal_times_come_as_a_heap_leaves_them() -> None:
    events, came, heap = Events(), list[int](), list[Timed]()
    for i in range(9):
        events.after(1.0, partial(came.append, i))
        heapq.heappush(heap, Timed(i))
    events.run()
    assert came == [heapq.heappop(heap).number for _ in range(9)] != list(range(9))
