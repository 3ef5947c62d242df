"""Who gets what: the pure policy, the books behind it, and the breakers."""

from __future__ import annotations

from dataclasses import replace

from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role
from router.cluster.load import Loads
from router.cluster.policy import Demand, NodeView, Obstacle, PairBreakers, Placement, PolicyConfig, choose

CONFIG = PolicyConfig()
DEMAND = Demand(num_known_tokens=100)


def view(node_id: str, role: Role, prompt: int = 0, decode: int = 0, free: int = 1000, up: bool = True) -> NodeView:
    return NodeView(node_id, role, up, prompt, decode, free, 16)


def pick(*nodes: NodeView, demand: Demand = DEMAND, breakers: PairBreakers | None = None, now: float = 0.0) -> object:
    return choose(nodes, demand, breakers or PairBreakers(CONFIG), now, CONFIG)


P0, P1 = view("p0", Role.PREFILL), view("p1", Role.PREFILL)
D0, D1 = view("d0", Role.DECODE), view("d1", Role.DECODE)
M0, M1 = view("m0", Role.MIXED), view("m1", Role.MIXED)


def test_joins_the_shortest_queue_of_each_pool() -> None:
    busy_p, busy_d = replace(P0, pending_prompt_tokens=5), replace(D0, pending_decode_tokens=5)
    assert pick(busy_p, P1, busy_d, D1) == Placement("p1", "d1")


def test_all_mixed_is_colocated() -> None:
    assert pick(replace(M0, pending_decode_tokens=1), M1) == Placement("m1", "m1")


def test_prompt_pool_overflows_to_mixed_only_when_behind() -> None:
    assert pick(replace(P0, pending_prompt_tokens=8000), D0, M0) == Placement("p0", "d0")
    assert pick(replace(P0, pending_prompt_tokens=9000), D0, M0) == Placement("m0", "m0")


def test_token_pool_overflows_to_mixed_when_full() -> None:
    assert pick(P0, replace(D0, free_blocks=1), M0) == Placement("p0", "m0")


def test_lost_pools_are_borrowed_from_the_other_side() -> None:
    assert pick(P0, replace(D0, is_available=False)) == Placement("p0", "p0")
    assert pick(replace(P0, is_available=False), D0) == Placement("d0", "d0")


def test_full_token_pool_makes_requests_wait() -> None:
    assert pick(P0, replace(D0, free_blocks=1)) is Obstacle.NO_ROOM
    assert pick(P0, replace(D0, free_blocks=7)) == Placement("p0", "d0"), "101 tokens are 7 blocks"


def test_long_prompt_queue_makes_requests_wait() -> None:
    assert pick(replace(P0, pending_prompt_tokens=CONFIG.max_pending_prompt_tokens), D0) is Obstacle.NO_ROOM


def test_nobody() -> None:
    assert pick() is Obstacle.NO_NODE
    assert pick(replace(P0, is_available=False)) is Obstacle.NO_NODE


def test_single_token_needs_no_decode_node() -> None:
    assert pick(P0, D0, demand=Demand(100, is_single_token=True)) == Placement("p0", "p0")


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
    assert breakers.is_open("p0", "d0", 3.2), "open for twice as long"
    breakers.worked("p0", "d0")
    assert not breakers.is_open("p0", "d0", 3.2)
    breakers.failed("p0", "d0", 4.0)
    breakers.failed("p0", "d0", 4.0)
    breakers.forget("d0")
    assert not breakers.is_open("p0", "d0", 4.0)


def node(node_id: str, role: Role) -> NodeDescription:
    return NodeDescription(
        node_id, 1, role, role, "a:1", ModelDescription("m", "f", "float32", 100, 10),
        KvLayout(1, 100, 1, 8, 16, "float32"), 1, 1, "h", (), "cpu", "none", "0",
    )  # fmt: skip


def test_books_count_what_was_sent_since_the_status() -> None:
    loads = Loads()
    loads.add_node(node("p0", Role.PREFILL), NodeStatus(Role.PREFILL, total_blocks=100, free_blocks=100))
    loads.add_node(node("d0", Role.DECODE), NodeStatus(Role.DECODE, total_blocks=100, free_blocks=100))
    loads.assign("s", Placement("p0", "d0"), 100)
    assert loads.view("p0", True).pending_prompt_tokens == 100
    assert loads.view("d0", True).free_blocks == 93
    loads.confirm("s")
    loads.status("d0", NodeStatus(Role.DECODE, total_blocks=100, free_blocks=93, running_tokens=300))
    assert loads.view("d0", True).free_blocks == 93, "the status shows the promise now"
    assert loads.view("d0", True).pending_decode_tokens == 300, "100 are ours, 200 another router's"
    loads.prefilled("s")
    assert loads.view("p0", True).pending_prompt_tokens == 0
    loads.check()
    loads.release("s")
    loads.check()
    assert loads.view("d0", True).pending_decode_tokens == 200
    assert loads.num_assigned == 0


def test_full_node_is_left_alone_until_its_next_status() -> None:
    loads = Loads()
    status = NodeStatus(Role.DECODE, total_blocks=100, free_blocks=100)
    loads.add_node(node("d0", Role.DECODE), status)
    loads.full("d0")
    assert loads.view("d0", True).free_blocks == 0
    loads.status("d0", status)
    assert loads.view("d0", True).free_blocks == 100
