"""Where a request is placed: the pure policy, the load behind it, and the breakers."""

from __future__ import annotations

import pytest

from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role
from router.cluster.breakers import PairBreakers
from router.cluster.config import PolicyConfig
from router.cluster.load import Loads, NodeLoad, Placement
from router.cluster.policy import Decision, Demand, Obstacle, Reason, choose
from router.cluster.pools import Pools

CONFIG = PolicyConfig()
DEMAND = Demand(num_known_tokens=100)
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}


def description(node_id: str, role: Role) -> NodeDescription:
    return NodeDescription(
        node_id, 1, role, "a:1", ModelDescription("m", "f", "float32", 100, 10),
        KvLayout(1, 100, 1, 8, 16, "float32"), 1, 1, "h", (), "cpu", "none", "0",
    )  # fmt: skip


def node(node_id: str, prompt: int = 0, decode: int = 0, free: int = 1000) -> NodeLoad:
    """A node with so many tokens pending; its name says its role."""
    role = ROLES[node_id[0]]
    status = NodeStatus(role, queued_prompt_tokens=prompt, running_tokens=decode, free_blocks=free)
    return NodeLoad(description(node_id, role), status)


def decide(
    *nodes: NodeLoad, demand: Demand = DEMAND, breakers: PairBreakers | None = None, now: float = 0.0
) -> Decision | Obstacle:
    pools = Pools()
    for each in nodes:
        pools.put(each)
    return choose(pools, demand, breakers or PairBreakers(CONFIG), now, CONFIG)


def pick(
    *nodes: NodeLoad, demand: Demand = DEMAND, breakers: PairBreakers | None = None, now: float = 0.0
) -> Placement | Obstacle:
    found = decide(*nodes, demand=demand, breakers=breakers, now=now)
    return found.placement if isinstance(found, Decision) else found


P0, P1, D0, D1, M0, M1 = map(node, ("p0", "p1", "d0", "d1", "m0", "m1"))


def test_joins_the_shortest_queue_of_each_pool() -> None:
    assert pick(node("p0", prompt=5), P1, node("d0", decode=5), D1) == Placement("p1", "d1")


def test_ties_go_to_the_node_with_more_free_blocks_then_to_the_smaller_id() -> None:
    assert pick(P0, node("p1", free=1001), D1, D0) == Placement("p1", "d0")


def test_all_mixed_is_colocated() -> None:
    assert pick(node("m0", decode=1), M1) == Placement("m1", "m1")


def test_prompt_pool_overflows_to_mixed_only_when_behind() -> None:
    assert pick(node("p0", prompt=8000), D0, M0) == Placement("p0", "d0")
    assert pick(node("p0", prompt=9000), D0, M0) == Placement("m0", "m0")


def test_token_pool_overflows_to_mixed_when_full_or_behind() -> None:
    assert pick(P0, node("d0", free=1), M0) == Placement("p0", "m0")
    behind = CONFIG.overflow_decode_tokens + 1
    assert pick(P0, node("d0", decode=behind), M0) == Placement("p0", "m0")
    assert pick(P0, node("d0", decode=behind), node("m0", decode=behind)) == Placement("p0", "d0")


def test_lost_pools_are_borrowed_from_the_other_side() -> None:
    assert pick(P0) == Placement("p0", "p0")
    assert pick(D0) == Placement("d0", "d0")


def test_full_token_pool_makes_requests_wait() -> None:
    assert pick(P0, node("d0", free=1)) is Obstacle.NO_ROOM
    assert pick(P0, node("d0", free=7)) == Placement("p0", "d0"), "101 tokens are 7 blocks"


def test_long_prompt_queue_makes_requests_wait() -> None:
    assert pick(node("p0", prompt=CONFIG.max_pending_prompt_tokens), D0) is Obstacle.NO_ROOM


def test_without_a_node_nothing_is_placed() -> None:
    assert pick() is Obstacle.NO_NODE


def test_a_node_in_no_pool_gets_nothing() -> None:
    pools = Pools()
    for each in (P0, D0):
        pools.put(each)
    pools.remove("p0")
    assert choose(pools, DEMAND, PairBreakers(CONFIG), 0.0, CONFIG) == Decision(Placement("d0", "d0"), Reason.BORROWED)
    pools.remove("d0")
    assert choose(pools, DEMAND, PairBreakers(CONFIG), 0.0, CONFIG) is Obstacle.NO_NODE


def test_a_node_is_in_the_pool_of_the_role_that_it_acts_in() -> None:
    pools, load = Pools(), node("p0")
    pools.put(load)
    load.status = NodeStatus(Role.DECODE, free_blocks=10)
    pools.put(load)
    assert [list(pools[role]) for role in (Role.PREFILL, Role.DECODE)] == [[], [load]]
    assert load.node.home_role is Role.PREFILL
    assert pools.num_generating == 1


def test_single_token_needs_no_decode_node() -> None:
    assert pick(P0, D0, demand=Demand(100, is_single_token=True)) == Placement("p0", "p0")


@pytest.mark.parametrize(
    ("nodes", "demand", "reason"),
    [
        ((P0, D0), DEMAND, Reason.POOLS),
        ((P0, D0, M0), DEMAND, Reason.POOLS),
        ((node("p0", prompt=9000), D0, M0), DEMAND, Reason.OVERFLOW),
        ((P0, node("d0", free=1), M0), DEMAND, Reason.OVERFLOW),
        ((P0, M0), DEMAND, Reason.MIXED),
        ((D0, M0), DEMAND, Reason.MIXED),
        ((M0,), DEMAND, Reason.MIXED),
        ((P0, D0), Demand(100, is_single_token=True), Reason.SINGLE_TOKEN),
        ((P0,), DEMAND, Reason.BORROWED),
        ((D0,), Demand(100, is_single_token=True), Reason.BORROWED),
    ],
)
def test_a_decision_says_which_rule_made_it(nodes: tuple[NodeLoad, ...], demand: Demand, reason: Reason) -> None:
    found = decide(*nodes, demand=demand)
    assert isinstance(found, Decision)
    assert found.reason is reason


def test_blamed_nodes_are_avoided_unless_they_are_all() -> None:
    assert pick(P0, P1, D0, demand=Demand(100, avoid={"p0"})) == Placement("p1", "d0")
    assert pick(P0, D0, demand=Demand(100, avoid={"p0", "d0"})) == Placement("p0", "d0")


def test_breaker_opens_half_opens_and_closes() -> None:
    breakers = PairBreakers(CONFIG)
    breakers.failed("p0", "d0", 0.0)
    assert pick(P0, D0, D1, breakers=breakers) == Placement("p0", "d0"), "one failure is no pattern"
    breakers.failed("p0", "d0", 0.0)
    assert pick(P0, D0, D1, breakers=breakers, now=0.5) == Placement("p0", "d1")
    assert pick(P0, D0, breakers=breakers, now=0.5) == Placement("p0", "d0"), "the only pair is used all the same"
    assert pick(P0, D0, D1, breakers=breakers, now=1.1) == Placement("p0", "d0"), "half-open: one trial"
    breakers.used("p0", "d0", 1.1)
    assert pick(P0, D0, D1, breakers=breakers, now=1.2) == Placement("p0", "d1"), "and only one"
    breakers.failed("p0", "d0", 1.3)
    assert "d0" in breakers.open_of("p0", 3.2), "open for twice as long"
    breakers.worked("p0", "d0")
    assert not breakers.open_of("p0", 3.2)
    breakers.failed("p0", "d0", 4.0)
    breakers.failed("p0", "d0", 4.0)
    breakers.forget("d0")
    assert not breakers.open_of("p0", 4.0)


def test_books_count_what_was_sent_since_the_status() -> None:
    loads = Loads()
    p0 = loads.add_node(description("p0", Role.PREFILL), NodeStatus(Role.PREFILL, total_blocks=100, free_blocks=100))
    d0 = loads.add_node(description("d0", Role.DECODE), NodeStatus(Role.DECODE, total_blocks=100, free_blocks=100))
    loads.assign("s", Placement("p0", "d0"), 100)
    assert p0.pending_prompt_tokens == 100
    assert d0.free_blocks == 93
    loads.confirm("s")
    loads.status("d0", NodeStatus(Role.DECODE, total_blocks=100, free_blocks=93, running_tokens=300))
    assert d0.free_blocks == 93, "the status shows the promise now"
    assert d0.decode_rank.queue_tokens == 300, "100 are ours, 200 another router's"
    loads.prefilled("s")
    assert p0.pending_prompt_tokens == 0
    loads.check()
    loads.release("s")
    loads.check()
    assert d0.decode_rank.queue_tokens == 200
    assert loads.num_assigned == 0


def test_full_node_is_left_alone_until_its_next_status() -> None:
    loads = Loads()
    status = NodeStatus(Role.DECODE, total_blocks=100, free_blocks=100)
    d0 = loads.add_node(description("d0", Role.DECODE), status)
    loads.full("d0")
    assert d0.free_blocks == 0
    loads.status("d0", status)
    assert d0.free_blocks == 100


def test_two_sequences_of_one_length_are_two_promises() -> None:
    loads = Loads()
    status = NodeStatus(Role.DECODE, total_blocks=100, free_blocks=100)
    loads.add_node(description("p0", Role.PREFILL), NodeStatus(Role.PREFILL, total_blocks=100, free_blocks=100))
    d0 = loads.add_node(description("d0", Role.DECODE), status)
    for sequence_id in ("first", "second"):
        loads.assign(sequence_id, Placement("p0", "d0"), 100)
        loads.confirm(sequence_id)
        loads.prefilled(sequence_id)
    loads.release("second")
    loads.status("d0", NodeStatus(Role.DECODE, total_blocks=100, free_blocks=93))
    loads.check()
    loads.assign("third", Placement("p0", "d0"), 100)
    loads.release("first")
    loads.check()
    assert d0.free_blocks == 93 - 7, "what is left is the promise to the third"
