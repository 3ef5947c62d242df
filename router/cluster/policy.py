"""The cluster-level scheduler: which node runs the prompt and which generates the tokens. Pure.

Rules, after Splitwise (section IV.A), applied when a request arrives:

1. Join the shortest queue: of the prompt pool for the prompt, of the token pool for the tokens.
2. Overflow: a pool whose shortest queue is longer than a threshold comes after the mixed nodes if one of these has less
   to do. A node without room, or with too many prompts pending, is no candidate; mixed nodes come next.
3. Borrow: if the pool of a phase and the mixed nodes are gone, the other pool runs that phase.
4. Prefix: of the pool that rule 2 takes, a node that holds leading blocks of the prompt runs the phase if all of it
   then takes less time (`costs`) than on the node of rule 1. Where a decode node holds more of the prompt than that
   prefill node, and the whole request takes less time there, it runs there altogether.

A rule is a term of a node's cost; the node with the least sum runs the phase. Prompt and tokens are looked at apart:
the best decode node is the same whichever node runs the prompt, except where a breaker is open.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import NamedTuple, Protocol

from baton.prefix import PrefixScheme
from baton.types import Role
from router.cluster.breakers import PairBreakers
from router.cluster.config import PolicyConfig
from router.cluster.costs import Costs
from router.cluster.load import NodeLoad, Placement, Rank
from router.cluster.pools import Pools

_PROMPT_RANK: Callable[[NodeLoad], Rank] = attrgetter("prompt_rank")
_DECODE_RANK: Callable[[NodeLoad], Rank] = attrgetter("decode_rank")
# The first of these nodes that has room for so many tokens and is not blocked.
_Least = Callable[[Iterable[NodeLoad], int, Collection[str]], NodeLoad | None]
# More than any queue: a pool with this term comes after all nodes of one without it.
_LATER_TOKENS = 1 << 60


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
    # The pool that a phase needs is gone; another one does its work.
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


class Cost(NamedTuple):
    """Cost of a phase on a node, in tokens that other sequences have to compute before or beside it."""

    queue_tokens: int
    # The phase has another pool that comes first.
    later_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.queue_tokens + self.later_tokens


class _Best(NamedTuple):
    node: NodeLoad
    cost: Cost
    # Leading tokens of the request that the node holds.
    num_hit: int = 0
    # Else there is room only if other sequences have these tokens in use.
    surely_has_room: bool = True


def choose(
    pools: Pools,
    demand: Demand,
    breakers: PairBreakers,
    now: float,
    config: PolicyConfig,
    costs: Costs | None = None,
) -> Decision | Obstacle:
    """Both nodes of a request and why these, or why it must wait. ``costs``: some nodes hold a part of it."""
    if not pools:
        return Obstacle.NO_NODE
    pair = None
    if demand.avoid:
        pair = _Search(pools.without(demand.avoid), demand, breakers, now, config, costs).pair()
    pair = pair or _Search(pools, demand, breakers, now, config, costs).pair()
    if pair is None:
        return Obstacle.NO_ROOM
    prefill, decode, is_for_prefix = pair
    num_prefill_hit = 0 if costs is None else costs.prompt_hit(prefill.num_hit)
    return Decision(
        Placement(prefill.node.node_id, decode.node.node_id),
        Reason.PREFIX if is_for_prefix else _reason(prefill.node.role, decode.node.role, pools, demand),
        num_prefill_hit,
        num_prefill_hit if prefill.node is decode.node else decode.num_hit,
    )


def _reason(prefill: Role, decode: Role, pools: Pools, demand: Demand) -> Reason:
    if prefill is Role.MIXED:
        return Reason.OVERFLOW if pools[Role.PREFILL] else Reason.MIXED
    if decode is Role.MIXED:
        return Reason.OVERFLOW if pools[Role.DECODE] else Reason.MIXED
    if prefill is Role.PREFILL and decode is Role.DECODE:
        return Reason.POOLS
    return Reason.SINGLE_TOKEN if prefill is Role.PREFILL and demand.is_single_token else Reason.BORROWED


class _Search:
    """One look at the nodes for one request. No list of nodes is sorted and no pair of nodes is made."""

    def __init__(
        self,
        pools: Pools,
        demand: Demand,
        breakers: PairBreakers,
        now: float,
        config: PolicyConfig,
        costs: Costs | None,
    ) -> None:
        self._pools = pools
        self._num_tokens = demand.num_known_tokens + 1
        self._breakers = breakers
        self._now = now
        self._config = config
        self._costs = costs
        has_token_pool = bool(pools[Role.DECODE] or pools[Role.MIXED])
        # Whether a sequence that the prompt pool computes is decoded there too.
        self._stays_in_prompt_pool = demand.is_single_token or not has_token_pool
        self._decode = None if self._stays_in_prompt_pool else self._best_decode({})

    def pair(self) -> tuple[_Best, _Best, bool] | None:
        """The best prefill and decode node; or a decode node for both, and True."""
        pair = self._split()
        if pair is None:
            return None
        prefill, decode = pair
        if self._costs is not None and prefill.node is not decode.node:
            here = self._here(prefill, decode, self._costs)
            if here is not None:
                return here, here, True
        return prefill, decode, False

    def _split(self) -> tuple[_Best, _Best] | None:
        """The best prefill node that has a path to a decode node, and the best such decode node.

        A path is blocked while its breaker is open. If all are blocked, the one that reopens first is taken.
        """
        soonest: tuple[float, _Best, _Best] | None = None
        blocked: set[str] = set()
        while (prefill := self._best_prefill(blocked)) is not None:
            open_of = self._breakers.open_of(prefill.node.node_id, self._now)
            decode = prefill if self._stays(prefill.node.role) else self._decode
            assert decode is not None
            if decode.node.node_id not in open_of:
                return prefill, decode
            if decode is not prefill:
                if (other := self._best_decode(open_of)) is not None:
                    return prefill, other
                decode = self._soonest_decode(open_of, decode)
            blocked.add(prefill.node.node_id)
            reopens_at_s = open_of[decode.node.node_id]
            if soonest is None or reopens_at_s < soonest[0]:
                soonest = reopens_at_s, prefill, decode
        return None if soonest is None else soonest[1:]

    def _here(self, prefill: _Best, decode: _Best, costs: Costs) -> _Best | None:
        """A decode node that holds more of the prompt than ``prefill``, and does all of it sooner than the two."""
        split_s = costs.prompt_s(prefill.node, prefill.num_hit, stays=False)
        split_s += costs.decode_s(decode.node, decode.num_hit)
        limit = self._config.max_pending_prompt_tokens
        candidates = [
            (costs.here_s(best.node, best.num_hit), best.node.decode_rank, best)
            for best in self._near(Role.DECODE, 0, self._least_decode, {})
            if best.surely_has_room and best.num_hit > prefill.num_hit and best.node.pending_prompt_tokens < limit
        ]
        if not candidates:
            return None
        here_s, _, best = min(candidates, key=lambda candidate: candidate[:2])
        return best if here_s < split_s else None

    def _stays(self, role: Role) -> bool:
        return role is not Role.PREFILL or self._stays_in_prompt_pool

    def _best_prefill(self, blocked: Collection[str]) -> _Best | None:
        found: _Best | None = None
        near: list[_Best] = []
        for role, later_tokens in self._prompt_pools().items():
            stays = self._stays(role)
            if not stays and self._decode is None:
                continue
            least = self._least_staying_prompt if stays else self._least_prompt
            found = _cheaper(found, least(self._pools[role], self._num_tokens, blocked), _PROMPT_RANK, later_tokens)
            near += self._near(role, later_tokens, least, blocked, needs_room=stays)
        return self._nearest(found, near, self._prompt_s)

    def _best_decode(self, blocked: Collection[str]) -> _Best | None:
        """For a prompt that ran in the prompt pool."""
        found: _Best | None = None
        near: list[_Best] = []
        for role, later_tokens in self._token_pools().items():
            least = self._least_decode(self._pools[role], self._num_tokens, blocked)
            found = _cheaper(found, least, _DECODE_RANK, later_tokens)
            near += self._near(role, later_tokens, self._least_decode, blocked)
        return self._nearest(found, near, self._decode_s)

    def _least_prompt(self, nodes: Iterable[NodeLoad], num_tokens: int, blocked: Collection[str]) -> NodeLoad | None:
        """For a prompt that is handed over."""
        # A prompt longer than the limit still runs, on a node that has nothing else to compute.
        limit = self._config.max_pending_prompt_tokens
        able = (node for node in nodes if node.pending_prompt_tokens < limit and node.node_id not in blocked)
        return min(able, key=_PROMPT_RANK, default=None)

    def _least_staying_prompt(
        self, nodes: Iterable[NodeLoad], num_tokens: int, blocked: Collection[str]
    ) -> NodeLoad | None:
        """For one that stays: there has to be room for ``num_tokens``."""
        return self._least_prompt((node for node in nodes if node.free_tokens >= num_tokens), num_tokens, blocked)

    def _least_decode(self, nodes: Iterable[NodeLoad], num_tokens: int, blocked: Collection[str]) -> NodeLoad | None:
        able = (node for node in nodes if node.free_tokens >= num_tokens and node.node_id not in blocked)
        return min(able, key=_DECODE_RANK, default=None)

    def _near(
        self, role: Role, later_tokens: int, least: _Least, blocked: Collection[str], *, needs_room: bool = True
    ) -> Iterator[_Best]:
        """Of the nodes that hold equally much of the request, the one that comes first otherwise."""
        costs = self._costs
        for hit in () if costs is None else costs.hits:
            assert costs is not None
            num_hit = costs.tokens_of(hit)
            sure = nodes = list(self._pools.among(role, hit.node_ids))
            if needs_room:
                # The first question is the cheaper one, and nearly always enough.
                most = self._num_tokens
                sure = [x for x in nodes if x.free_tokens >= most or x.surely_has_room(most, num_hit)]
            # It is not known which of a node's blocks are in use: where all have little room, one of them is asked.
            for group in (sure, nodes):
                node = least(group, self._num_tokens - num_hit, blocked)
                if node is not None:
                    yield _Best(node, Cost(0, later_tokens), num_hit, surely_has_room=group is sure)
                    break

    def _nearest(self, found: _Best | None, near: list[_Best], seconds: Callable[[_Best], float]) -> _Best | None:
        """``found``, or one of ``near`` that takes less time and comes no later."""
        if not near or self._costs is None:
            return found
        if found is not None:
            num_hit = self._costs.num_hit(found.node.node_id)
            near.insert(0, _Best(found.node, Cost(0, found.cost.later_tokens), num_hit))
        # Of equal ones the first: the pool's own choice.
        return min(near, key=lambda best: (not best.surely_has_room, best.cost.later_tokens, seconds(best)))

    def _prompt_s(self, best: _Best) -> float:
        assert self._costs is not None
        return self._costs.prompt_s(best.node, best.num_hit, stays=self._stays(best.node.role))

    def _decode_s(self, best: _Best) -> float:
        assert self._costs is not None
        return self._costs.decode_s(best.node, best.num_hit)

    def _soonest_decode(self, open_of: Mapping[str, float], best: _Best) -> _Best:
        """All paths of a prefill node are blocked: the decode node of the one that reopens first. ``best`` is one."""
        candidates = [
            (open_of[node.node_id], later_tokens, node.decode_rank, node)
            for role, later_tokens in self._token_pools().items()
            for node in self._pools[role]
            if node.free_tokens >= self._num_tokens
        ]
        if not candidates:  # there is room for what ``best`` does not hold, and nowhere for all
            return best
        _, later_tokens, rank, node = min(candidates, key=lambda candidate: candidate[:3])
        return _Best(node, Cost(rank.queue_tokens, later_tokens))

    def _prompt_pools(self) -> Mapping[Role, int]:
        """The pools that may run the prompt, each with the term that orders it."""
        own, mixed = self._pools[Role.PREFILL], self._pools[Role.MIXED]
        if not own and not mixed:
            return {Role.DECODE: 0}
        threshold = self._config.overflow_prompt_tokens
        return self._in_order(Role.PREFILL, (x.prompt_rank for x in own), (x.prompt_rank for x in mixed), threshold)

    def _token_pools(self) -> Mapping[Role, int]:
        own, mixed = self._pools[Role.DECODE], self._pools[Role.MIXED]
        threshold = self._config.overflow_decode_tokens
        return self._in_order(Role.DECODE, (x.decode_rank for x in own), (x.decode_rank for x in mixed), threshold)

    def _in_order(self, role: Role, own: Iterator[Rank], mixed: Iterator[Rank], threshold: int) -> Mapping[Role, int]:
        if not self._pools[Role.MIXED]:
            return {role: 0}
        if not self._pools[role]:
            return {Role.MIXED: 0}
        own_tokens = min(own).queue_tokens
        if own_tokens > threshold and min(mixed).queue_tokens < own_tokens:
            return {role: _LATER_TOKENS, Role.MIXED: 0}
        return {role: 0, Role.MIXED: _LATER_TOKENS}


def _cheaper(
    found: _Best | None, node: NodeLoad | None, rank_of: Callable[[NodeLoad], Rank], later_tokens: int
) -> _Best | None:
    """``found``, or this node if it costs less."""
    if node is None:
        return found
    cost = Cost(rank_of(node).queue_tokens, later_tokens)
    return found if found is not None and found.cost.total_tokens <= cost.total_tokens else _Best(node, cost)
