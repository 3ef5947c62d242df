"""Schedules that `baton chaos` draws: the same for one seed, of every kind, and never both nodes of a pool at once."""

from __future__ import annotations

from itertools import pairwise

from baton.faults.kinds import FaultKind, Layer
from baton.faults.plan import Plan
from cli.chaos.draw import _SPACING_S, drawn

NODES = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode", "router": "router"}


def test_one_seed_one_schedule_that_a_file_holds() -> None:
    plan = drawn(7, NODES, 60.0, has_registry=False)
    assert plan == drawn(7, NODES, 60.0, has_registry=False)
    assert plan != drawn(8, NODES, 60.0, has_registry=False)
    assert Plan.parse(plan.as_toml(), "schedule.toml") == plan


def test_about_one_fault_a_second_of_every_layer() -> None:
    plan = drawn(1, NODES, 1800.0, has_registry=True)
    assert 1100 < len(plan.rules) < 1900
    assert {rule.layer for rule in plan.rules} == set(Layer)
    assert {rule.fault for rule in plan.rules} == set(FaultKind)
    assert {rule.node for rule in plan.rules} == set(NODES)
    assert not [rule for rule in drawn(1, NODES, 600.0, has_registry=False).rules if rule.layer is Layer.REGISTRY]


def test_faults_lie_in_the_time_and_are_few_if_few_are_wanted() -> None:
    plan = drawn(3, NODES, 100.0, rate=0.1, has_registry=False)
    assert 2 <= len(plan.rules) <= 20
    assert all(0 < (rule.at_s or rule.after_s) < 100.0 for rule in plan.rules)


def test_nodes_of_a_pool_are_taken_away_one_after_the_other() -> None:
    for seed in range(20):
        rules = [r for r in drawn(seed, NODES, 600.0, has_registry=False).rules if r.layer is Layer.PROCESS]
        for role in ("prefill", "decode"):
            times = [r.at_s for r in rules if NODES[r.node] == role and r.at_s is not None]
            assert all(b - a >= _SPACING_S for a, b in pairwise(times))
        assert [r for r in rules if r.node == "router" and r.fault is FaultKind.DIE]


def test_the_only_node_of_a_pool_is_never_taken_away() -> None:
    plan = drawn(2, {"prefill-0": "prefill", "decode-0": "decode", "router": "router"}, 600.0, has_registry=False)
    assert {rule.node for rule in plan.rules if rule.layer is Layer.PROCESS} <= {"router"}
