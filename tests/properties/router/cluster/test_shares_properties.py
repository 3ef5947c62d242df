"""Clients that always have work waiting get it by their weights, and nobody waits for ever."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from router.cluster.shares import Shares
from router.cluster.waiting import Waiting

WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 10.0])
WORK = st.integers(1, 5000)
MANY = 1 << 20


@dataclass(frozen=True)
class Item:
    client: str
    number: int
    work: int


def line_of(weights: dict[str, float]) -> Waiting[Item]:
    return Waiting(alone_s=10.0, max_priority_wait_s=30.0, weights=weights)


@given(st.lists(st.tuples(WEIGHTS, WORK), min_size=2, max_size=6), st.integers(0, 1 << 30))
def test_what_clients_get_by_weight_differs_by_one_piece_of_work_of_each(
    clients: list[tuple[float, int]], seed: int
) -> None:
    """Whatever the sizes of their work: the bound of start-time fair queueing, at every moment."""
    rng = random.Random(seed)
    weights = {f"c{i}": weight for i, (weight, _) in enumerate(clients)}
    most = {f"c{i}": work for i, (_, work) in enumerate(clients)}
    line, number = line_of(weights), 0
    for client in weights:
        line.put(Item(client, number := number + 1, rng.randint(1, most[client])), 0, 0.0)
    got = dict.fromkeys(weights, 0)
    for _ in range(300):
        item = line.next(MANY, 0.0)
        assert item is not None
        # The next one first: it never has nothing waiting.
        line.put(Item(item.client, number := number + 1, rng.randint(1, most[item.client])), 0, 0.0)
        line.started(item, item.work)
        got[item.client] += item.work
        by_weight = {client: got[client] / weights[client] for client in weights}
        for a in weights:
            for b in weights:
                bound = most[a] / weights[a] + most[b] / weights[b]
                assert by_weight[a] - by_weight[b] <= bound + 1e-6


@given(st.lists(st.tuples(WEIGHTS, WORK), min_size=2, max_size=5), st.integers(0, 1 << 30), st.integers(1, 8))
def test_shares_converge_although_the_work_is_known_only_at_the_end(
    clients: list[tuple[float, int]], seed: int, num_slots: int
) -> None:
    """What is expected is wrong by up to three times; what was wrong is made good when a sequence ends."""
    rng = random.Random(seed)
    weights = {f"c{i}": weight for i, (weight, _) in enumerate(clients)}
    most = {f"c{i}": work for i, (_, work) in enumerate(clients)}
    line, number = line_of(weights), 0
    got: dict[str, float] = dict.fromkeys(weights, 0.0)
    running: list[tuple[Item, float]] = []
    for client in weights:
        for _ in range(2):
            line.put(Item(client, number := number + 1, rng.randint(1, most[client])), 0, 0.0)
    for _ in range(500):
        while len(running) < num_slots:
            item = line.next(MANY, 0.0)
            assert item is not None
            line.put(Item(item.client, number := number + 1, rng.randint(1, most[item.client])), 0, 0.0)
            expected = item.work * rng.uniform(1 / 3, 3)
            line.started(item, expected)
            running.append((item, expected))
        item, expected = running.pop(rng.randrange(len(running)))
        line.got(item.client, item.work - expected)
        line.ended(item.client, 0.0)
        got[item.client] += item.work
        line.check()
    by_weight = {client: got[client] / weights[client] for client in weights}
    # Besides the bound above: what runs is not counted in ``got``, and was expected wrongly.
    slack = {client: most[client] * (1 + 3 * num_slots) / weights[client] for client in weights}
    for a in weights:
        for b in weights:
            assert by_weight[a] - by_weight[b] <= slack[a] + slack[b]


@given(st.lists(WORK, min_size=1, max_size=20), WEIGHTS)
def test_nobody_saves_up_turns_and_nobody_pays_for_nodes_that_were_free(works: list[int], weight: float) -> None:
    """One client had everything for long; the other comes, and from then on both are equal."""
    line = line_of({"late": weight, "early": weight})
    for number, work in enumerate(works):
        line.put(Item("early", number, work), 0, 0.0)
        item = line.next(MANY, 0.0)
        assert item is not None
        line.started(item, item.work)
    for number in range(100):
        line.put(Item("early", 1000 + number, 10), 0, 0.0)
        line.put(Item("late", 1000 + number, 10), 0, 0.0)
    order = []
    for _ in range(100):
        item = line.next(MANY, 0.0)
        assert item is not None
        line.started(item, item.work)
        order.append(item.client)
    # The early one still has the work of its last sequence to its account, and no more.
    assert order.count("late") - order.count("early") <= max(works) / 10 + 2
    assert order.count("early") - order.count("late") <= 2


@given(st.integers(1, 100), st.integers(1, 20))
def test_a_client_that_could_not_use_its_turns_has_none_saved_up(num_others: int, work: int) -> None:
    """It has as many on the nodes as it may while the other is served; once they end, both take turns."""
    line = line_of({})
    for number in range(300):
        line.put(Item("full", number, work), 0, 0.0)
        line.put(Item("other", number, work), 0, 0.0)
    num_full = 0
    while num_full < 2 or num_others:
        item = line.next(2, 0.0)
        assert item is not None
        line.started(item, item.work)
        if item.client == "full":
            num_full += 1
        else:
            num_others -= num_full == 2
            line.ended("other", 0.0)
    line.ended("full", 0.0)
    line.ended("full", 0.0)
    order = []
    for _ in range(20):
        item = line.next(2, 0.0)
        assert item is not None
        line.started(item, item.work)
        line.ended(item.client, 0.0)
        order.append(item.client)
    assert abs(order.count("full") - order.count("other")) <= 2
    line.check()


def test_clients_that_are_away_are_forgotten_at_some_time() -> None:
    shares = Shares({})
    for number in range(10_000):
        shares.comes(f"c{number}", ())
        shares.gets(f"c{number}", 100.0)
    assert shares.num_remembered <= 4097
    assert shares.tag("c9999") == 100.0
