"""Placement by what nodes hold of a prompt: nearness against load, in seconds; and the rates behind the seconds."""

from __future__ import annotations

import pytest

from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role
from router.cluster.breakers import PairBreakers
from router.cluster.config import PolicyConfig
from router.cluster.costs import Costs
from router.cluster.load import Loads, NodeLoad, Placement
from router.cluster.policy import Decision, Demand, Reason, choose
from router.cluster.pools import Pools
from router.cluster.prefix_index import Hit
from router.cluster.rates import Line, Rates

CONFIG = PolicyConfig()
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
BLOCK_TOKENS = 16
# 75 full blocks and one token.
NUM_TOKENS = 1201


def node(
    node_id: str, prompt: int = 0, decode: int = 0, free: int = 1000, num_running: int = 0, cached: int = 0
) -> NodeLoad:
    role = ROLES[node_id[0]]
    description = NodeDescription(
        node_id, 1, role, "a:1", ModelDescription("m", "f", "float32", 100, 10),
        KvLayout(32, 1000, 8, 128, BLOCK_TOKENS, "bfloat16"), 1, 1, "h", (), "cpu", "none", "0",
    )  # fmt: skip
    status = NodeStatus(
        role, queued_prompt_tokens=prompt, running_tokens=decode, free_blocks=free, num_running=num_running,
        cached_blocks=cached,
    )  # fmt: skip
    return NodeLoad(description, status, Rates(CONFIG))


def decide(
    *nodes: NodeLoad, demand: Demand | None = None, breakers: PairBreakers | None = None, **hits: int
) -> Decision:
    """``hits``: leading blocks by node."""
    pools = Pools()
    for each in nodes:
        pools.put(each)
    levels = [Hit(num, frozenset(x for x in hits if hits[x] == num)) for num in sorted({*hits.values()}, reverse=True)]
    demand = demand or Demand(NUM_TOKENS)
    costs = Costs(Rates(CONFIG), demand.num_known_tokens, hits=levels, block_tokens=BLOCK_TOKENS)
    found = choose(pools, demand, breakers or PairBreakers(CONFIG), 0.0, CONFIG, costs)
    assert isinstance(found, Decision)
    return found


P0, P1, D0, D1, M0, M1 = map(node, ("p0", "p1", "d0", "d1", "m0", "m1"))


def test_nodes_that_hold_the_prompt_come_before_equally_idle_ones() -> None:
    found = decide(P0, P1, D0, D1, p1=50, d1=50)
    assert found.placement == Placement("p1", "d1")
    assert found.reason is Reason.POOLS
    assert (found.num_prefill_hit, found.num_decode_hit) == (50 * BLOCK_TOKENS, 50 * BLOCK_TOKENS)


def test_a_queue_longer_than_the_hit_saves_sends_the_prompt_elsewhere() -> None:
    assert decide(P0, node("p1", prompt=799), D0, p1=50).placement.prefill_id == "p1"
    assert decide(P0, node("p1", prompt=801), D0, p1=50).placement.prefill_id == "p0", "the hit saves 800 tokens"


def test_running_sequences_count_against_what_need_not_be_moved() -> None:
    token_bytes = 32 * 8 * 2 * 128 * 2
    saved_s = 75 * BLOCK_TOKENS * token_bytes * CONFIG.move_byte_s
    limit = int(saved_s / (CONFIG.kv_token_s * CONFIG.output_tokens))
    assert decide(P0, D0, node("d1", decode=limit - 1), p0=75, d1=75).placement.decode_id == "d1"
    assert decide(P0, D0, node("d1", decode=limit + 2), p0=75, d1=75).placement.decode_id == "d0"


def test_the_last_known_token_is_computed_where_all_is_held() -> None:
    found = decide(P0, D0, demand=Demand(1200), p0=75, d0=75)
    assert found.num_prefill_hit == 74 * BLOCK_TOKENS
    assert found.num_decode_hit == 75 * BLOCK_TOKENS
    assert found.placement == Placement("p0", "d0"), "as much is held at both: the pools do what they are for"


def test_the_next_turn_runs_where_the_answer_lies_unless_many_generate_there() -> None:
    """The decode node has the last answer, which the prefill node has not."""
    found = decide(P0, node("d0", num_running=2), D1, p0=40, d0=70)
    assert found.placement == Placement("d0", "d0")
    assert found.reason is Reason.PREFIX
    assert (found.num_prefill_hit, found.num_decode_hit) == (70 * BLOCK_TOKENS, 70 * BLOCK_TOKENS)
    busy = decide(P0, node("d0", num_running=8), D1, p0=40, d0=70)
    assert busy.placement == Placement("p0", "d1"), "eight sequences would wait for 81 tokens each, and for its KV"


def test_a_decode_node_that_takes_over_for_blamed_ones_is_borrowed_and_not_sought() -> None:
    found = decide(P0, D0, demand=Demand(NUM_TOKENS, avoid={"p0"}), d0=70)
    assert found.placement == Placement("d0", "d0")
    assert found.reason is Reason.BORROWED


def test_a_single_token_looks_for_a_prefill_node_that_holds_the_prompt() -> None:
    found = decide(P0, P1, D0, demand=Demand(NUM_TOKENS, is_single_token=True), p1=10, d0=9)
    assert found.placement == Placement("p1", "p1")


def test_mixed_nodes_that_hold_the_prompt_come_first_among_them() -> None:
    found = decide(M0, M1, m1=70)
    assert found.placement == Placement("m1", "m1")
    assert (found.num_prefill_hit, found.num_decode_hit) == (70 * BLOCK_TOKENS, 70 * BLOCK_TOKENS)
    assert decide(P0, D0, M1, m1=50).placement == Placement("p0", "d0"), "a mixed node helps where that saves much"
    found = decide(node("p0", prompt=300), D0, M1, m1=50)
    assert (found.placement, found.reason) == (Placement("m1", "m1"), Reason.OVERFLOW), "0.11 s"


def test_room_is_needed_for_what_a_node_does_not_hold() -> None:
    assert decide(P0, node("d0", free=2), p0=74, d0=74).placement.decode_id == "d0", "two blocks beside 74"
    assert decide(P0, node("d0", free=1), D1, p0=74, d0=74).placement.decode_id == "d1"


def test_what_a_node_holds_takes_its_room_where_no_sequence_has_it_in_use() -> None:
    """Of 76 blocks 40 are to be had, which are the very ones that would be found."""
    assert decide(M0, node("m1", free=40, cached=40), m1=40).placement.decode_id == "m0"
    assert decide(P0, P1, D0, node("d1", free=40, cached=40), p1=40, d1=40).placement == Placement("p1", "d0")
    assert decide(P0, D0, node("d1", free=40, cached=40), d1=40).placement == Placement("p0", "d0")
    in_use = node("m1", free=40, cached=2)
    assert decide(M0, in_use, m1=40).placement.decode_id == "m1", "36 more, beside 38 that others have in use"
    assert decide(M0, node("m1", free=40, cached=4), m1=40).placement.decode_id == "m1"
    assert decide(M0, node("m1", free=40, cached=5), m1=40).placement.decode_id == "m0"


def test_where_no_other_has_room_a_node_is_asked_whose_sequences_may_have_it_in_use() -> None:
    assert decide(node("m0", free=70), node("m1", free=40, cached=40), m1=40).placement.decode_id == "m1"
    assert decide(P0, node("d0", free=40, cached=40), p0=40, d0=40).placement == Placement("p0", "d0")


def test_blocked_paths_and_blamed_nodes_are_not_taken_for_a_hit() -> None:
    breakers = PairBreakers(CONFIG)
    for _ in range(CONFIG.breaker_failures):
        breakers.failed("p0", "d0", 0.0)
    assert decide(P0, D0, D1, breakers=breakers, p0=75, d0=75).placement == Placement("p0", "d1")
    assert decide(P0, node("d0", free=2), breakers=breakers, p0=74, d0=74).placement == Placement("p0", "d0"), (
        "the only path"
    )
    assert decide(P0, P1, D0, demand=Demand(NUM_TOKENS, avoid={"p1"}), p1=75).placement.prefill_id == "p0"


def test_books_count_what_has_to_be_computed_and_stored() -> None:
    loads = Loads(Rates(CONFIG))
    p0 = loads.add_node(P0.node, NodeStatus(Role.PREFILL, total_blocks=100, free_blocks=100))
    d0 = loads.add_node(D0.node, NodeStatus(Role.DECODE, total_blocks=100, free_blocks=100))
    loads.assign("s", Placement("p0", "d0"), NUM_TOKENS, num_prefill_hit=800, num_decode_hit=1184)
    assert p0.pending_prompt_tokens == NUM_TOKENS - 800
    assert d0.pending_decode_tokens == NUM_TOKENS, "it generates beside all of its KV"
    assert d0.free_blocks == 98, "of 76 blocks 74 are there"
    loads.check()
    loads.prefilled("s")
    assert p0.pending_prompt_tokens == 0
    loads.release("s")
    loads.check()
    assert d0.free_blocks == 100


def test_a_line_forgets_what_does_not_depend_on_the_size() -> None:
    line = Line(1e-2)
    assert line.slope == 1e-2
    for _ in range(100):
        for size in (10, 200, 1000):
            line.see(size, 0.5 + 1e-3 * size)
    assert line.slope == pytest.approx(1e-3, rel=0.1)


def test_a_line_of_one_size_says_that_nothing_costs_nothing() -> None:
    line = Line(1e-2)
    for _ in range(10):
        line.see(600, 0.3)
    assert line.slope == pytest.approx(0.3 / 600)


def test_a_line_follows_what_changes_and_never_says_that_work_is_free() -> None:
    line = Line(1e-4)
    for _ in range(300):
        line.see(100, 1.0)
    for number in range(300):
        line.see(100 + number % 7, 0.1)
    assert line.slope == pytest.approx(1e-3, rel=0.1)
    for number in range(300):
        line.see(100 + number % 7, 1.0 - 0.1 * (number % 7))
    assert line.slope >= 1e-6


def test_a_node_has_its_own_rate_once_it_has_been_seen_often() -> None:
    rates = Rates(CONFIG)
    assert rates.prompt_token_s("p0") == CONFIG.prompt_token_s
    for _ in range(8):
        rates.computed("p0", 100, 0.1)
    rates.computed("p1", 100, 0.2)
    assert rates.prompt_token_s("p0") == pytest.approx(1e-3)
    assert rates.prompt_token_s("p1") == rates.prompt_token_s("never seen") > 1e-3
    rates.forget("p0")
    assert rates.prompt_token_s("p0") == rates.prompt_token_s("p1")
    for _ in range(400):
        rates.generated("d0", 40, 0.0, 0)
    assert rates.num_output_tokens == pytest.approx(40, rel=0.05)
