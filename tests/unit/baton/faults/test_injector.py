"""Which fault strikes where: addresses, counts, windows, times, and the order of rules."""

from __future__ import annotations

from typing import Any

import pytest

from baton.faults.injector import Injector, Point, stable
from baton.faults.kinds import FaultKind, Layer
from baton.faults.plan import Plan, Rule

DROP = FaultKind.DROP


def injector(*rules: Rule, node: str = "prefill-0", role: str = "prefill", life: int = 1, **more: Any) -> Injector:
    return Injector(Plan(1, rules), node, role, life, **more)


def rule(**address: Any) -> Rule:
    return Rule(**{"layer": Layer.CONTROL, "fault": DROP, "probability": 1.0, **address})


def point(kind: str = "commit", peer: str = "decode-1", request: str = "r7/0/1") -> Point:
    return Point(Layer.CONTROL, kind, peer, request)


@pytest.mark.parametrize(
    ("address", "strikes"),
    [
        ({}, True),
        ({"layer": Layer.SESSION}, False),
        ({"kind": "commit"}, True),
        ({"kind": "begin"}, False),
        ({"kind": "*it"}, True),
        ({"node": "prefill-*"}, True),
        ({"node": "prefill"}, False),
        ({"node": "[dp]*-0"}, True),
        ({"role": "prefill"}, True),
        ({"role": "router"}, False),
        ({"life": 1}, True),
        ({"life": 2}, False),
        ({"peer": "decode-1"}, True),
        ({"peer": "decode-2"}, False),
        ({"request": "r7"}, True),
        ({"request": "r7/0/1"}, True),
        ({"request": "r?"}, True),
        ({"request": "r?/*/1"}, True),
        ({"request": "r7/0/2"}, False),
        ({"request": "r"}, False),
        ({"after_s": 3.0}, True),
        ({"until_s": 3.1}, True),
        ({"after_s": 3.1}, False),
        ({"until_s": 3.0}, False),
        ({"probability": 0.0}, False),
    ],
)
def test_a_rule_strikes_where_all_of_its_address_matches(address: dict[str, Any], strikes: bool) -> None:
    assert (injector(rule(**address)).decide(point(), 3.0) is not None) == strikes


def test_the_nth_is_of_one_kind_peer_and_request() -> None:
    one = injector(rule(nth=(2,), probability=None))
    asked = [point(), point(request="r8/0/1"), point("begin"), point(peer="decode-2"), point(), point(request="r8/0/1")]
    assert [(s.number, s.point.request) for p in asked if (s := one.decide(p, None))] == [(2, "r7/0/1"), (2, "r8/0/1")]


def test_what_a_router_adds_to_a_request_s_id_does_not_count() -> None:
    one = injector(rule(nth=(2,), probability=None, request="a~b"))
    assert one.decide(point(request="a~b~0123abcd/0/1"), None) is None
    found = one.decide(point(request="a~b~89efcdab/0/1"), None)
    assert found is not None
    assert found.point.request == "a~b/0/1"
    assert stable("x~0123abcd/0/1") == "x/0/1"
    assert stable("x/~0123abc/1") == "x/~0123abc/1"


def test_the_first_rule_that_strikes_counts() -> None:
    of_request = rule(request="r7", fault=FaultKind.STALL)
    assert injector(rule(), of_request).decide(point(), None).rule == 0  # type: ignore[union-attr]
    assert injector(of_request, rule()).decide(point(), None).rule == 0  # type: ignore[union-attr]
    assert injector(rule(probability=0.0), of_request, rule()).decide(point(), None).rule == 1  # type: ignore[union-attr]


def test_a_rule_strikes_so_many_times_in_a_process() -> None:
    one = injector(rule(times=2))
    assert [one.decide(point(request=f"r{i}"), None) is not None for i in range(4)] == [True, True, False, False]


def test_a_window_is_shut_while_times_do_not_count() -> None:
    one = injector(rule(until_s=9.0))
    assert one.decide(point(), None) is None
    assert one.decide(point(), 0.0) is not None


def tick() -> Point:
    return Point(Layer.PROCESS, "tick")


def timed(at_s: float) -> Rule:
    return Rule(Layer.PROCESS, FaultKind.DIE, at_s=at_s)


def test_a_time_is_the_first_point_from_then_on() -> None:
    one = injector(timed(0.25))
    assert [one.decide(tick(), at_s) is not None for at_s in (None, 0.1, 0.2, 0.31, 0.4)] == [
        False, False, False, True, False
    ]  # fmt: skip
    assert injector(timed(0.0)).decide(tick(), 0.0) is not None


def test_a_process_that_began_later_does_not_meet_an_earlier_time() -> None:
    one = injector(timed(12.0), timed(30.0), life=2, began_s=13.5)
    assert [one.decide(tick(), at_s) is not None for at_s in (13.6, 29.0, 30.05)] == [False, False, True]


def test_draws_have_the_share_that_the_rule_says() -> None:
    one = injector(rule(probability=0.3, seconds=(1.0, 2.0)))
    found = [one.decide(point(request=f"r{i}/0/1"), None) for i in range(2000)]
    strikes = [strike for strike in found if strike]
    assert 520 < len(strikes) < 680
    assert {strike.seconds < 1.5 for strike in strikes} == {True, False}
    assert all(1.0 <= strike.seconds <= 2.0 for strike in strikes)


def test_where_a_request_runs_changes_nothing_and_its_node_does_where_there_is_none() -> None:
    rules = [rule(probability=0.5), Rule(Layer.ENGINE, FaultKind.SLOW, probability=0.5, seconds=(0.1, 0.1))]

    def drawn(node: str, peer: str, life: int) -> tuple[list[bool], list[bool]]:
        one = injector(*rules, node=node, life=life)
        return (
            [one.decide(point(peer=peer, request=f"r{i}"), None) is not None for i in range(64)],
            [one.decide(Point(Layer.ENGINE, "step"), None) is not None for _ in range(64)],
        )

    first, other = drawn("prefill-0", "decode-0", 1), drawn("prefill-1", "decode-1", 1)
    reborn = drawn("prefill-0", "decode-0", 2)
    assert first[0] == other[0] == reborn[0]
    assert first[1] != other[1]
    assert first[1] != reborn[1]
    assert first == drawn("prefill-0", "decode-0", 1)


def test_another_seed_draws_other_faults() -> None:
    def drawn(seed: int) -> list[bool]:
        one = Injector(Plan(seed, (rule(probability=0.5),)), "n", "mixed")
        return [one.decide(point(request=f"r{i}"), None) is not None for i in range(64)]

    assert drawn(1) != drawn(2)


def test_counts_are_bounded() -> None:
    one = injector(rule(nth=(1,), probability=None))
    for i in range(70_000):
        one.decide(point(request=f"r{i}"), None)
    assert len(one._counts) == 65_536
