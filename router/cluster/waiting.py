"""The waiting line: clients take turns, and the sequences of each are placed in the order they came. Pure.

While several clients have work, none of them has all nodes: a batch that is full of one client's sequences makes every
step slow for all clients, in whatever order they wait.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class _Waiting(Protocol):
    @property
    def client(self) -> str: ...


ItemT = TypeVar("ItemT", bound=_Waiting)


class Waiting(Generic[ItemT]):
    """A queue by turns. ``started`` and ``ended`` tell it what the nodes have of each client.

    Invariant: every client with something waiting is in ``_queues`` once, next turn first.
    """

    def __init__(self, *, alone_s: float) -> None:
        # A client is alone when no other has had anything here for so long.
        self._alone_s = alone_s
        self._queues: OrderedDict[str, OrderedDict[ItemT, None]] = OrderedDict()
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

    def put(self, item: ItemT, now: float, *, is_first: bool = False) -> None:
        """``is_first``: it has run already, and goes before all that its client has here."""
        self._seen(item.client, now)
        queue = self._queues.setdefault(item.client, OrderedDict())
        queue[item] = None
        if is_first:
            queue.move_to_end(item, last=False)
            self._queues.move_to_end(item.client, last=False)
        self._num_waiting += 1

    def remove(self, item: ItemT) -> None:
        queue = self._queues[item.client]
        del queue[item]
        self._num_waiting -= 1
        if not queue:
            del self._queues[item.client]

    def next(self, max_running: int, now: float) -> ItemT | None:
        """The sequence whose turn it is; None if none may start. A client with ``max_running`` on the nodes is passed
        over, unless no other client has anything here."""
        for client, queue in self._queues.items():
            if self._num_running.get(client, 0) < max_running or self.is_alone(client, now):
                return next(iter(queue))
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
        assert all(self._queues.values())
        assert all(n > 0 for n in self._num_running.values())

    def _seen(self, client: str, now: float) -> None:
        self._last[client] = now
        self._last.move_to_end(client)
        if len(self._last) > 2:
            self._last.popitem(last=False)
