"""The router's queue by turns: no client starves, each is served in order, and the books balance."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.cluster.waiting import Waiting

MAX_RUNNING = 3
MAX_WAIT_S = 30.0
CLIENTS = ("a", "b", "c")


@dataclass(frozen=True)
class Item:
    client: str
    number: int


class Turns(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.waiting: Waiting[Item] = Waiting(alone_s=10.0, max_priority_wait_s=MAX_WAIT_S)
        self.now = 0.0
        self.num_made = 0
        # Whether it has run already (-1), its priority, and when it came.
        self.came: dict[Item, tuple[int, int, float]] = {}
        # What should be there: by client, in order of coming.
        self.queued: dict[str, list[Item]] = {client: [] for client in CLIENTS}
        self.running: dict[str, int] = dict.fromkeys(CLIENTS, 0)
        # How often others were served since a client's head could have been.
        self.passed_over: dict[str, int] = dict.fromkeys(CLIENTS, 0)
        # Sequences of each that went before their turn, which its next turns pay for.
        self.num_early: dict[str, int] = dict.fromkeys(CLIENTS, 0)

    @rule(client=st.sampled_from(CLIENTS), priority=st.integers(-2, 2), is_first=st.booleans())
    def put(self, client: str, priority: int, is_first: bool) -> None:
        self.num_made += 1
        item = Item(client, self.num_made)
        self.came[item] = -1 if is_first else 0, priority, self.now
        if is_first:  # a rerun has a right of its own
            self.waiting.put_first(item, self.now)
            self.queued[client].insert(0, item)
            self.passed_over = dict.fromkeys(CLIENTS, 0)
        else:
            self.waiting.put(item, priority, self.now)
            self.queued[client].append(item)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def place(self) -> None:
        item = self.waiting.next(MAX_RUNNING, self.now)
        able = [c for c in CLIENTS if self.queued[c] and self.running[c] < MAX_RUNNING]
        if item is None:
            assert not able
            return
        assert item == self.head_of(item.client)
        others = [c for c in CLIENTS if c != item.client and (self.queued[c] or self.running[c])]
        assert item.client in able or not any(self.running[c] for c in others)
        self.waiting.started(item, 1.0)
        self.queued[item.client].remove(item)
        self.running[item.client] += 1
        self.num_early[item.client] += self.came[item][0] == -1
        for client in CLIENTS:
            if client == item.client or client not in able:
                self.passed_over[client] = 0
            else:
                self.passed_over[client] += 1
                # Each of the others may have a turn, and one more for each that went early.
                bound = (len(CLIENTS) - 1) * (1 + self.num_early[client])
                assert self.passed_over[client] <= bound, "a client that could run was passed over too often"

    def head_of(self, client: str) -> Item:
        """What ran already, then what has waited for too long, then the best priority; each in the order it came."""
        here = self.queued[client]
        late = [i for i in here if self.came[i][0] == 0 and self.came[i][2] <= self.now - MAX_WAIT_S]
        again = [i for i in here if self.came[i][0] == -1]
        return (again or late or sorted(here, key=lambda i: self.came[i][1]))[0]

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from([c for c in CLIENTS if self.running[c]]))
        self.waiting.ended(client, self.now)
        self.running[client] -= 1

    @precondition(lambda self: any(self.queued.values()))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from([i for items in self.queued.values() for i in items]))
        self.waiting.remove(item)
        self.queued[item.client].remove(item)

    @invariant()
    def books_balance(self) -> None:
        self.waiting.check()
        assert len(self.waiting) == sum(map(len, self.queued.values()))
        for client in CLIENTS:
            assert self.waiting.num_waiting_of(client) == len(self.queued[client])
            assert self.waiting.num_running_of(client) == self.running[client]


TestTurns = Turns.TestCase


@given(st.integers(1, 50))
def test_one_client_alone_has_everything_and_shares_when_another_comes(num: int) -> None:
    waiting: Waiting[Item] = Waiting(alone_s=10.0, max_priority_wait_s=MAX_WAIT_S)
    for i in range(num + 20):
        waiting.put(Item("greedy", i), 0, 0.0)
    for i in range(num):
        item = waiting.next(MAX_RUNNING, 0.0)
        assert item == Item("greedy", i)
        waiting.started(item, 1.0)
    assert waiting.crowding("greedy", MAX_RUNNING) == ("", 0)
    waiting.put(Item("polite", 0), 0, 1.0)
    assert waiting.crowding("polite", MAX_RUNNING) == ("greedy", max(0, num - MAX_RUNNING))
    started = []
    while (item := waiting.next(MAX_RUNNING, 1.0)) is not None:
        waiting.started(item, 1.0)
        started.append(item.client)
    assert started.count("polite") == 1
    assert started.count("greedy") == max(0, MAX_RUNNING - num)
    waiting.ended("polite", 2.0)
    for _ in range(num):
        waiting.ended("greedy", 2.0)
    assert waiting.next(MAX_RUNNING, 11.0 + 2.0) is not None


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.integers(1, 5))
def test_nothing_is_passed_over_for_better_priorities_for_longer_than_the_bound(ours: list[int], every_s: int) -> None:
    """Better ones come for ever, one for each that starts."""
    waiting: Waiting[Item] = Waiting(alone_s=10.0, max_priority_wait_s=MAX_WAIT_S)
    for i, priority in enumerate(ours):
        waiting.put(Item("a", i), priority, 0.0)
    now, left = 0.0, set(range(len(ours)))
    while left:
        waiting.put(Item("a", 1000), -9, now) if Item("a", 1000) not in waiting else None
        item = waiting.next(1 << 20, now)
        assert item is not None
        waiting.started(item, 1.0)
        left.discard(item.number)
        now += every_s
        # Once it is late, an item waits for those that came before it, and for none that came after.
        assert now <= MAX_WAIT_S + every_s * (len(ours) + 1)
