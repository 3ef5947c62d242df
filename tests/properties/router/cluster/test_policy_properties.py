"""Placement in random states, beside a look at every node and every pair of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role, StepTimes
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


# Often equal, and about as often beyond the limits as not.
_QUEUES = st.sampled_from([0, 0, 100, 101, 5_000, 9_000, 20_000, 170_000])
_CACHED = st.sampled_from([0, 3, 11, 1 << 20])
_FREE = st.sampled_from([0, 5, 7, 20, MANY_BLOCKS])
_TIMES = st.sampled_from([None, None, StepTimes(0.02, 1e-4, 5e-4, 5e-8), StepTimes(0.06, 3e-4, 15e-4, 15e-8)])


@st.composite
def nodes(draw: st.DrawFn, free: st.SearchStrategy[int] = _FREE, roles: Sequence[Role] = tuple(Role)) -> list[NodeLoad]:
    """Some act as mixed and some have a target."""
    return [
        node(
            f"{role.value[0]}{number}", role, prompt=draw(_QUEUES), decode=draw(_QUEUES), free=draw(free),
            cached=draw(_CACHED), running=draw(st.sampled_from([0, 1, 30])), times=draw(_TIMES),
            target_s=draw(st.sampled_from([None, 0.1])), is_away=draw(st.booleans()),
        )
        for number, role in enumerate(draw(st.lists(st.sampled_from(roles), min_size=1, max_size=8)))
    ]  # fmt: skip


def node(
    node_id: str,
    home: Role,
    *,
    prompt: int,
    decode: int,
    free: int,
    cached: int,
    running: int,
    times: StepTimes | None,
    target_s: float | None,
    is_away: bool,
) -> NodeLoad:
    """Of the ``free`` blocks so many are ``cached``, at most."""
    description = NodeDescription(
        node_id, 1, home, "a:1", ModelDescription("m", "f", "float32", 100, 10),
        KvLayout(4, MANY_BLOCKS, 8, 128, BLOCK_TOKENS, "bfloat16"), 1, 1, "h", (), "cpu", "none", "0",
        tbt_target_s=target_s,
    )  # fmt: skip
    status = NodeStatus(
        Role.MIXED if is_away else home, home=home, queued_prompt_tokens=prompt, running_tokens=decode,
        free_blocks=free, cached_blocks=min(cached, free), num_running=running, step_times=times,
    )  # fmt: skip
    return NodeLoad(description, status, Rates(CONFIG))


def decide(
    found: Sequence[NodeLoad], demand: Demand, costs: Costs, config: PolicyConfig = CONFIG
) -> Decision | Obstacle:
    pools = Pools()
    for each in found:
        pools.put(each)
    return choose(pools, demand, PairBreakers(config), 0.0, config, costs)


def costs_of(hits: dict[str, int], num_tokens: int) -> Costs:
    """``hits``: leading blocks by node."""
    lengths = sorted(set(hits.values()) - {0}, reverse=True)
    levels = [Hit(length, frozenset(x for x, num in hits.items() if num == length)) for length in lengths]
    return Costs(Rates(CONFIG), num_tokens, hits=levels, block_tokens=BLOCK_TOKENS)


class Every:
    """What every placement would take, of nodes that can do it."""

    def __init__(
        self, found: Sequence[NodeLoad], costs: Costs, num_tokens: int, *, is_single: bool = False
    ) -> None:  # fmt: skip
        # The only token of an answer needs no room.
        room = num_tokens + (not is_single)
        hit = {x.node_id: costs.num_hit(x.node_id) for x in found}
        able = [x for x in found if x.prompt_wait_s < CONFIG.max_prompt_wait_s]
        # Sure: whichever blocks other sequences use.
        roomy = [x for x in found if x.free_tokens >= room or x.surely_has_room(room, hit[x.node_id])]
        self.whole_s = {x.node_id: costs.whole(hit[x.node_id]).seconds(x) for x in able if x in roomy}
        self.pairs_s = {
            (p.node_id, d.node_id): costs.prompt(hit[p.node_id]).seconds(p)
            + costs.tokens(hit[d.node_id]).seconds(d) + costs.move_s(d, hit[d.node_id])
            for p in able for d in roomy
            if p.home_role is Role.PREFILL and d.home_role is not Role.PREFILL
        }  # fmt: skip
        roles = {x.node_id: x.home_role for x in found}
        self.split_s = min((s for (_, d), s in self.pairs_s.items() if roles[d] is Role.DECODE), default=None)

    def seconds(self, placement: Placement) -> float | None:
        if placement.is_colocated:
            return self.whole_s.get(placement.prefill_id)
        return self.pairs_s.get((placement.prefill_id, placement.decode_id))


@settings(max_examples=200)
@given(nodes(), st.sampled_from([1, 100, 320]), st.data())
def test_the_pools_are_left_for_what_saves_much_and_for_nothing_else(
    found: list[NodeLoad], num_tokens: int, data: st.DataObject
) -> None:
    hits = {x.node_id: data.draw(st.sampled_from([0, 0, 0, 1, 12, 25]), label=x.node_id) for x in found}
    costs = costs_of(hits, num_tokens)
    every = Every(found, costs, num_tokens)
    decision = decide(found, Demand(num_tokens), costs)
    if isinstance(decision, Obstacle):
        assert every.split_s is None, "where a node has room for it, it is placed"
        return
    roles = {x.node_id: x.home_role for x in found}
    taken_s, split_s = every.seconds(decision.placement), every.split_s
    if split_s is None or decision.reason is Reason.BORROWED:
        return
    assert taken_s is not None, "where a node surely has room, none is taken that may have it"
    if decision.reason is Reason.POOLS:
        assert taken_s <= split_s * (1 + 1e-9)
        for node_id, whole_s in every.whole_s.items():
            is_measured = {x.node_id: x for x in found}[decision.placement.prefill_id].is_measured
            if roles[node_id] is Role.MIXED or (roles[node_id] is Role.DECODE and is_measured):
                assert not (taken_s - whole_s > CONFIG.leave_saving_s + 1e-9 and whole_s < CONFIG.leave_share * taken_s)
    elif decision.reason is Reason.PREFIX:
        assert taken_s < split_s
    else:
        assert split_s - taken_s > CONFIG.leave_saving_s - 1e-9, "little is saved"
        assert taken_s < CONFIG.leave_share * split_s


@given(nodes(), st.sampled_from([1, 100, 320]), st.booleans())
def test_what_a_mode_says_holds_in_every_state(found: list[NodeLoad], num_tokens: int, is_single: bool) -> None:
    demand, costs = Demand(num_tokens, is_single_token=is_single), costs_of({}, num_tokens)
    never = decide(found, demand, costs, replace(CONFIG, disaggregation="never"))
    able = Every(found, costs, num_tokens, is_single=is_single).whole_s
    assert isinstance(never, Obstacle) is not bool(able)
    assert isinstance(never, Obstacle) or able[never.placement.prefill_id] == min(able.values())
    always = decide(found, demand, costs, replace(CONFIG, disaggregation="always"))
    roles = {x.node_id: x.home_role for x in found}
    has_both = {Role.PREFILL, Role.DECODE} <= set(roles.values())
    if isinstance(always, Decision) and always.placement.is_colocated and has_both:
        assert is_single or roles[always.placement.prefill_id] is Role.MIXED


@given(nodes(free=st.just(MANY_BLOCKS), roles=(Role.PREFILL, Role.DECODE)), st.integers(1, 8))
def test_where_all_hold_the_same_the_shortest_queue_decides(found: list[NodeLoad], num_blocks: int) -> None:
    num_tokens = 128
    costs = costs_of({x.node_id: num_blocks for x in found}, num_tokens)
    decision = decide(found, Demand(num_tokens), costs, replace(CONFIG, disaggregation="always"))
    pairs_s = Every(found, costs, num_tokens).pairs_s
    if isinstance(decision, Decision):
        assert decision.num_prefill_hit == min(num_blocks, 7) * BLOCK_TOKENS, "the last token is computed"
        if pairs_s:
            taken = decision.placement.prefill_id, decision.placement.decode_id
            assert pairs_s[taken] <= min(pairs_s.values()) * (1 + 1e-9)


@settings(max_examples=200)
@given(nodes(), st.data())
def test_what_is_counted_on_is_there(found: list[NodeLoad], data: st.DataObject) -> None:
    num_tokens = 400
    hits = {x.node_id: data.draw(st.sampled_from([0, 0, 1, 12, 25, 25]), label=x.node_id) for x in found}
    decision = decide(found, Demand(num_tokens), costs_of(hits, num_tokens))
    if isinstance(decision, Obstacle):
        return
    by_id = {x.node_id: x for x in found}
    prefill, decode = by_id[decision.placement.prefill_id], by_id[decision.placement.decode_id]
    for x, num_hit in ((prefill, decision.num_prefill_hit), (decode, decision.num_decode_hit)):
        assert num_hit == min(hits[x.node_id] * BLOCK_TOKENS, num_hit), "it holds what is counted on"
    assert decode.free_tokens >= num_tokens + 1 - decision.num_decode_hit
    assert prefill.prompt_wait_s < CONFIG.max_prompt_wait_s
