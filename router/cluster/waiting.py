"""The waiting line: clients take turns by what they have had, and the sequences of each are placed by priority, equal
ones in the order they came. Pure.

While several clients have work, none of them has all nodes: a batch that is full of one client's sequences makes every
step slow for all clients, in whatever order they wait.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from router.cluster.shares import Shares


class _Waiting(Protocol):
    @property
    def client(self) -> str: ...


ItemT = TypeVar("ItemT", bound=_Waiting)


# Those that are out of turn go first, then the least tag, then the client that has waited for longest.
_Turn = tuple[bool, float, int, str]


class _Queue(Generic[ItemT]):
    """What one client has waiting.

    Invariant: every item is in ``_again``, or in ``_came`` and under its priority in ``_of``.
    """

    __slots__ = ("_again", "_came", "_of", "_priorities", "is_next", "turn")

    def __init__(self) -> None:
        # Its place among the clients; out of turn if something here is to run again that has not been waiting so far.
        self.turn: _Turn | None = None
        self.is_next = False
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
        self.is_next = True
        self._again[item] = None
        self._again.move_to_end(item, last=False)

    def remove(self, item: ItemT) -> None:
        if item in self._again:
            del self._again[item]
            self.is_next = self.is_next and bool(self._again)
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

    Invariant: every client with something waiting is in ``_queues``, and in ``_turns`` once.
    """

    def __init__(
        self, *, alone_s: float, max_priority_wait_s: float, weights: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        # A client is alone when no other has had anything here for so long.
        self._alone_s = alone_s
        # A sequence is passed over for better priorities for so long at most.
        self._max_priority_wait_s = max_priority_wait_s
        self._shares = Shares(weights)
        self._queues: dict[str, _Queue[ItemT]] = {}
        # The next one first.
        self._turns: list[_Turn] = []
        self._num_turns = 0
        # Clients that were passed over since they had too many on the nodes.
        self._passed: set[str] = set()
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
        """How many leave before a new one would, as clients take turns by weight."""
        queue = self._queues.get(client)
        own = 0 if queue is None else queue.num_before(priority)
        turns = (own + 1) / self._shares.weight(client)
        others = ((len(q), math.ceil(turns * self._shares.weight(x))) for x, q in self._queues.items() if x != client)
        return own + sum(map(min, others))

    def put(self, item: ItemT, priority: int, now: float) -> None:
        self._queue(item.client, now).put(item, priority, now)
        self._set_turn(item.client)

    def put_first(self, item: ItemT, now: float) -> None:
        """It has run already, and goes before all that its client has here, and its client before others."""
        self._queue(item.client, now).put_first(item)
        self._set_turn(item.client)

    def _queue(self, client: str, now: float) -> _Queue[ItemT]:
        """For one more."""
        self._seen(client, now)
        self._num_waiting += 1
        if client not in self._queues:
            self._shares.comes(client, self._queues)
            self._queues[client] = _Queue()
        return self._queues[client]

    def _set_turn(self, client: str, *, is_over: bool = False) -> None:
        """After what it depends on has changed. ``is_over``: it had its turn, and is the last of its equals."""
        queue = self._queues[client]
        if queue.turn is None or is_over:
            self._num_turns += 1
        number = self._num_turns if queue.turn is None or is_over else queue.turn[2]
        self._remove_turn(queue)
        queue.turn = not queue.is_next, self._shares.tag(client), number, client
        insort(self._turns, queue.turn)

    def _remove_turn(self, queue: _Queue[ItemT]) -> None:
        if queue.turn is not None:
            del self._turns[bisect_left(self._turns, queue.turn)]

    def remove(self, item: ItemT) -> None:
        queue = self._queues[item.client]
        queue.remove(item)
        self._num_waiting -= 1
        if len(queue):
            self._set_turn(item.client)
        else:
            self._remove_turn(queue)
            del self._queues[item.client]
            self._passed.discard(item.client)

    def next(self, max_running: int, now: float) -> ItemT | None:
        """The sequence whose turn it is; None if none may start. A client with ``max_running`` times its weight on the
        nodes is passed over, unless no other client has anything here."""
        for _, _, _, client in self._turns:
            has_room = self._num_running.get(client, 0) < self._max_running(client, max_running)
            if has_room or self.is_alone(client, now):
                return self._queues[client].head(now - self._max_priority_wait_s)
            self._passed.add(client)
        return None

    def _max_running(self, client: str, max_running: int) -> int:
        return max(1, round(max_running * self._shares.weight(client)))

    def started(self, item: ItemT, work: float) -> None:
        """It leaves for the nodes, to do so much work there, and its client's turn is over."""
        client = item.client
        queue = self._queues[client]
        # Out of turn: those with a smaller tag are still next.
        others = [x for x in self._queues if x != client] if queue.is_next else ()
        queue.is_next = False
        self._shares.takes_turn(client, others)
        self._shares.gets(client, work)
        self.remove(item)
        self._num_running[client] = self._num_running.get(client, 0) + 1
        if client in self._queues:
            self._set_turn(client, is_over=True)

    def got(self, client: str, work: float) -> None:
        """So much more work than was said when it started; less than 0: it was less."""
        self._shares.gets(client, work)
        if client in self._queues:
            self._set_turn(client)

    def ended(self, client: str, now: float) -> None:
        """The nodes have one sequence less of it."""
        self._seen(client, now)
        left = self._num_running[client] - 1
        if left:
            self._num_running[client] = left
        else:
            del self._num_running[client]
        if client in self._passed:
            # While it could not have used its turns it saved none up.
            self._passed.discard(client)
            self._shares.comes(client, self._queues)
            self._set_turn(client)

    def crowding(self, newcomer: str, max_running: int) -> tuple[str, int]:
        """The client beside ``newcomer`` that has most too many sequences on the nodes, and how many."""
        others = (
            (num - self._max_running(client, max_running), client)
            for client, num in self._num_running.items()
            if client != newcomer
        )
        num, client = max(others, default=(0, ""))
        return client, max(0, num)

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
        for client, queue in self._queues.items():
            queue.check()
            assert queue.turn is not None
            assert queue.turn[:2] == (not queue.is_next, self._shares.tag(client))
        assert sorted(q.turn for q in self._queues.values() if q.turn is not None) == self._turns
        assert self._passed <= set(self._queues)
        assert all(n > 0 for n in self._num_running.values())

    def _seen(self, client: str, now: float) -> None:
        self._last[client] = now
        self._last.move_to_end(client)
        if len(self._last) > 2:
            self._last.popitem(last=False)
