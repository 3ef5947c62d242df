"""Placement in random states: without prefix hits the shortest queue's, with them never a node that takes longer."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import given, settings

from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role
from router.cluster.breakers import PairBreakers
from router.cluster.config import PolicyConfig
from router.cluster.costs import Costs
from router.cluster.load import NodeLoad, Placement
from router.cluster.policy import Decision, Demand, Obstacle, Reason, choose
from router.cluster.pools import Pools
from router.cluster.prefix_index import Hit
from router.cluster.rates import Rates

CONFIG = PolicyConfig()
BLOCK_TOKENS = 16
MANY_BLOCKS = 10_000


@st.composite
def nodes(draw: st.DrawFn, free: st.SearchStrategy[int]) -> list[NodeLoad]:
    roles = draw(st.lists(st.sampled_from(Role), min_size=1, max_size=8))
    return [
        node(f"{role.value[0]}{number}", role, draw(_QUEUES), draw(_QUEUES), draw(free), draw(_CACHED))
        for number, role in enumerate(roles)
    ]


# Often equal, and about as often beyond the limits as not.
_QUEUES = st.sampled_from([0, 0, 100, 101, 5_000, 9_000, 20_000, 70_000])
_CACHED = st.sampled_from([0, 3, 11, 1 << 20])


def node(
    node_id: str, role: Role, prompt: int = 0, decode: int = 0, free: int = MANY_BLOCKS, cached: int = 0
) -> NodeLoad:
    """Of the ``free`` blocks so many are ``cached``, at most."""
    description = NodeDescription(
        node_id, 1, role, "a:1", ModelDescription("m", "f", "float32", 100, 10),
        KvLayout(4, MANY_BLOCKS, 8, 128, BLOCK_TOKENS, "bfloat16"), 1, 1, "h", (), "cpu", "none", "0",
    )  # fmt: skip
    status = NodeStatus(
        role, queued_prompt_tokens=prompt, running_tokens=decode, free_blocks=free, cached_blocks=min(cached, free)
    )
    return NodeLoad(description, status)


def decide(found: Sequence[NodeLoad], demand: Demand, costs: Costs | None = None) -> Decision | Obstacle:
    pools = Pools()
    for each in found:
        pools.put(each)
    return choose(pools, demand, PairBreakers(CONFIG), 0.0, CONFIG, costs)


def costs_of(hits: dict[str, int], num_tokens: int) -> Costs:
    """``hits``: leading blocks by node."""
    lengths = sorted(set(hits.values()) - {0}, reverse=True)
    levels = [Hit(length, frozenset(x for x, num in hits.items() if num == length)) for length in lengths]
    return Costs(Rates(CONFIG), levels, num_tokens, BLOCK_TOKENS)


def by_the_shortest_queue(found: Sequence[NodeLoad], num_tokens: int) -> Placement | None:
    """The rules of the policy without prefixes, written as a look at every node."""

    def ordered(role: Role, rank: str, threshold: int) -> dict[Role, int]:
        own, mixed = ([getattr(x, rank) for x in found if x.role is each] for each in (role, Role.MIXED))
        is_behind = own and mixed and min(own)[0] > threshold and min(mixed)[0] < min(own)[0]
        return {Role.MIXED: 0, role: 1} if is_behind or not own else {role: 0, Role.MIXED: 1}

    has_room = [x for x in found if x.free_tokens >= num_tokens + 1]
    token_order = ordered(Role.DECODE, "decode_rank", CONFIG.overflow_decode_tokens)
    decode = min(
        ((token_order[x.role], x.decode_rank[0], x.role is not Role.DECODE, x.decode_rank, x)
         for x in has_room if x.role in token_order),
        default=None, key=lambda candidate: candidate[:4],
    )  # fmt: skip
    has_token_pool = any(x.role is not Role.PREFILL for x in found)
    prompt_order = ordered(Role.PREFILL, "prompt_rank", CONFIG.overflow_prompt_tokens)
    if all(x.role is Role.DECODE for x in found):
        prompt_order = {Role.DECODE: 0}
    able = [
        x for x in found
        if x.role in prompt_order and x.pending_prompt_tokens < CONFIG.max_pending_prompt_tokens
        and (x in has_room if x.role is not Role.PREFILL or not has_token_pool else decode is not None)
    ]  # fmt: skip
    prefill = min(
        able, default=None,
        key=lambda x: (prompt_order[x.role], x.prompt_rank[0], x.role is not Role.PREFILL, x.prompt_rank),
    )  # fmt: skip
    if prefill is None:
        return None
    if prefill.role is not Role.PREFILL or not has_token_pool:
        return Placement(prefill.node_id, prefill.node_id)
    assert decode is not None
    return Placement(prefill.node_id, decode[4].node_id)


_FREE = st.sampled_from([0, 5, 7, 20, MANY_BLOCKS])


@given(nodes(_FREE), st.sampled_from([1, 100, 320]))
def test_without_hits_the_shortest_queue_decides(found: list[NodeLoad], num_tokens: int) -> None:
    expected = by_the_shortest_queue(found, num_tokens)
    for costs in (None, costs_of({}, num_tokens), costs_of({"elsewhere": 3}, num_tokens)):
        decision = decide(found, Demand(num_tokens), costs)
        assert (decision.placement if isinstance(decision, Decision) else None) == expected
        if isinstance(decision, Decision):
            assert (decision.num_prefill_hit, decision.num_decode_hit) == (0, 0)


@given(nodes(st.just(MANY_BLOCKS)), st.integers(1, 8))
def test_where_all_hold_the_same_the_shortest_queue_decides(found: list[NodeLoad], num_blocks: int) -> None:
    num_tokens = 128
    decision = decide(found, Demand(num_tokens), costs_of({x.node_id: num_blocks for x in found}, num_tokens))
    expected = by_the_shortest_queue(found, num_tokens)
    assert (decision.placement if isinstance(decision, Decision) else None) == expected
    if isinstance(decision, Decision):
        assert decision.num_prefill_hit == min(num_blocks, 7) * BLOCK_TOKENS, "the last token is computed"


@settings(max_examples=400)
@given(nodes(_FREE), st.data())
def test_no_node_is_taken_that_takes_longer_than_the_shortest_queue(found: list[NodeLoad], data: st.DataObject) -> None:
    num_tokens = 400
    hits = {x.node_id: data.draw(st.sampled_from([0, 0, 1, 12, 25, 25]), label=x.node_id) for x in found}
    costs = costs_of(hits, num_tokens)
    decision = decide(found, Demand(num_tokens), costs)
    plain = by_the_shortest_queue(found, num_tokens)
    if isinstance(decision, Obstacle):
        assert plain is None, "a hit takes no room"
        return
    by_id = {x.node_id: x for x in found}
    prefill, decode = by_id[decision.placement.prefill_id], by_id[decision.placement.decode_id]
    for x, num_hit in ((prefill, decision.num_prefill_hit), (decode, decision.num_decode_hit)):
        assert num_hit == min(hits[x.node_id] * BLOCK_TOKENS, num_hit), "it holds what is counted on"
    assert decode.free_tokens >= num_tokens + 1 - decision.num_decode_hit
    if plain is not None:
        num_in_use = max(0, costs.num_hit(decode.node_id) - decode.cached_tokens)
        assert decode.free_tokens >= num_tokens + 1 - num_in_use, "where a node has room, no other one is tried"
    assert prefill.pending_prompt_tokens < CONFIG.max_pending_prompt_tokens
    if plain is None or decision.reason not in (Reason.POOLS, Reason.PREFIX):
        return
    before = by_id[plain.prefill_id], by_id[plain.decode_id]
    if [x.role for x in before] != [Role.PREFILL, Role.DECODE]:
        return
    split_s = costs.prompt_s(before[0], costs.num_hit(plain.prefill_id), stays=False)
    split_s += costs.decode_s(before[1], costs.num_hit(plain.decode_id))
    if decision.reason is Reason.PREFIX:
        taken_s = costs.here_s(decode, costs.num_hit(decode.node_id))
        assert prefill is decode
    else:
        taken_s = costs.prompt_s(prefill, costs.num_hit(prefill.node_id), stays=False)
        taken_s += costs.decode_s(decode, costs.num_hit(decode.node_id))
    assert taken_s <= split_s * (1 + 1e-9)
