"""The policy in simulated time: nodes of different speed, roles under bursts and under a constant load."""

from __future__ import annotations

from collections import Counter

import pytest

from baton.types import Role
from bench.policy import Simulation, Traffic, disaggregation, heterogeneous
from router.cluster.config import PolicyConfig

TWO_AND_TWO = {Role.PREFILL: 2, Role.DECODE: 2}


@pytest.mark.parametrize("slow", ["prefill-0", "decode-0", "mixed-0"])
def test_a_slow_node_gets_less_and_the_slowest_requests_get_faster(slow: str) -> None:
    unknown, measured = (heterogeneous(slow, knows_speed, 300.0) for knows_speed in (False, True))
    assert measured["its share of work"] < 0.6 * unknown["its share of work"]
    assert measured["its share of work"] < measured["share by its speed"]
    assert measured["e2e p99 s"] < 0.7 * unknown["e2e p99 s"]
    assert measured["e2e p50 s"] < 1.15 * unknown["e2e p50 s"]


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_with_a_target_conditional_disaggregation_is_as_fast_as_mixed_nodes(
    rate: float,
) -> None:
    split, conditional, whole = (disaggregation(mode, rate, 0.1, 1000.0) for mode in ("always", "auto", "never"))
    assert conditional["ttft p99 s"] < 0.6 * split["ttft p99 s"]
    assert conditional["ttft p99 s"] < 1.2 * whole["ttft p99 s"]
    assert conditional["e2e p99 s"] < 1.05 * min(split["e2e p99 s"], whole["e2e p99 s"])
    assert conditional["gap p99 ms"] <= 110
    assert 0.1 < conditional["whole"] < 0.9


def test_pools_borrow_under_bursts_and_go_home() -> None:
    """Prompts for 20 s, then for 20 s short prompts with long answers, then little."""
    traffic = [Traffic(4.0, 1000, 4, 5.0, 25.0), Traffic(6.0, 30, 300, 60.0, 80.0), Traffic(0.2, 100, 20, 0.0, 200.0)]
    simulation = Simulation(TWO_AND_TWO, traffic)
    simulation.run()
    assert all(x.ended_s is not None for x in simulation.requests), "a request waits for ever"
    borrowed = {(node_id[0], at_s < 55) for at_s, node_id, role in simulation.role_changes if role == "mixed"}
    assert borrowed >= {("d", True), ("p", False)}, "decode nodes take prompts, and prefill nodes then keep sequences"
    first = next(node_id for _, node_id, role in simulation.role_changes if role == "mixed")
    assert first.startswith("decode-")
    # A pool is lent for a burst, not for each of its requests.
    assert max(Counter(node_id for _, node_id, _ in simulation.role_changes).values()) <= 12
    for node in simulation.nodes.values():
        assert node.roles.acting is node.roles.home
    assert not [role for _, _, role in simulation.role_changes if role.endswith("*")], "no burst changes a home pool"


@pytest.mark.parametrize(
    ("prompt", "output", "rate", "homes"),
    [(1500, 8, 0.9, {"prefill": 3, "decode": 1}), (30, 400, 2.5, {"prefill": 1, "decode": 3}), (300, 150, 1.2, None)],
)
def test_home_pools_follow_a_load_that_stays_and_settle(
    prompt: int, output: int, rate: float, homes: dict[str, int] | None
) -> None:
    policy = PolicyConfig(disaggregation="always")
    simulation = Simulation(TWO_AND_TWO, [Traffic(rate, prompt, output, 0.0, 1800.0)], policy=policy)
    simulation.run()
    assert all(x.ended_s is not None for x in simulation.requests), "a request waits for ever"
    changes = [x for x in simulation.role_changes if x[2].endswith("*")]
    found = Counter(node.roles.home.value for node in simulation.nodes.values())
    assert found == (homes or {"prefill": 2, "decode": 2}), changes
    assert len(changes) == (homes is not None)
