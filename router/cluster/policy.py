"""The cluster-level scheduler: which node runs the prompt and which generates the tokens. Pure.

Splitwise (section IV.A): join the shortest queue in the prompt pool and in the token pool at arrival; overflow to the
mixed pool, then borrow from the opposite pool. It decides; it neither counts load (`load`) nor sends anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from baton.types import Role


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    # A pool whose shortest queue is longer than this overflows to a mixed node with a shorter one.
    overflow_prompt_tokens: int = 8192
    overflow_decode_tokens: int = 65536
    # No further prompt is sent to a node with this many pending; it waits in the router and can still go elsewhere.
    max_pending_prompt_tokens: int = 16384
    # Consecutive transfer failures that open a pair's breaker, and how long it stays open (doubling up to the maximum).
    breaker_failures: int = 2
    breaker_open_s: float = 1.0
    breaker_max_open_s: float = 30.0


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as seen for one decision. Pending tokens and free blocks include what is on its way to the node."""

    node_id: str
    role: Role
    is_available: bool
    pending_prompt_tokens: int
    pending_decode_tokens: int
    free_blocks: int
    block_tokens: int

    def has_room(self, num_tokens: int) -> bool:
        return self.free_blocks * self.block_tokens >= num_tokens

    @property
    def pending_tokens(self) -> int:
        return self.pending_prompt_tokens + self.pending_decode_tokens


@dataclass(frozen=True, slots=True)
class Demand:
    """What a sequence asks for: KV of ``num_known_tokens`` now, and a decode phase unless one token completes it."""

    num_known_tokens: int
    is_single_token: bool = False
    # Nodes blamed by this request's earlier attempts: used only if nobody else is there.
    avoid: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Equal ids mean colocated: the node keeps the sequence and no byte moves."""

    prefill_id: str
    decode_id: str

    @property
    def is_colocated(self) -> bool:
        return self.prefill_id == self.decode_id


class Obstacle(Enum):
    """NO_NODE: nobody serves. NO_ROOM: wait until somebody has room."""

    NO_NODE = "no node is available"
    NO_ROOM = "no node has room"


class Reason(Enum):
    """Which rule put a request where it runs."""

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


class _Breaker:
    __slots__ = ("failures", "open_s", "open_until_s", "trial_until_s")

    def __init__(self) -> None:
        self.failures = 0
        self.open_s = 0.0
        self.open_until_s = 0.0
        # A half-open breaker lets one request through and waits for its result until then.
        self.trial_until_s = 0.0


class PairBreakers:
    """Circuit breakers per (prefill, decode) pair, so that one bad path is avoided and tried again later.

    A breaker only orders preferences: when every pair is open, the policy uses the one that reopens first. No failure
    can therefore shut a pair out for good.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._breakers: dict[tuple[str, str], _Breaker] = {}

    def is_open(self, prefill_id: str, decode_id: str, now: float) -> bool:
        breaker = self._breakers.get((prefill_id, decode_id))
        return breaker is not None and (now < breaker.open_until_s or now < breaker.trial_until_s)

    def reopens_at(self, prefill_id: str, decode_id: str) -> float:
        breaker = self._breakers.get((prefill_id, decode_id))
        return 0.0 if breaker is None else max(breaker.open_until_s, breaker.trial_until_s)

    def used(self, prefill_id: str, decode_id: str, now: float) -> None:
        """A request goes over this pair; if the breaker is half-open, it is the trial."""
        breaker = self._breakers.get((prefill_id, decode_id))
        if breaker is not None and breaker.open_s > 0 and now >= breaker.open_until_s:
            breaker.trial_until_s = now + breaker.open_s

    def failed(self, prefill_id: str, decode_id: str, now: float) -> None:
        breaker = self._breakers.setdefault((prefill_id, decode_id), _Breaker())
        breaker.failures += 1
        breaker.trial_until_s = 0.0
        if breaker.failures >= self._config.breaker_failures and now >= breaker.open_until_s:
            doubled = breaker.open_s * 2 if breaker.open_s else self._config.breaker_open_s
            breaker.open_s = min(doubled, self._config.breaker_max_open_s)
            breaker.open_until_s = now + breaker.open_s

    def worked(self, prefill_id: str, decode_id: str) -> None:
        self._breakers.pop((prefill_id, decode_id), None)

    def forget(self, node_id: str) -> None:
        """The node is gone or is another incarnation: its history says nothing any more."""
        for pair in [p for p in self._breakers if node_id in p]:
            del self._breakers[pair]


def choose(
    nodes: Sequence[NodeView], demand: Demand, breakers: PairBreakers, now: float, config: PolicyConfig
) -> Placement | Obstacle:
    """Pick both nodes of a request, or say why it must wait."""
    available = [n for n in nodes if n.is_available]
    if not available:
        return Obstacle.NO_NODE
    welcome = [n for n in available if n.node_id not in demand.avoid]
    for candidates in (welcome, available):
        blocked: list[Placement] = []
        for pair in _pairs(candidates, demand, config):
            if not breakers.is_open(pair.prefill_id, pair.decode_id, now):
                return pair
            blocked.append(pair)
        if blocked:
            return min(blocked, key=lambda p: breakers.reopens_at(p.prefill_id, p.decode_id))
    return Obstacle.NO_ROOM


def reason_of(placement: Placement, nodes: Sequence[NodeView], demand: Demand) -> Reason:
    """Why `choose` came to this placement, in one word."""
    roles = {n.node_id: n.role for n in nodes}
    pools = {n.role for n in nodes if n.is_available}
    prefill, decode = roles[placement.prefill_id], roles[placement.decode_id]
    if Role.MIXED in (prefill, decode):
        has_own = Role.PREFILL in pools if prefill is Role.MIXED else Role.DECODE in pools
        return Reason.OVERFLOW if has_own else Reason.MIXED
    if prefill is Role.PREFILL and not placement.is_colocated:
        return Reason.POOLS
    return Reason.SINGLE_TOKEN if prefill is Role.PREFILL and demand.is_single_token else Reason.BORROWED


def _pairs(nodes: Sequence[NodeView], demand: Demand, config: PolicyConfig) -> Iterator[Placement]:
    """Every pair that could take the request now, best first. Of a hundred nodes in each pool there are ten thousand,
    and hardly ever is more than the first looked at."""
    num_tokens = demand.num_known_tokens + 1
    decodes = [n for n in _decode_order(nodes, config) if n.has_room(num_tokens)]
    has_token_pool = any(n.role is not Role.PREFILL for n in nodes)
    for prefill in _prefill_order(nodes, config):
        stays = prefill.role is not Role.PREFILL or demand.is_single_token or not has_token_pool
        if not stays:
            yield from (Placement(prefill.node_id, d.node_id) for d in decodes)
        elif prefill.has_room(num_tokens):
            yield Placement(prefill.node_id, prefill.node_id)


def _prefill_order(nodes: Sequence[NodeView], config: PolicyConfig) -> list[NodeView]:
    """Nodes for the prompt, shortest queue first: the prompt pool, mixed nodes, and only if both are gone the rest."""
    own = _shortest(nodes, Role.PREFILL, lambda n: n.pending_prompt_tokens)
    mixed = _shortest(nodes, Role.MIXED, lambda n: n.pending_tokens)
    if own and mixed:
        is_behind = own[0].pending_prompt_tokens > config.overflow_prompt_tokens
        overflows = is_behind and mixed[0].pending_tokens < own[0].pending_prompt_tokens
        order = mixed + own if overflows else own + mixed
    else:
        order = own or mixed or _shortest(nodes, Role.DECODE, lambda n: n.pending_tokens)
    limit = config.max_pending_prompt_tokens
    # A prompt longer than the limit still runs, on a node that has nothing else to compute.
    return [n for n in order if n.pending_prompt_tokens < limit]


def _decode_order(nodes: Sequence[NodeView], config: PolicyConfig) -> list[NodeView]:
    """Nodes for the tokens of a prompt that ran in the prompt pool: the token pool, then mixed nodes."""
    own = _shortest(nodes, Role.DECODE, lambda n: n.pending_decode_tokens)
    mixed = _shortest(nodes, Role.MIXED, lambda n: n.pending_tokens)
    if own and mixed and own[0].pending_decode_tokens > config.overflow_decode_tokens:
        overflows = mixed[0].pending_tokens < own[0].pending_decode_tokens
        return mixed + own if overflows else own + mixed
    return own + mixed


def _shortest(nodes: Sequence[NodeView], role: Role, queue: Callable[[NodeView], int]) -> list[NodeView]:
    """Nodes of a role by queue length; ties go to the node with more free blocks, then to the smaller id."""
    return sorted((n for n in nodes if n.role is role), key=lambda n: (queue(n), -n.free_blocks, n.node_id))
