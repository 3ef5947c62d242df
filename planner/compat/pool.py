"""A pool of machines that knows which has the least of one figure. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.compat.machine import Machine

# (figure, place in the pool, machine).
_Entry = tuple[int, int, "Machine"]
# Stale entries are thrown away when there are so many for each machine.
_MAX_ENTRIES = 8


class Pool:
    """In the order in which machines were added; of machines with the same figure the first is the least.

    A machine that changes gets a new entry in a heap; its old one is stale, and skipped when it comes to the top. So a
    choice does not look at all machines.
    """

    def __init__(self, figure: Callable[[Machine], int]) -> None:
        self._figure = figure
        self._num_added = 0
        self._entries: dict[Machine, _Entry] = {}
        self._heap: list[_Entry] = []

    def __iter__(self) -> Iterator[Machine]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, machine: Machine) -> None:
        assert machine.pool is None
        machine.pool = self
        self._num_added += 1
        self._enter(machine, self._num_added)

    def remove(self, machine: Machine) -> None:
        machine.pool = None
        del self._entries[machine]

    def changed(self, machine: Machine) -> None:
        figure, place, _ = self._entries[machine]
        if self._figure(machine) != figure:
            self._enter(machine, place)

    def least(self) -> Machine | None:
        """None: it is empty."""
        heap, entries = self._heap, self._entries
        while heap and entries.get(heap[0][2]) is not heap[0]:
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def _enter(self, machine: Machine, place: int) -> None:
        entry = self._entries[machine] = (self._figure(machine), place, machine)
        if len(self._heap) >= _MAX_ENTRIES * len(self._entries):
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, entry)
