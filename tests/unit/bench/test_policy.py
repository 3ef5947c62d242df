"""The policy in simulated time: nodes of different speed, roles under bursts and under a constant load."""

from __future__ import annotations

from collections import Counter

import pytest

from baton.types import Role
from bench.policy import Traffic, disaggregation, heterogeneous, simulated
from router.cluster.config import PolicyConfig

TWO_AND_TWO = {Role.PREFILL: 2, Role.DECODE: 2}


@pytest.mark.parametrize("slow", Role)
def test_a_slow_node_gets_less_and_the_slowest_requests_get_faster(slow: Role) -> None:
    unknown, measured = (heterogeneous(slow, knows_speed, 300.0) for knows_speed in (False, True))
    assert measured["its share of work"] < 0.6 * unknown["its share of work"]
    assert measured["its share of work"] < measured["share by its speed"]
    assert measured["e2e p99 s"] < 0.7 * unknown["e2e p99 s"]
    assert measured["e2e p50 s"] < 1.15 * unknown["e2e p50 s"]


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_with_a_target_conditional_disaggregation_is_as_fast_as_mixed_nodes(
    rate: float,
) -> None:
    # The 99th percentile is of ten requests at least.
    split, conditional, whole = (disaggregation(mode, rate, 0.1, 4000.0) for mode in ("always", "auto", "never"))
    assert conditional["ttft p99 s"] < 0.6 * split["ttft p99 s"]
    assert conditional["ttft p99 s"] < 1.2 * whole["ttft p99 s"]
    assert conditional["e2e p99 s"] < 1.05 * min(split["e2e p99 s"], whole["e2e p99 s"])
    assert conditional["gap p99 ms"] <= 110
    assert 0.1 < conditional["whole"] < 0.9


def test_pools_borrow_under_bursts_and_go_home() -> None:
    """Prompts for 20 s, then for 20 s short prompts with long answers, then little."""
    traffic = [Traffic(4.0, 1000, 4, 5.0, 25.0), Traffic(6.0, 30, 300, 60.0, 80.0), Traffic(0.2, 100, 20, 0.0, 200.0)]
    found = simulated(TWO_AND_TWO, traffic)
    changes = found.role_changes
    borrowed = {(x.machine[0], x.at_s < 55) for x in changes if x.reason == "borrowed"}
    assert borrowed >= {("d", True), ("p", False)}, "decode nodes take prompts, and prefill nodes then keep sequences"
    assert next(x.machine for x in changes if x.reason == "borrowed").startswith("decode-")
    # A pool is lent for a burst, not for each of its requests.
    assert max(Counter(x.machine for x in changes).values()) <= 12
    for name in {x.machine for x in changes}:
        assert [x.reason for x in changes if x.machine == name][-1] == "returned"
    assert {x.reason for x in changes} == {"borrowed", "returned"}, "no burst changes a home pool"


@pytest.mark.parametrize(
    ("prompt", "output", "rate", "homes"),
    [(1500, 8, 0.9, {"prefill": 3, "decode": 1}), (30, 400, 2.5, {"prefill": 1, "decode": 3}), (300, 150, 1.2, None)],
)
def test_home_pools_follow_a_load_that_stays_and_settle(
    prompt: int, output: int, rate: float, homes: dict[str, int] | None
) -> None:
    policy = PolicyConfig(disaggregation="always")
    found = simulated(TWO_AND_TWO, [Traffic(rate, prompt, output, 0.0, 1800.0)], policy=policy)
    changes = [x for x in found.role_changes if x.reason == "scheduler"]
    pools = {f"{role.value}-{number}": role.value for role in TWO_AND_TWO for number in range(2)}
    pools |= {x.machine: x.role.value for x in changes}
    assert Counter(pools.values()) == (homes or {"prefill": 2, "decode": 2}), changes
    assert len(changes) == (homes is not None)
