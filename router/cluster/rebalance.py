"""Which running sequences go on at another node, and where: because theirs is about to leave, runs out of blocks, could
take a larger one without them, or has longer steps than another one. Pure.

Of a node that drains all go at once. From a node that is about to run out of blocks goes the one that it would preempt,
if moving it is predicted to take less than computing it again. If the next sequence of the line fits into no node, but
into the room of all, the node that lacks least gives the smallest one away that makes room. Sequences of a priority
better than 0 go where steps are shorter. Between two nodes whose steps are predicted to differ much the largest
sequence goes that leaves its new node, which has no prompts, the faster one. Moves cost both nodes memory bandwidth: a
node has few at a time, and a sequence moves only so often.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from baton.types import Role
from router.cluster.config import PolicyConfig
from router.cluster.load import NodeLoad
from router.cluster.policy import Demand
from router.cluster.pools import Pools
from router.cluster.rates import Rates

# Where a step's time is not known.
_STEP_S = 0.02
_MIN_HEADROOM_TOKENS, _MAX_HEADROOM_TOKENS = 16, 1024
# Nodes without room whose sequences are looked at in one go, those with the least time left first: there may be a
# hundred sequences on each, and a look at one takes 6 us of the router's one thread.
_MOST_LOOKS = 16
# What hides behind a prompt is not in the rate of bytes: a push takes this many times as long.
_RATE_MARGIN = 4


class MoveReason(Enum):
    # Its node is about to leave.
    DRAIN = "drain"
    # Its node runs out of blocks.
    ROOM = "room"
    # A sequence that waits needs the room of several nodes.
    DEFRAGMENT = "defragment"
    # It is of a better priority, and another node's steps are shorter.
    PRIORITY = "priority"
    # Its node's steps take longer than another one's.
    BALANCE = "balance"


class Item(Protocol):
    """A sequence; compared by identity."""

    def demand(self, now: float) -> Demand: ...

    def can_move_from(self, node_id: str) -> bool:
        """It decodes there and may go on elsewhere."""


ItemT = TypeVar("ItemT", bound=Item)


@dataclass(frozen=True, slots=True)
class Planned(Generic[ItemT]):
    item: ItemT
    source_id: str
    target_id: str
    reason: MoveReason
    # That it may generate until it has moved.
    num_headroom_tokens: int


@dataclass(frozen=True, slots=True)
class _Candidate(Generic[ItemT]):
    item: ItemT
    num_tokens: int
    priority: int
    # Nodes that failed it before.
    avoid: Collection[str]


@dataclass(frozen=True, slots=True)
class _Targets:
    """Nodes that may be given a sequence, the better ones first, and the room of that with most."""

    tiers: list[list[NodeLoad]]
    most_tokens: int


class Rebalance(Generic[ItemT]):
    """Knows which moves are under way, and when a sequence was last to move."""

    def __init__(self, config: PolicyConfig, rates: Rates) -> None:
        self._config = config
        self._rates = rates
        self._under_way: dict[ItemT, Planned[ItemT]] = {}
        self._num_out: Counter[str] = Counter()
        self._num_in: Counter[str] = Counter()
        self._began_s: dict[ItemT, float] = {}

    def began(self, move: Planned[ItemT], now: float) -> None:
        assert move.item not in self._under_way, "a sequence moves once at a time"
        self._under_way[move.item] = move
        self._num_out[move.source_id] += 1
        self._num_in[move.target_id] += 1
        self._began_s[move.item] = now

    def ended(self, item: ItemT) -> None:
        move = self._under_way.pop(item)
        for counts, node_id in ((self._num_out, move.source_id), (self._num_in, move.target_id)):
            counts[node_id] -= 1
            if not counts[node_id]:
                del counts[node_id]

    def forget(self, item: ItemT) -> None:
        """It is over."""
        self._began_s.pop(item, None)

    def next(
        self,
        nodes: Iterable[NodeLoad],
        pools: Pools,
        on_node: Mapping[str, Collection[ItemT]],
        now: float,
        *,
        num_wanted_tokens: int = 0,
        preferred: Mapping[ItemT, str] = MappingProxyType({}),
    ) -> Planned[ItemT] | None:
        """The most urgent move; ``on_node`` has the sequences of each node, the youngest last. ``num_wanted_tokens``:
        what the next of the line needs, if no node has room for it. ``preferred``: the sequences of a priority better
        than 0, and the nodes where they decode."""
        config = self._config
        giving = [n for n in nodes if n.node_id in on_node and self._num_out[n.node_id] < config.max_moves]
        if draining := [node for node in giving if node.status.draining]:
            # Whatever node it is: where a sequence is now it cannot stay.
            targets = self._targets(pools[Role.DECODE], pools[Role.MIXED], pools[Role.PREFILL])
            for node in draining if targets.most_tokens > 0 else ():
                if (move := self._drain(node, on_node[node.node_id], targets, now)) is not None:
                    return move
        if short := [n for n in giving if not n.status.draining and self._left_s(n) <= config.room_ahead_s]:
            targets = self._targets([n for n in _that_decode(pools) if self._left_s(n) > 2 * config.room_ahead_s])
            urgent = heapq.nsmallest(_MOST_LOOKS, short, key=self._left_s) if targets.most_tokens > 0 else []
            for node in urgent:
                if (move := self._room(node, on_node[node.node_id], targets, now)) is not None:
                    return move
        if num_wanted_tokens and (move := self._defragment(pools, on_node, num_wanted_tokens, now)) is not None:
            return move
        if preferred and (move := self._prefer(pools, preferred, now)) is not None:
            return move
        return self._balance(pools, on_node, now)

    def check(self, moving: Collection[ItemT]) -> None:
        """The books balance; for tests."""
        assert set(self._under_way) == set(moving)
        assert self._num_out.total() == self._num_in.total() == len(self._under_way)

    # -- the rules

    def _drain(self, node: NodeLoad, there: Collection[ItemT], targets: _Targets, now: float) -> Planned[ItemT] | None:
        for one in self._candidates(there, node, self._config.drain_again_s, now):
            move = self._plan(one, node, targets, MoveReason.DRAIN)
            if move is not None:
                return move
        return None

    def _room(self, node: NodeLoad, there: Collection[ItemT], targets: _Targets, now: float) -> Planned[ItemT] | None:
        youngest_first = list(self._candidates(there, node, self._config.move_again_s, now))[::-1]
        # As the node would preempt: the worst priority first, then the youngest.
        for one in sorted(youngest_first, key=lambda one: -one.priority):
            if self._move_s(one, node) < one.num_tokens * node.times.prompt_token_s:
                return self._plan(one, node, targets, MoveReason.ROOM)
        return None

    def _defragment(
        self, pools: Pools, on_node: Mapping[str, Collection[ItemT]], num_wanted_tokens: int, now: float
    ) -> Planned[ItemT] | None:
        """Off the node that lacks least goes the smallest sequence without which it has room, or else the largest."""
        nodes = _that_decode(pools)
        if any(node.free_tokens >= num_wanted_tokens for node in nodes):
            return None  # it waits for something else
        if sum(node.free_tokens for node in nodes) < num_wanted_tokens:
            return None
        for node in heapq.nsmallest(_MOST_LOOKS, nodes, key=lambda node: (-node.free_tokens, node.rank)):
            num_lacking = num_wanted_tokens - node.free_tokens - self._num_leaving_tokens(node.node_id, now)
            if num_lacking <= 0:
                return None  # as soon as those have moved that are under way
            if self._num_out[node.node_id] >= self._config.max_moves:
                continue
            there = list(self._candidates(on_node.get(node.node_id, ()), node, self._config.move_again_s, now))
            if sum(one.num_tokens for one in there) < num_lacking:
                continue
            calm = [n for n in nodes if n is not node and self._left_s(n) > 2 * self._config.room_ahead_s]
            targets = self._targets(calm)
            for one in sorted(there, key=lambda one: _by_fit(one.num_tokens, num_lacking)):
                if (move := self._plan(one, node, targets, MoveReason.DEFRAGMENT)) is not None:
                    return move
        return None

    def _num_leaving_tokens(self, node_id: str, now: float) -> int:
        moves = (move for move in self._under_way.values() if move.source_id == node_id)
        return sum(move.item.demand(now).num_known_tokens for move in moves)

    def _prefer(self, pools: Pools, preferred: Mapping[ItemT, str], now: float) -> Planned[ItemT] | None:
        """The best priority first."""
        config, nodes = self._config, {node.node_id: node for node in _that_decode(pools)}
        able = [node for node in nodes.values() if not node.pending_prompt_tokens]
        if len(nodes) < 2 or not able:
            return None
        fast = min(able, key=_step_s)
        found: list[tuple[int, float, int, _Candidate[ItemT], NodeLoad]] = []
        for item, node_id in islice(preferred.items(), _MOST_LOOKS):
            node = nodes.get(node_id)
            if node is None or node is fast or self._num_out[node_id] >= config.max_moves:
                continue
            for one in self._candidates((item,), node, config.move_again_s, now):
                then_s, now_s = _step_s(fast, 1, one.num_tokens), _step_s(node)
                if now_s > config.priority_factor * then_s and now_s - then_s > config.priority_after_s:
                    found.append((one.priority, then_s - now_s, len(found), one, node))
        for _, _, _, one, node in sorted(found, key=lambda each: each[:3]):
            if (move := self._plan(one, node, self._targets([fast]), MoveReason.PRIORITY)) is not None:
                return move
        return None

    def _balance(self, pools: Pools, on_node: Mapping[str, Collection[ItemT]], now: float) -> Planned[ItemT] | None:
        nodes, config = _that_decode(pools), self._config
        # Steps that compute prompts take longer than those that only decode, and what arrives waits for the one that
        # runs: up to seconds.
        able = [node for node in nodes if not node.pending_prompt_tokens]
        if len(nodes) < 2 or not able:
            return None
        slow, fast = max(nodes, key=_step_s), min(able, key=_step_s)
        slow_s, fast_s = _step_s(slow), _step_s(fast)
        is_worth_it = slow_s > config.balance_factor * fast_s and slow_s - fast_s > config.balance_after_s
        if not is_worth_it or self._num_out[slow.node_id] >= config.max_moves:
            return None
        found = self._candidates(on_node.get(slow.node_id, ()), slow, config.move_again_s, now)
        for one in sorted(found, key=lambda one: -one.num_tokens):
            if _step_s(fast, 1, one.num_tokens) < _step_s(slow, -1, -one.num_tokens):
                return self._plan(one, slow, self._targets([fast]), MoveReason.BALANCE)
        return None

    # -- what the rules ask

    def _candidates(
        self, there: Iterable[ItemT], node: NodeLoad, again_s: float, now: float
    ) -> Iterator[_Candidate[ItemT]]:  # fmt: skip
        """Those that decode there and were not to move lately."""
        for item in there:
            if now - self._began_s.get(item, -math.inf) >= again_s and item.can_move_from(node.node_id):
                demand = item.demand(now)
                yield _Candidate(item, demand.num_known_tokens, demand.priority, demand.avoid)

    def _targets(self, *tiers: Collection[NodeLoad]) -> _Targets:
        most = self._config.max_moves
        able = [[node for node in tier if self._num_in[node.node_id] < most] for tier in tiers]
        return _Targets(able, max((node.free_tokens for tier in able for node in tier), default=0))

    def _plan(
        self, one: _Candidate[ItemT], source: NodeLoad, targets: _Targets, reason: MoveReason
    ) -> Planned[ItemT] | None:
        """To the fastest node with room, of the first tier that has one."""
        num_headroom = self._headroom_tokens(one, source)
        num_room = one.num_tokens + num_headroom
        for tier in targets.tiers if num_room <= targets.most_tokens else ():
            able = [node for node in tier if node is not source and node.node_id not in one.avoid]
            fitting = [node for node in able if node.free_tokens >= num_room]
            if fitting:
                target = min(fitting, key=lambda node: (_step_s(node, 1, one.num_tokens), node.rank))
                return Planned(one.item, source.node_id, target.node_id, reason, num_headroom)
        return None

    def _move_s(self, one: _Candidate[ItemT], source: NodeLoad) -> float:
        num_bytes = one.num_tokens * source.token_bytes
        return self._config.move_latency_s + _RATE_MARGIN * num_bytes * self._rates.move_byte_s

    def _headroom_tokens(self, one: _Candidate[ItemT], source: NodeLoad) -> int:
        """What it generates until it has moved, and as much again."""
        step_s = _step_s(source) or _STEP_S
        tokens = math.ceil(2 * self._move_s(one, source) / step_s)
        return max(_MIN_HEADROOM_TOKENS, min(tokens, _MAX_HEADROOM_TOKENS))

    def _left_s(self, node: NodeLoad) -> float:
        """Until what decodes there has filled the free blocks."""
        num_running = node.num_decoding + node.foreign_sequences
        if not num_running:
            return math.inf
        return node.free_tokens / num_running * (_step_s(node) or _STEP_S)


def _by_fit(num_tokens: int, num_lacking: int) -> tuple[bool, int]:
    """What is enough comes first, the least of it before more; of what is not, the largest."""
    is_short = num_tokens < num_lacking
    return is_short, -num_tokens if is_short else num_tokens


def _that_decode(pools: Pools) -> list[NodeLoad]:
    return [*pools[Role.DECODE], *pools[Role.MIXED]]


def _step_s(node: NodeLoad, more_sequences: int = 0, more_tokens: int = 0) -> float:
    """Of a step with all that decodes there, and so much more."""
    num_running = node.num_decoding + node.foreign_sequences + more_sequences
    return node.times.step_s(0, num_running, node.pending_decode_tokens + more_tokens)
