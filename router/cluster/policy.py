"""The cluster-level scheduler: which node runs the prompt and which generates the tokens. Pure.

Rules, after Splitwise (section IV.A) and what came since, applied when a request arrives. All compare predicted seconds
(`costs`): of the request itself, and of what it adds to others.

1. Pools: of the prompt pool the node where the prompt is ready first, of the token pool the one where all tokens
   together are ready first. A node without room, or whose prompts take too long already, is no candidate.
2. Overflow: a mixed node does all of it, or generates the tokens, if that saves much. Mixed nodes alone do all of it.
3. Whole: one node does all of it, if that saves much: a node of the token pool, or of the prompt pool if that keeps the
   gaps between tokens within a target, or if the token pool is crowded. `--disaggregation` turns this off, or makes it
   the rule.
4. Prefix: the same if the node of the token pool holds more of the prompt than the prompt pool's; here all that is
   saved counts. In each rule, what nodes hold of the prompt need be neither computed nor moved.
5. Borrow: if the queue of the prompt pool is too long or a pool has no room, a node of the other pool does all of it,
   whatever it disturbs, while enough nodes of its pool do their own work alone. If a pool is gone, the other one works.

Prompt and tokens are looked at apart: the best decode node is the same whichever node runs the prompt, except where a
breaker is open. No list of nodes is sorted and no pair of nodes is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from baton.prefix import PrefixScheme
from baton.types import MAX_COUNT, Role
from router.cluster.breakers import PairBreakers
from router.cluster.config import PolicyConfig
from router.cluster.costs import Costs, Work
from router.cluster.load import NodeLoad, Placement
from router.cluster.pools import Pools

# Less than any node has: no room is needed.
_NO_ROOM = -(1 << 62)


class Keyed(Protocol):
    """A prompt, as far as placement is concerned."""

    def keys(self, scheme: PrefixScheme) -> Iterable[int]:
        """Of its full blocks; see baton.prefix.key_of. Only as many are computed as are taken."""
        ...


@dataclass(frozen=True, slots=True)
class Demand:
    """What a sequence asks for: KV of ``num_known_tokens`` now, and a decode phase unless one token completes it."""

    num_known_tokens: int
    is_single_token: bool = False
    # Further tokens that it may generate at most.
    max_new_tokens: int = MAX_COUNT
    # Nodes blamed by this request's earlier attempts: used only if there is no other.
    avoid: Collection[str] = ()
    # None: no node is sought for what it holds.
    prompt: Keyed | None = None
    # Of a client's waiting sequences the smaller number comes first.
    priority: int = 0


class Obstacle(Enum):
    """Why nothing was placed. NO_ROOM: the request waits until a node has room."""

    NO_NODE = "no node is available"
    NO_ROOM = "no node has room"


class Reason(Enum):
    """The rule that put a request where it runs."""

    # Prompt pool to token pool: what disaggregation is for.
    POOLS = "pools"
    # A mixed node took a phase although that phase has a pool of its own.
    OVERFLOW = "overflow"
    # Mixed nodes, there being no pool for the phase.
    MIXED = "mixed"
    # One token completes it: there is nothing to hand over.
    SINGLE_TOKEN = "single_token"  # noqa: S105 - not that kind of token
    # One node of a pool does all of it, which takes less time than two.
    WHOLE = "whole"
    # The pool that a phase needs is gone, full or too far behind; the other one does its work.
    BORROWED = "borrowed"
    # A decode node does all of it, as it holds more of the prompt than the prompt pool.
    PREFIX = "prefix"


@dataclass(frozen=True, slots=True)
class Decision:
    placement: Placement
    reason: Reason
    # Leading tokens that need not be computed, and those that need no room and no move on the decode node.
    num_prefill_hit: int = 0
    num_decode_hit: int = 0


class _Best(NamedTuple):
    """A node for a phase."""

    node: NodeLoad
    seconds: float
    # Leading tokens of the request that the node holds.
    num_hit: int = 0
    # Else there is room only if other sequences have these tokens in use.
    surely_has_room: bool = True


class _Option(NamedTuple):
    """Nodes for the request."""

    prefill: _Best
    decode: _Best
    seconds: float
    reason: Reason
    # The breaker between them is open.
    is_blocked: bool = False


class _Phase(NamedTuple):
    """What is sought: what it needs of a node that holds so many tokens of it, and which nodes can do it."""

    work: Callable[[int], Work]
    needs_room: bool
    max_wait_s: float


def choose(
    pools: Pools, demand: Demand, breakers: PairBreakers, now: float, config: PolicyConfig, costs: Costs
) -> Decision | Obstacle:
    """Both nodes of a request and why these, or why it must wait."""
    if not pools:
        return Obstacle.NO_NODE
    option = None
    if demand.avoid:
        option = _Search(pools.without(demand.avoid), demand, breakers, now, config, costs).option()
    option = option or _Search(pools, demand, breakers, now, config, costs).option()
    if option is None:
        return Obstacle.NO_ROOM
    prefill, decode = option.prefill, option.decode
    num_prefill_hit = costs.prompt_hit(prefill.num_hit)
    return Decision(
        Placement(prefill.node.node_id, decode.node.node_id),
        option.reason,
        num_prefill_hit,
        num_prefill_hit if prefill.node is decode.node else decode.num_hit,
    )


class _Search:
    """One look at the nodes for one request."""

    def __init__(
        self,
        pools: Pools,
        demand: Demand,
        breakers: PairBreakers,
        now: float,
        config: PolicyConfig,
        costs: Costs,
    ) -> None:
        self._pools = pools
        self._demand = demand
        # The only token of an answer needs no room.
        self._num_tokens = demand.num_known_tokens + (not demand.is_single_token)
        self._breakers = breakers
        self._now = now
        self._config = config
        self._costs = costs
        # A prompt that is longer than the limit still runs where no other one waits.
        self._prompt = _Phase(costs.prompt, False, config.max_prompt_wait_s)
        self._decode = _Phase(costs.tokens, True, math.inf)
        self._whole = _Phase(costs.whole, True, config.max_prompt_wait_s)

    def option(self) -> _Option | None:
        mode = self._config.disaggregation
        if mode == "never":
            return self._whole_in(*Role)
        found = self._with_mixed(self._split())
        if found is None and not self._pools[Role.PREFILL] and not self._pools[Role.MIXED]:
            return _on_one(self._best(Role.DECODE, self._whole), Reason.BORROWED)
        if mode == "always":
            return found
        return self._borrowed(found if found is None else self._or_whole(found))

    # ── The pools ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _split(self) -> _Option | None:
        """The best node of the prompt pool that has a path to a decode node, and the best such decode node.

        A path is blocked while its breaker is open. If all are blocked, the one that reopens first is taken.
        """
        has_token_pool = bool(self._pools[Role.DECODE] or self._pools[Role.MIXED])
        if self._demand.is_single_token or not has_token_pool:
            reason = Reason.SINGLE_TOKEN if self._demand.is_single_token else Reason.BORROWED
            return _on_one(self._best(Role.PREFILL, self._whole), reason)
        first = self._tokens(())
        soonest: tuple[float, _Best, _Best] | None = None
        blocked: set[str] = set()
        while first is not None and (prefill := self._best(Role.PREFILL, self._prompt, blocked)) is not None:
            open_of = self._breakers.open_of(prefill.node.node_id, self._now)
            decode = first if first.node.node_id not in open_of else self._tokens(open_of)
            if decode is not None:
                return self._pair(prefill, decode)
            blocked.add(prefill.node.node_id)
            reopening = self._soonest(open_of, first)
            reopens_at_s = open_of[reopening.node.node_id]
            if soonest is None or reopens_at_s < soonest[0]:
                soonest = reopens_at_s, prefill, reopening
        return None if soonest is None else self._pair(*soonest[1:])._replace(is_blocked=True)

    def _tokens(self, blocked: Collection[str]) -> _Best | None:
        """For a prompt that the prompt pool computes."""
        own = self._best(Role.DECODE, self._decode, blocked)
        mixed = self._best(Role.MIXED, self._decode, blocked)
        if own is None or mixed is None:
            return own or mixed
        return mixed if self._is_much_better(mixed, own) else own

    def _soonest(self, open_of: Mapping[str, float], first: _Best) -> _Best:
        """All paths of a prefill node are blocked: the decode node of the one that reopens first. ``first`` is one."""
        candidates = [
            (open_of[node.node_id], role is Role.MIXED, node.rank, node)
            for role in (Role.DECODE, Role.MIXED)
            for node in self._pools[role]
            if node.free_tokens >= self._num_tokens
        ]
        if not candidates:  # there is room for what ``first`` does not hold, and nowhere for all
            return first
        node = min(candidates, key=lambda candidate: candidate[:3])[3]
        return self._as_best(node, self._decode.work(0).seconds(node), self._decode, 0)

    def _pair(self, prefill: _Best, decode: _Best) -> _Option:
        reason = Reason.POOLS
        if decode.node.home_role is Role.MIXED:
            reason = Reason.OVERFLOW if self._pools[Role.DECODE] else Reason.MIXED
        return _Option(prefill, decode, prefill.seconds + decode.seconds, reason)

    def _with_mixed(self, split: _Option | None) -> _Option | None:
        """``split``, or a mixed node that does all of it."""
        reason = Reason.OVERFLOW if self._pools[Role.PREFILL] else Reason.MIXED
        mixed = _on_one(self._best(Role.MIXED, self._whole), reason)
        if split is None or mixed is None:
            return split or mixed
        if split.is_blocked:
            return mixed
        own = split.decode._replace(seconds=split.seconds)
        return mixed if self._is_much_better(mixed.decode, own) else split

    # ── Leaving the pools ───────────────────────────────────────────────────────────────────────────────────────────

    def _or_whole(self, found: _Option) -> _Option:
        """``found``, or one node of a pool for all of it. Where no time was measured yet, nothing is left for it."""
        if not found.prefill.node.is_measured and not self._costs.hits:
            return found
        least_s = self._costs.least_s(found.prefill.node, found.decode.node)
        if not self._costs.hits and found.seconds - least_s <= self._config.leave_saving_s:
            return found  # no node can save as much
        # Tokens that a prefill node generates come with gaps as long as the prompts there.
        may_keep = found.decode.node.is_crowded or found.prefill.node.node.tbt_target_s is not None
        whole = self._whole_in(Role.DECODE, Role.PREFILL) if may_keep else self._whole_in(Role.DECODE)
        if whole is None or not whole.prefill.surely_has_room:
            return found
        if whole.prefill.node.home_role is Role.DECODE and whole.prefill.num_hit > found.prefill.num_hit:
            return whole._replace(reason=Reason.PREFIX) if whole.seconds < found.seconds else found
        return whole if self._is_much_less(whole.seconds, found.seconds) else found

    def _whole_in(self, *roles: Role) -> _Option | None:
        options = [_on_one(self._best(role, self._whole), Reason.WHOLE) for role in roles]
        able = [option for option in options if option is not None]
        return min(able, key=lambda option: (not option.prefill.surely_has_room, option.seconds), default=None)

    def _borrowed(self, found: _Option | None) -> _Option | None:
        """``found``, or a node that a pool lends."""
        config, costs = self._config, self._costs
        if found is not None and found.prefill.node.prompt_wait_s <= config.borrow_after_s:
            return found
        candidates = [
            (costs.ttft_s(node, 0), node.rank, node)
            for role in ((Role.DECODE, Role.PREFILL) if found is None else (Role.DECODE,))
            for node in self._pools.to_lend(role, config.min_pool_nodes)
            if node.free_tokens >= self._num_tokens and node.prompt_wait_s < config.max_prompt_wait_s
        ]
        ttft_s, _, node = min(candidates, key=lambda candidate: candidate[:2], default=(math.inf, None, None))
        if node is None or (found is not None and not self._is_much_less(ttft_s, self._ttft_s(found))):
            return found
        num_hit = costs.num_hit(node.node_id)
        return _on_one(_Best(node, costs.whole(num_hit).seconds(node), num_hit), Reason.BORROWED)

    def _ttft_s(self, found: _Option) -> float:
        return self._costs.ttft_s(found.prefill.node, found.prefill.num_hit)

    def _is_much_better(self, other: _Best, own: _Best) -> bool:
        if other.surely_has_room is not own.surely_has_room:
            return other.surely_has_room
        return self._is_much_less(other.seconds, own.seconds)

    def _is_much_less(self, seconds: float, than_s: float) -> bool:
        config = self._config
        return than_s - seconds > config.leave_saving_s and seconds < config.leave_share * than_s

    # ── The nodes of one pool ───────────────────────────────────────────────────────────────────────────────────────

    def _best(self, role: Role, phase: _Phase, blocked: Collection[str] = ()) -> _Best | None:
        """The node of the pool where the phase takes least time, of those that surely have room if there are any."""
        own = self._least(self._pools[role], phase, 0, blocked, self._num_tokens)
        if not self._costs.hits:
            return own
        found = [own]
        for hit in self._costs.hits:
            found += self._near(role, self._costs.tokens_of(hit), hit.node_ids, phase, blocked)
        able = [best for best in found if best is not None]
        # Of equal ones the first: the pool's own choice.
        best = min(able, key=lambda best: (not best.surely_has_room, best.seconds), default=None)
        if best is None or best.num_hit:
            return best
        return best._replace(num_hit=self._costs.num_hit(best.node.node_id))

    def _near(
        self, role: Role, num_hit: int, node_ids: Collection[str], phase: _Phase, blocked: Collection[str]
    ) -> Iterator[_Best]:
        """Of the nodes that hold equally much of the request, the one where the phase takes least time."""
        nodes = list(self._pools.among(role, node_ids))
        # The first question is the cheaper one, and nearly always enough.
        most = self._num_tokens
        sure = nodes
        if phase.needs_room:
            sure = [x for x in nodes if x.free_tokens >= most or x.surely_has_room(most, num_hit)]
        # It is not known which of a node's blocks are in use: where all have little room, one of them is asked.
        for group in (sure, nodes):
            best = self._least(group, phase, num_hit, blocked, most - num_hit)
            if best is not None:
                yield best._replace(surely_has_room=group is sure)
                break

    def _least(
        self, nodes: Collection[NodeLoad], phase: _Phase, num_hit: int, blocked: Collection[str], num_room_tokens: int
    ) -> _Best | None:
        work = phase.work(num_hit)
        found = work.least(nodes, num_room_tokens if phase.needs_room else _NO_ROOM, phase.max_wait_s, blocked)
        return None if found is None else self._as_best(found[0], found[1], phase, num_hit)

    def _as_best(self, node: NodeLoad, seconds: float, phase: _Phase, num_hit: int) -> _Best:
        move_s = self._costs.move_s(node, num_hit) if phase is self._decode else 0.0
        return _Best(node, seconds + move_s, num_hit)


def _on_one(best: _Best | None, reason: Reason) -> _Option | None:
    return None if best is None else _Option(best, best, best.seconds, reason)
