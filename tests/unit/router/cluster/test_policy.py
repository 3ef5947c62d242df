"""Where a request is placed: the pure policy, the load behind it, and the breakers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role, StepTimes
from router.cluster.breakers import PairBreakers
from router.cluster.config import PolicyConfig
from router.cluster.costs import Costs
from router.cluster.load import Loads, NodeLoad, Placement
from router.cluster.policy import Decision, Demand, Obstacle, Reason, choose
from router.cluster.pools import Pools
from router.cluster.rates import Rates

CONFIG = PolicyConfig()
DEMAND = Demand(num_known_tokens=100)
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
# A token of a prompt takes 1 ms, a step of decodes 20 ms and more.
TIMES = StepTimes(0.02, 1e-3, 5e-4, 5e-7)


def description(node_id: str, role: Role, target_s: float | None = None) -> NodeDescription:
    return NodeDescription(
        node_id, 1, role, "a:1", ModelDescription("m", "f", "float32", 100, 10),
        KvLayout(1, 100, 1, 8, 16, "float32"), 1, 1, "h", (), "cpu", "none", "0", tbt_target_s=target_s,
    )  # fmt: skip


def node(
    node_id: str,
    prompt: int = 0,
    decode: int = 0,
    free: int = 1000,
    *,
    running: int = 0,
    times: StepTimes | None = None,
    target_s: float | None = None,
    is_away: bool = False,
) -> NodeLoad:
    """A node with so many tokens pending; its name says its home role. ``is_away``: it acts as mixed."""
    home = ROLES[node_id[0]]
    status = NodeStatus(
        Role.MIXED if is_away else home, home=home, queued_prompt_tokens=prompt, running_tokens=decode,
        free_blocks=free, num_running=running, step_times=times,
    )  # fmt: skip
    return NodeLoad(description(node_id, home, target_s), status, Rates(CONFIG))


def decide(
    *nodes: NodeLoad,
    demand: Demand = DEMAND,
    breakers: PairBreakers | None = None,
    now: float = 0.0,
    config: PolicyConfig = CONFIG,
) -> Decision | Obstacle:
    pools = Pools()
    for each in nodes:
        pools.put(each)
    costs = Costs(Rates(config), demand.num_known_tokens, is_single_token=demand.is_single_token)
    return choose(pools, demand, breakers or PairBreakers(config), now, config, costs)


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
    assert pick(node("p0", prompt=900), D0, M0) == Placement("p0", "d0"), "0.09 s are not worth it"
    assert pick(node("p0", prompt=1100), D0, M0) == Placement("m0", "m0")


def test_token_pool_overflows_to_mixed_when_full_or_behind() -> None:
    assert pick(P0, node("d0", free=1), M0) == Placement("p0", "m0")
    behind = 9_000
    assert pick(P0, node("d0", decode=7_000), M0) == Placement("p0", "d0"), "0.09 s over 128 tokens"
    assert pick(P0, node("d0", decode=behind), M0) == Placement("p0", "m0")
    assert pick(P0, node("d0", decode=behind), node("m0", decode=behind)) == Placement("p0", "d0")


def test_lost_pools_are_borrowed_from_the_other_side() -> None:
    assert pick(P0) == Placement("p0", "p0")
    assert pick(D0) == Placement("d0", "d0")


def test_full_token_pool_makes_requests_wait() -> None:
    assert pick(P0, node("d0", free=1)) is Obstacle.NO_ROOM
    assert pick(P0, node("d0", free=7)) == Placement("p0", "d0"), "101 tokens are 7 blocks"


def test_long_prompt_queue_makes_requests_wait() -> None:
    most = round(CONFIG.max_prompt_wait_s / CONFIG.prompt_token_s)
    busy = node("d0", decode=100, running=100)
    assert pick(node("p0", prompt=most - 1), busy, demand=Demand(9000)) == Placement("p0", "d0")
    assert pick(node("p0", prompt=most), busy, demand=Demand(9000)) is Obstacle.NO_ROOM


def test_without_a_node_nothing_is_placed() -> None:
    assert pick() is Obstacle.NO_NODE


def test_a_node_in_no_pool_gets_nothing() -> None:
    pools = Pools()
    for each in (P0, D0):
        pools.put(each)
    costs = Costs(Rates(CONFIG), DEMAND.num_known_tokens)
    pools.remove("p0")
    found = choose(pools, DEMAND, PairBreakers(CONFIG), 0.0, CONFIG, costs)
    assert found == Decision(Placement("d0", "d0"), Reason.BORROWED)
    pools.remove("d0")
    assert choose(pools, DEMAND, PairBreakers(CONFIG), 0.0, CONFIG, costs) is Obstacle.NO_NODE


def test_a_node_is_in_its_home_pool_whatever_it_acts_as() -> None:
    pools, load = Pools(), node("p0", is_away=True)
    pools.put(load)
    assert list(pools[Role.PREFILL]) == [load]
    load.hear(NodeStatus(Role.DECODE, free_blocks=10))
    pools.put(load)
    assert [list(pools[role]) for role in (Role.PREFILL, Role.DECODE)] == [[], [load]], "its home pool was changed"
    assert load.node.home_role is Role.PREFILL, "the one that it started in"
    assert pools.num_generating == 1


@pytest.mark.parametrize(
    ("nodes", "min_nodes", "lent"),
    [
        (("d0", "d1"), 1, ("d0", "d1")),
        (("d0", "d1"), 2, ()),
        (("d0",), 1, ()),
        (("d0",), 0, ("d0",)),
        (("d0", "d1*"), 1, ("d1*",)),
        # Too many are away, since two routers lent at once: all routers go on with the same ones.
        (("d0*", "d1*"), 1, ("d0*",)),
        (("d2*", "d0*", "d1*"), 1, ("d0*", "d1*")),
        (("d1*", "d0*"), 2, ()),
        (("d0", "d1", "d2*"), 1, ("d0", "d1", "d2*")),
    ],
)
def test_a_pool_lends_while_enough_nodes_do_its_work_alone(
    nodes: tuple[str, ...], min_nodes: int, lent: tuple[str, ...]
) -> None:
    """A star: it does the other pool's work already."""
    pools = Pools()
    loads = {name: node(name[:2], is_away=name.endswith("*")) for name in nodes}
    for load in loads.values():
        pools.put(load)
    assert set(pools.to_lend(Role.DECODE, min_nodes)) == {loads[name] for name in lent}
    for load in loads.values():  # all go home
        load.hear(NodeStatus(Role.DECODE))
        pools.put(load)
    assert len(pools.to_lend(Role.DECODE, min_nodes)) == (len(nodes) if len(nodes) > min_nodes else 0)


def test_single_token_needs_no_decode_node() -> None:
    assert pick(P0, D0, demand=Demand(100, is_single_token=True)) == Placement("p0", "p0")


@pytest.mark.parametrize(
    ("nodes", "demand", "reason"),
    [
        ((P0, D0), DEMAND, Reason.POOLS),
        ((P0, D0, M0), DEMAND, Reason.POOLS),
        ((node("p0", prompt=9000), D0), DEMAND, Reason.POOLS),
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


LONG = Demand(1000)
# One prompt of 1 s is before the next.
BEHIND = node("p0", prompt=1000, times=TIMES)
FAR_P = node("p0", prompt=2000, times=TIMES)
IDLE_P, IDLE_D = node("p0", times=TIMES), node("d0", times=TIMES)
EIGHT = node("d0", decode=8000, running=8, times=TIMES)
SLOW_P, SLOW_D = (
    node("p0", times=replace(TIMES, prompt_token_s=3e-3)),
    node("d1", times=StepTimes(0.06, 3e-3, 15e-4, 15e-7)),
)


def busy(load: NodeLoad) -> NodeLoad:
    """It has had prompts in nearly every status."""
    for _ in range(300):
        load.hear(replace(load.status, queued_prompt_tokens=1))
    load.hear(replace(load.status, queued_prompt_tokens=0))
    return load


@pytest.mark.parametrize(
    ("nodes", "placement", "reason"),
    [
        # An idle cluster splits, and so does one whose decode node has work.
        ((IDLE_P, IDLE_D), "p0 d0", Reason.POOLS),
        ((IDLE_P, EIGHT), "p0 d0", Reason.POOLS),
        # A prompt of the same length is before it: the decode node is idle, or its few sequences wait less.
        ((BEHIND, IDLE_D), "d0 d0", Reason.WHOLE),
        # One that decodes waits as long as the prompt would: nothing is gained.
        ((BEHIND, node("d0", decode=1000, running=1, times=TIMES)), "p0 d0", Reason.POOLS),
        # With a target the gaps of three are bounded: they count less, but the prompt takes longer.
        ((FAR_P, node("d0", decode=3000, running=3, times=TIMES)), "p0 d0", Reason.POOLS),
        ((FAR_P, node("d0", decode=3000, running=3, times=TIMES, target_s=0.1)), "d0 d0", Reason.WHOLE),
        # Of two decode nodes the one with less to do.
        ((BEHIND, node("d0", prompt=500, times=TIMES), node("d1", times=TIMES)), "d1 d1", Reason.WHOLE),
        # A prefill node that bounds the gaps keeps it, if that saves much.
        ((node("p0", times=TIMES, target_s=0.1), EIGHT), "p0 p0", Reason.WHOLE),
        ((node("p0", times=TIMES, target_s=0.1), IDLE_D), "p0 d0", Reason.POOLS),
        # Many decode there: the idle prefill node keeps it.
        ((IDLE_P, node("d0", decode=64_000, running=64, times=TIMES)), "p0 p0", Reason.WHOLE),
        # Or would keep it, had it not mostly prompts to compute, for which its tokens would wait.
        ((busy(node("p0", times=TIMES)), node("d0", decode=64_000, running=64, times=TIMES)), "p0 d0", Reason.POOLS),
        # A slow node is worth its speed.
        ((node("p0", times=replace(TIMES, prompt_token_s=4e-3)), IDLE_D), "d0 d0", Reason.WHOLE),
        ((SLOW_P, node("p1", prompt=1000, times=TIMES), EIGHT), "p1 d0", Reason.POOLS),
        ((SLOW_P, node("p1", prompt=3000, times=TIMES), EIGHT), "p0 d0", Reason.POOLS),
        ((IDLE_P, node("d0", decode=3000, running=3, times=TIMES), SLOW_D), "p0 d0", Reason.POOLS),
        ((IDLE_P, node("d0", decode=40_000, running=40, times=TIMES), SLOW_D), "p0 d1", Reason.POOLS),
    ],
)  # fmt: skip
def test_a_request_runs_whole_where_that_saves_much(
    nodes: tuple[NodeLoad, ...], placement: str, reason: Reason
) -> None:
    assert decide(*nodes, demand=LONG) == Decision(Placement(*placement.split()), reason)
    always = decide(*nodes, demand=LONG, config=replace(CONFIG, disaggregation="always"))
    assert isinstance(always, Decision)
    assert always.reason is Reason.POOLS, "whatever it costs"
    never = decide(*nodes, demand=LONG, config=replace(CONFIG, disaggregation="never"))
    assert isinstance(never, Decision)
    assert never.placement.is_colocated
    assert never.reason is Reason.WHOLE


# Two seconds and more before the next prompt, and nobody takes a prompt for it to be better for all.
FAR_BEHIND = [node(x, prompt=2100, times=TIMES) for x in ("p0", "p1")]
CROWDED = [node(x, decode=9000, running=9, times=TIMES) for x in ("d0", "d1")]
CROWDED_AWAY = node("d1", decode=9000, running=9, times=TIMES, is_away=True)
FULL = [node(x, free=1) for x in ("d0", "d1")]


@pytest.mark.parametrize(
    ("nodes", "placement", "reason"),
    [
        (([node(x, prompt=1900, times=TIMES) for x in ("p0", "p1")], CROWDED), "p0 d0", Reason.POOLS),
        ((FAR_BEHIND, CROWDED), "d0 d0", Reason.BORROWED),
        # The pool keeps a node for its own work.
        ((FAR_BEHIND, CROWDED[:1]), "p0 d0", Reason.POOLS),
        # The one that is lent already is lent again; were it alone at home it would not be.
        ((FAR_BEHIND, [CROWDED[0], CROWDED_AWAY]), "d1 d1", Reason.BORROWED),
        ((FAR_BEHIND, [CROWDED_AWAY]), "p0 d1", Reason.POOLS),
        # Its own prompts take as long.
        (
            (FAR_BEHIND, [CROWDED[0], node("d1", 1900, 9000, running=9, times=TIMES, is_away=True)]),
            "p0 d0",
            Reason.POOLS,
        ),
        # The token pool has no room.
        (([P0, P1], FULL), "p0 p0", Reason.BORROWED),
        (([P0], FULL), None, None),
        (([P0, node("p1", free=1)], FULL), "p0 p0", Reason.BORROWED),
        (([P0, P1, M0], FULL), "p0 m0", Reason.OVERFLOW),
    ],
)
def test_a_pool_that_is_behind_or_full_borrows(
    nodes: tuple[list[NodeLoad], ...], placement: str | None, reason: Reason | None
) -> None:
    found = decide(*(x for pool in nodes for x in pool), demand=LONG if nodes[1] is not FULL else DEMAND)
    if placement is None or reason is None:
        assert found is Obstacle.NO_ROOM
    else:
        assert found == Decision(Placement(*placement.split()), reason)
    always = decide(
        *(x for pool in nodes for x in pool), demand=DEMAND, config=replace(CONFIG, disaggregation="always")
    )
    assert isinstance(always, Obstacle) or always.reason in (Reason.POOLS, Reason.OVERFLOW)


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
    loads = Loads(Rates(CONFIG))
    p0 = loads.add_node(description("p0", Role.PREFILL), NodeStatus(Role.PREFILL, total_blocks=100, free_blocks=100))
    d0 = loads.add_node(description("d0", Role.DECODE), NodeStatus(Role.DECODE, total_blocks=100, free_blocks=100))
    loads.assign("s", Placement("p0", "d0"), 100)
    assert p0.pending_prompt_tokens == 100
    assert d0.free_blocks == 93
    loads.confirm("s")
    loads.status("d0", NodeStatus(Role.DECODE, total_blocks=100, free_blocks=93, running_tokens=300))
    assert d0.free_blocks == 93, "the status shows the promise now"
    assert d0.pending_decode_tokens == 300, "100 are ours, 200 another router's"
    loads.prefilled("s")
    assert p0.pending_prompt_tokens == 0
    loads.check()
    loads.release("s")
    loads.check()
    assert d0.pending_decode_tokens == 200
    assert loads.num_assigned == 0


def test_full_node_is_left_alone_until_its_next_status() -> None:
    loads = Loads(Rates(CONFIG))
    status = NodeStatus(Role.DECODE, total_blocks=100, free_blocks=100)
    d0 = loads.add_node(description("d0", Role.DECODE), status)
    loads.full("d0")
    assert d0.free_blocks == 0
    loads.status("d0", status)
    assert d0.free_blocks == 100


def test_two_sequences_of_one_length_are_two_promises() -> None:
    loads = Loads(Rates(CONFIG))
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


def test_each_waiting_prompt_costs_a_step_unless_steps_are_made_for_decodes() -> None:
    loads = Loads(Rates(CONFIG))
    status = NodeStatus(Role.MIXED, free_blocks=1000, queued_prompt_tokens=300, num_waiting=2, step_times=TIMES)
    m0 = loads.add_node(description("m0", Role.MIXED), status)
    assert m0.prompt_wait_s == pytest.approx(300 * 1e-3 + 2 * 0.02)
    loads.assign("s", Placement("m0", "m0"), 100)
    assert m0.prompt_wait_s == pytest.approx(400 * 1e-3 + 3 * 0.02)
    loads.status("m0", replace(status, num_running=1, running_tokens=50))
    assert m0.prompt_wait_s == pytest.approx(300 * 1e-3)
    loads.check()


def test_a_status_shows_how_far_the_prompt_is_whose_turn_it_is() -> None:
    loads = Loads(Rates(CONFIG))
    status = NodeStatus(Role.PREFILL, free_blocks=1000)
    p0 = loads.add_node(description("p0", Role.PREFILL), status)
    for sequence_id in ("first", "second"):
        loads.assign(sequence_id, Placement("p0", "p0"), 100)
    loads.status("p0", replace(status, queued_prompt_tokens=130, num_waiting=2))
    assert p0.pending_prompt_tokens == 130
    loads.status("p0", replace(status, queued_prompt_tokens=30, num_waiting=1))
    assert p0.pending_prompt_tokens == 200, "the second may not have arrived there yet, and the first not have begun"
    loads.prefilled("first")
    assert p0.pending_prompt_tokens == 100, "what was computed was the first one's"
    loads.release("first")
    loads.release("second")
    assert p0.pending_prompt_tokens == 0
    loads.check()
