"""The cluster-level scheduler: which node runs the prompt and which generates the tokens. Pure.

Rules, after Splitwise (section IV.A), applied when a request arrives:

1. Join the shortest queue: of the prompt pool for the prompt, of the token pool for the tokens.
2. Overflow: a pool whose shortest queue is longer than a threshold comes after the mixed nodes if one of these has less
   to do. A node without room, or with too many prompts pending, is no candidate; mixed nodes come next.
3. Borrow: if the pool of a phase and the mixed nodes are gone, the other pool runs that phase.

A rule is a term of a node's cost; the node with the least sum runs the phase. Prompt and tokens are looked at apart:
the best decode node is the same whichever node runs the prompt, except where a breaker is open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from baton.types import Role
from router.cluster.breakers import PairBreakers
from router.cluster.config import PolicyConfig
from router.cluster.load import Rank
from router.cluster.pools import Pools

# More than any queue: a pool with this term comes after all nodes of one without it.
_LATER_TOKENS = 1 << 60


@dataclass(frozen=True, slots=True)
class Demand:
    """What a sequence asks for: KV of ``num_known_tokens`` now, and a decode phase unless one token completes it."""

    num_known_tokens: int
    is_single_token: bool = False
    # Nodes blamed by this request's earlier attempts: used only if there is no other.
    avoid: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Equal ids mean colocated: the node keeps the sequence and no byte moves."""

    prefill_id: str
    decode_id: str

    @property
    def is_colocated(self) -> bool:
        return self.prefill_id == self.decode_id

    @property
    def node_ids(self) -> tuple[str, ...]:
        return (self.prefill_id,) if self.is_colocated else (self.prefill_id, self.decode_id)


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


@dataclass(frozen=True, slots=True)
class Decision:
    placement: Placement
    reason: Reason


class Cost(NamedTuple):
    """Cost of a phase on a node, in tokens that other sequences have to compute before or beside it."""

    queue_tokens: int
    # The phase has another pool that comes first.
    later_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.queue_tokens + self.later_tokens


class _Best(NamedTuple):
    node_id: str
    role: Role
    cost: Cost


def choose(
    pools: Pools, demand: Demand, breakers: PairBreakers, now: float, config: PolicyConfig
) -> Decision | Obstacle:
    """Both nodes of a request and why these, or why it must wait."""
    if not pools:
        return Obstacle.NO_NODE
    pair = None
    if demand.avoid:
        pair = _Search(pools.without(demand.avoid), demand, breakers, now, config).pair()
    pair = pair or _Search(pools, demand, breakers, now, config).pair()
    if pair is None:
        return Obstacle.NO_ROOM
    prefill, decode = pair
    return Decision(Placement(prefill.node_id, decode.node_id), _reason(prefill, decode, pools, demand))


def _reason(prefill: _Best, decode: _Best, pools: Pools, demand: Demand) -> Reason:
    if prefill.role is Role.MIXED:
        return Reason.OVERFLOW if pools[Role.PREFILL] else Reason.MIXED
    if decode.role is Role.MIXED:
        return Reason.OVERFLOW if pools[Role.DECODE] else Reason.MIXED
    if prefill.role is Role.PREFILL and decode.role is Role.DECODE:
        return Reason.POOLS
    return Reason.SINGLE_TOKEN if prefill.role is Role.PREFILL and demand.is_single_token else Reason.BORROWED


class _Search:
    """One look at the nodes for one request. No list of nodes is sorted and no pair of nodes is made."""

    def __init__(
        self,
        pools: Pools,
        demand: Demand,
        breakers: PairBreakers,
        now: float,
        config: PolicyConfig,
    ) -> None:
        self._pools = pools
        self._num_tokens = demand.num_known_tokens + 1
        self._breakers = breakers
        self._now = now
        self._config = config
        has_token_pool = bool(pools[Role.DECODE] or pools[Role.MIXED])
        # Whether a sequence that the prompt pool computes is decoded there too.
        self._stays_in_prompt_pool = demand.is_single_token or not has_token_pool
        self._decode = None if self._stays_in_prompt_pool else self._best_decode({})

    def pair(self) -> tuple[_Best, _Best] | None:
        """The best prefill node that has a path to a decode node, and the best such decode node.

        A path is blocked while its breaker is open. If all are blocked, the one that reopens first is taken.
        """
        soonest: tuple[float, _Best, _Best] | None = None
        blocked: set[str] = set()
        while (prefill := self._best_prefill(blocked)) is not None:
            open_of = self._breakers.open_of(prefill.node_id, self._now)
            decode = prefill if self._stays(prefill.role) else self._decode
            assert decode is not None
            if decode.node_id not in open_of:
                return prefill, decode
            if decode is not prefill:
                if (other := self._best_decode(open_of)) is not None:
                    return prefill, other
                decode = self._soonest_decode(open_of)
            blocked.add(prefill.node_id)
            reopens_at_s = open_of[decode.node_id]
            if soonest is None or reopens_at_s < soonest[0]:
                soonest = reopens_at_s, prefill, decode
        return None if soonest is None else soonest[1:]

    def _stays(self, role: Role) -> bool:
        return role is not Role.PREFILL or self._stays_in_prompt_pool

    def _best_prefill(self, blocked: Collection[str]) -> _Best | None:
        found: _Best | None = None
        # A prompt longer than the limit still runs, on a node that has nothing else to compute.
        limit = self._config.max_pending_prompt_tokens
        for role, later_tokens in self._prompt_pools().items():
            stays = self._stays(role)
            if not stays and self._decode is None:
                continue
            num_tokens = self._num_tokens if stays else 0
            ranks = (
                node.prompt_rank
                for node in self._pools[role]
                if node.pending_prompt_tokens < limit
                and (not stays or node.free_tokens >= num_tokens)
                and node.node_id not in blocked
            )
            found = _cheaper(found, min(ranks, default=None), role, later_tokens)
        return found

    def _best_decode(self, blocked: Collection[str]) -> _Best | None:
        """For a prompt that ran in the prompt pool."""
        found: _Best | None = None
        for role, later_tokens in self._token_pools().items():
            ranks = (
                node.decode_rank
                for node in self._pools[role]
                if node.free_tokens >= self._num_tokens and node.node_id not in blocked
            )
            found = _cheaper(found, min(ranks, default=None), role, later_tokens)
        return found

    def _soonest_decode(self, open_of: Mapping[str, float]) -> _Best:
        """All paths of a prefill node are blocked: the decode node of the one that reopens first."""
        candidates = (
            (open_of[node.node_id], later_tokens, node.decode_rank, node.role)
            for role, later_tokens in self._token_pools().items()
            for node in self._pools[role]
            if node.free_tokens >= self._num_tokens
        )
        _, later_tokens, rank, role = min(candidates, key=lambda candidate: candidate[:3])
        return _Best(rank.node_id, role, Cost(rank.queue_tokens, later_tokens))

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


def _cheaper(found: _Best | None, rank: Rank | None, role: Role, later_tokens: int) -> _Best | None:
    """``found``, or the node of this rank if it costs less."""
    if rank is None:
        return found
    cost = Cost(rank.queue_tokens, later_tokens)
    return (
        found if found is not None and found.cost.total_tokens <= cost.total_tokens else _Best(rank.node_id, role, cost)
    )
