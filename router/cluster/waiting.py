"""The waiting line: clients take turns, and the sequences of each are placed by priority, equal ones in the order they
came. Pure.

While several clients have work, none of them has all nodes: a batch that is full of one client's sequences makes every
step slow for all clients, in whatever order they wait.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class _Waiting(Protocol):
    @property
    def client(self) -> str: ...


ItemT = TypeVar("ItemT", bound=_Waiting)


class _Queue(Generic[ItemT]):
    """What one client has waiting.

    Invariant: every item is in ``_again``, or in ``_came`` and under its priority in ``_of``.
    """

    __slots__ = ("_again", "_came", "_of", "_priorities")

    def __init__(self) -> None:
        # Items that have run already, the first one first.
        self._again: OrderedDict[ItemT, None] = OrderedDict()
        # All others with their priority and when they came, the oldest first.
        self._came: OrderedDict[ItemT, tuple[int, float]] = OrderedDict()
        # The same by priority, and their priorities, the best first. A client may use a thousand.
        self._of: dict[int, OrderedDict[ItemT, None]] = {}
        self._priorities: list[int] = []

    def __len__(self) -> int:
        return len(self._again) + len(self._came)

    def __iter__(self) -> Iterator[ItemT]:
        yield from self._again
        for priority in self._priorities:
            yield from self._of[priority]

    def __contains__(self, item: object) -> bool:
        return item in self._again or item in self._came

    def put(self, item: ItemT, priority: int, now: float) -> None:
        self._came[item] = priority, now
        if priority not in self._of:
            self._of[priority] = OrderedDict()
            insort(self._priorities, priority)
        self._of[priority][item] = None

    def put_first(self, item: ItemT) -> None:
        self._again[item] = None
        self._again.move_to_end(item, last=False)

    def remove(self, item: ItemT) -> None:
        if item in self._again:
            del self._again[item]
            return
        priority, _ = self._came.pop(item)
        del self._of[priority][item]
        if not self._of[priority]:
            del self._of[priority]
            del self._priorities[bisect_left(self._priorities, priority)]

    def head(self, long_ago_s: float) -> ItemT:
        """The next one: what ran already, else what came before ``long_ago_s``, else the best priority's first."""
        if self._again:
            return next(iter(self._again))
        oldest, (_, came_s) = next(iter(self._came.items()))
        return oldest if came_s <= long_ago_s else next(iter(self._of[self._priorities[0]]))

    def num_before(self, priority: int) -> int:
        """How many would be before a new one."""
        return len(self._again) + sum(len(items) for of, items in self._of.items() if of <= priority)

    def check(self) -> None:
        assert len(self)
        assert sorted(self._of) == self._priorities
        assert all(self._of.values())
        by_priority = {item: priority for priority, items in self._of.items() for item in items}
        assert by_priority == {item: priority for item, (priority, _) in self._came.items()}


class Waiting(Generic[ItemT]):
    """A queue by turns. ``started`` and ``ended`` tell it what the nodes have of each client.

    Invariant: every client with something waiting is in ``_queues`` once, next turn first.
    """

    def __init__(self, *, alone_s: float, max_priority_wait_s: float) -> None:
        # A client is alone when no other has had anything here for so long.
        self._alone_s = alone_s
        # A sequence is passed over for better priorities for so long at most.
        self._max_priority_wait_s = max_priority_wait_s
        self._queues: OrderedDict[str, _Queue[ItemT]] = OrderedDict()
        self._num_running: dict[str, int] = {}
        self._num_waiting = 0
        # The two clients that had something here last, and when.
        self._last: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[ItemT]:
        for queue in self._queues.values():
            yield from queue

    def __contains__(self, item: ItemT) -> bool:
        return item in self._queues.get(item.client, ())

    def num_waiting_of(self, client: str) -> int:
        return len(self._queues.get(client, ()))

    def num_running_of(self, client: str) -> int:
        return self._num_running.get(client, 0)

    def num_ahead(self, client: str, priority: int) -> int:
        """How many leave before a new one would, as clients take turns."""
        queue = self._queues.get(client)
        own = 0 if queue is None else queue.num_before(priority)
        return own + sum(min(len(q), own + 1) for other, q in self._queues.items() if other != client)

    def put(self, item: ItemT, priority: int, now: float) -> None:
        self._queue(item.client, now).put(item, priority, now)

    def put_first(self, item: ItemT, now: float) -> None:
        """It has run already, and goes before all that its client has here."""
        self._queue(item.client, now).put_first(item)
        self._queues.move_to_end(item.client, last=False)

    def _queue(self, client: str, now: float) -> _Queue[ItemT]:
        """For one more."""
        self._seen(client, now)
        self._num_waiting += 1
        return self._queues.setdefault(client, _Queue())

    def remove(self, item: ItemT) -> None:
        queue = self._queues[item.client]
        queue.remove(item)
        self._num_waiting -= 1
        if not len(queue):
            del self._queues[item.client]

    def next(self, max_running: int, now: float) -> ItemT | None:
        """The sequence whose turn it is; None if none may start. A client with ``max_running`` on the nodes is passed
        over, unless no other client has anything here."""
        for client, queue in self._queues.items():
            if self._num_running.get(client, 0) < max_running or self.is_alone(client, now):
                return queue.head(now - self._max_priority_wait_s)
        return None

    def started(self, item: ItemT) -> None:
        """It leaves for the nodes, and its client's turn is over."""
        self.remove(item)
        self._num_running[item.client] = self._num_running.get(item.client, 0) + 1
        if item.client in self._queues:
            self._queues.move_to_end(item.client)

    def ended(self, client: str, now: float) -> None:
        """The nodes have one sequence less of it."""
        self._seen(client, now)
        left = self._num_running[client] - 1
        if left:
            self._num_running[client] = left
        else:
            del self._num_running[client]

    def crowding(self, newcomer: str, max_running: int) -> tuple[str, int]:
        """The client that has most on the nodes beside ``newcomer``, and how many sequences it has too many."""
        others = ((num, client) for client, num in self._num_running.items() if client != newcomer)
        num, client = max(others, default=(0, ""))
        return client, max(0, num - max_running)

    def was_here(self, client: str, now: float) -> bool:
        """It has something here, or had lately."""
        if client in self._num_running or client in self._queues:
            return True
        return now - self._last.get(client, -math.inf) < self._alone_s

    def is_alone(self, client: str, now: float) -> bool:
        """No other client has anything here, or has had lately."""
        if any(other != client for other in self._num_running):
            return False
        return all(other == client or now - seen_s >= self._alone_s for other, seen_s in self._last.items())

    def check(self) -> None:
        assert self._num_waiting == sum(len(q) for q in self._queues.values())
        for queue in self._queues.values():
            queue.check()
        assert all(n > 0 for n in self._num_running.values())

    def _seen(self, client: str, now: float) -> None:
        self._last[client] = now
        self._last.move_to_end(client)
        if len(self._last) > 2:
            self._last.popitem(last=False)
