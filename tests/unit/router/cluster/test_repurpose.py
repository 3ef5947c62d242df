"""When a node changes pools: tables of states, and what holds under any constant load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role, StepTimes
from router.cluster.config import PolicyConfig
from router.cluster.load import NodeLoad
from router.cluster.pools import Pools
from router.cluster.rates import Rates
from router.cluster.repurpose import Change, Repurpose

CONFIG = PolicyConfig()
TIMES = StepTimes(0.02, 1e-3, 5e-4, 5e-7)
OUTPUT_TOKENS = 100
HOUR_S = 3600.0


class Cluster:
    """Nodes whose statuses say what a load makes of them. A node obeys, as `worker.roles` does."""

    def __init__(self, num_prefill: int, num_decode: int, *, pinned: tuple[str, ...] = (), num_mixed: int = 0) -> None:
        self.rates = Rates(CONFIG)
        self.homes = {f"p{i}": Role.PREFILL for i in range(num_prefill)}
        self.homes |= {f"d{i}": Role.DECODE for i in range(num_decode)}
        self.homes |= {f"m{i}": Role.MIXED for i in range(num_mixed)}
        self.pinned = pinned
        self.pools = Pools()
        self.loads: dict[str, NodeLoad] = {}

    def num(self, role: Role) -> int:
        return sum(home is role for home in self.homes.values())

    def tell(self, prompt_tokens: int, running: int, free: int = 900) -> None:
        """The load of every node of each pool."""
        for node_id, home in self.homes.items():
            is_prefill = home is Role.PREFILL
            status = NodeStatus(
                home, total_blocks=1000, free_blocks=1000 if is_prefill else free,
                queued_prompt_tokens=prompt_tokens if is_prefill else 0,
                num_running=0 if is_prefill else running, running_tokens=0 if is_prefill else 1000 * running,
                step_times=TIMES, is_pinned=node_id in self.pinned,
            )  # fmt: skip
            if node_id not in self.loads:
                self.loads[node_id] = NodeLoad(description(node_id, home), status, self.rates)
            self.loads[node_id].hear(status)
            self.pools.put(self.loads[node_id])

    def obey(self, change: Change) -> None:
        assert self.homes[change.node_id] is change.expected
        self.homes[change.node_id] = change.role


def description(node_id: str, home: Role) -> NodeDescription:
    return NodeDescription(
        node_id, 1, home, "a:1", ModelDescription("m", "f", "float32", 100, 10),
        KvLayout(1, 1000, 1, 8, 16, "float32"), 1, 1, "h", (), "cpu", "none", "0",
    )  # fmt: skip


def changes(
    cluster: Cluster,
    load: Callable[[Cluster], tuple[int, int]],
    seconds: float,
    *,
    config: PolicyConfig = CONFIG,
    start_s: float = 0.0,
    machine: Repurpose | None = None,
) -> list[tuple[float, str]]:
    """The changes that come in so many seconds of a load."""
    machine = machine or Repurpose(config)
    found = []
    told = None
    for second in range(0, int(seconds), 5):
        now = start_s + second
        if cluster.homes != told:
            told = dict(cluster.homes)
            cluster.tell(*load(cluster))
        change = machine.look(cluster.pools, OUTPUT_TOKENS, now)
        if change is not None:
            found.append((now, f"{change.node_id} {change.role.value}"))
            cluster.obey(change)
        for role in (Role.PREFILL, Role.DECODE):
            assert cluster.num(role) >= max(1, config.min_pool_nodes)
    return found


@pytest.mark.parametrize(
    ("nodes", "prompt_tokens", "running", "free", "pinned", "expected"),
    [
        # Prompts wait for 5 s, decodes lose 0.3 s: a node of the token pool changes.
        ((2, 2), 5000, 2, 900, (), "d0 prefill"),
        # Prompts do not wait, and a sequence takes twice as long as alone.
        ((2, 2), 0, 32, 900, (), "p0 decode"),
        # Half a second is no pressure.
        ((2, 2), 700, 0, 900, (), None),
        # Both are behind: no change helps.
        ((2, 2), 5000, 30, 900, (), None),
        # The last node of a pool stays.
        ((2, 1), 5000, 0, 900, (), None),
        # An operator's node stays.
        ((2, 2), 5000, 2, 900, ("d0",), "d1 prefill"),
        ((2, 2), 5000, 2, 900, ("d0", "d1"), None),
        # The token pool's blocks are in use: one node less would have no room.
        ((2, 2), 5000, 2, 500, (), None),
        # Its blocks are gone: sequences wait for others to end.
        ((2, 2), 0, 4, 10, (), "p0 decode"),
    ],
)
def test_a_node_changes_pools_when_one_is_behind_for_long_and_the_other_has_slack(
    nodes: tuple[int, int], prompt_tokens: int, running: int, free: int, pinned: tuple[str, ...], expected: str | None
) -> None:
    cluster = Cluster(*nodes, pinned=pinned, num_mixed=1)
    machine = Repurpose(CONFIG)
    assert CONFIG.repurpose_after_s is not None
    found = []
    for second in range(int(CONFIG.repurpose_after_s) + 20):
        cluster.tell(prompt_tokens, running, free)
        change = machine.look(cluster.pools, OUTPUT_TOKENS, float(second))
        if change is not None:
            assert second >= CONFIG.repurpose_after_s, "not before it has been so for long"
            found.append(f"{change.node_id} {change.role.value}")
            cluster.obey(change)
    assert found == ([] if expected is None else [expected])


def test_a_burst_changes_nothing() -> None:
    cluster, machine = Cluster(2, 2), Repurpose(CONFIG)
    for start_s in (0.0, 300.0):
        assert not changes(cluster, lambda _: (9000, 0), 40, start_s=start_s, machine=machine)
        assert not changes(cluster, lambda _: (0, 0), 260, start_s=start_s + 40, machine=machine)


def test_0_turns_it_off() -> None:
    assert not changes(Cluster(2, 2), lambda _: (9000, 0), HOUR_S, config=replace(CONFIG, repurpose_after_s=None))


def test_a_node_that_is_lent_already_is_the_one_that_changes() -> None:
    cluster, machine = Cluster(2, 3), Repurpose(CONFIG)
    for second in range(100):
        cluster.tell(9000, 0)
        lent = cluster.loads["d1"]
        lent.hear(replace(lent.status, role=Role.MIXED, home=Role.DECODE))
        cluster.pools.put(lent)
        change = machine.look(cluster.pools, OUTPUT_TOKENS, float(second))
        if change is not None:
            assert change.node_id == "d1"
            return
    pytest.fail("no change")


def test_two_routers_see_each_others_changes() -> None:
    """The second one asks for the same node at the same time, or waits as if the change had been its own."""
    cluster, machines = Cluster(2, 3), [Repurpose(CONFIG), Repurpose(CONFIG)]
    asked = []
    for half in range(600):
        now = half / 2
        cluster.tell(9000, 0)
        change = machines[half % 2].look(cluster.pools, OUTPUT_TOKENS, now)
        if change is not None:
            asked.append((now, change.node_id))
            if cluster.homes[change.node_id] is change.expected:  # else the node refuses
                cluster.obey(change)
    assert list(dict.fromkeys(node_id for _, node_id in asked)) == ["d0", "d1"]
    assert len(asked) <= 4
    assert asked[-1][0] - asked[0][0] >= (CONFIG.repurpose_after_s or 0)


def test_a_load_that_shifts_with_the_day_is_followed_every_day() -> None:
    cluster, machine = Cluster(3, 3), Repurpose(CONFIG)
    for day in range(6):
        start_s = day * 24 * HOUR_S
        morning = changes(
            cluster, lambda c: (9000 // c.num(Role.PREFILL) ** 2, 0), HOUR_S, start_s=start_s, machine=machine
        )
        assert cluster.num(Role.PREFILL) > 3, morning
        changes(
            cluster, lambda c: (0, 300 // c.num(Role.DECODE) ** 2), HOUR_S, start_s=start_s + HOUR_S, machine=machine
        )
        assert cluster.num(Role.DECODE) > 3
        start_s += 2 * HOUR_S
        while cluster.num(Role.PREFILL) < 3:
            cluster.homes[next(x for x, home in cluster.homes.items() if home is Role.DECODE)] = Role.PREFILL


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 8), st.floats(0, 8), st.sampled_from([1, 2]), st.booleans())
def test_under_a_constant_load_changes_are_few_and_no_pool_falls_below_its_minimum(
    num_prefill: int, num_decode: int, prompt_load: float, token_load: float, min_pool_nodes: int, is_steep: bool
) -> None:
    """A load of 1 is what one node can do. Queues that are short, or grow without end, are the hardest to balance."""
    config = replace(CONFIG, min_pool_nodes=min_pool_nodes)

    def load(cluster: Cluster) -> tuple[int, int]:
        num_p, num_d = cluster.num(Role.PREFILL), cluster.num(Role.DECODE)
        if is_steep:
            return (20_000 if prompt_load > num_p else 0), (200 if token_load > num_d else 0)
        spare = max(0.02, 1 - prompt_load / num_p)
        return round(200 * prompt_load / spare), round(32 * token_load / num_d)

    cluster = Cluster(max(num_prefill, min_pool_nodes), max(num_decode, min_pool_nodes))
    found = changes(cluster, load, 4 * HOUR_S, config=config)
    # At first one way as far as it goes, then each step back doubles the time until the next.
    assert len(found) <= num_prefill + num_decode + 9, found
