"""When a node belongs to another pool from now on, because the load has shifted for long. Pure.

A pool's pressure is what a request loses there, in predicted seconds: in the prompt pool the queue before it, in the
token pool what its tokens take longer than on an empty node. If a pool's pressure has been a multiple of the other's
for long, and the other one has slack, a node changes pools. Borrowing (`policy`) bridges the time until then.

Changes are rare by construction: one at a time, each a while after the one before, and each that takes back the one
before doubles that while. So under a constant load their number grows with the logarithm of the time. Routers do not
talk to each other: each sees the others' changes in the nodes' statuses and waits likewise, and a node refuses a change
that is based on a pool it has left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from baton.types import Role
from router.cluster.config import PolicyConfig
from router.cluster.load import NodeLoad
from router.cluster.pools import Pools

# Pools are looked at so often: what happens within seconds is not what changes them.
_LOOK_S = 1.0
# Of its time or its blocks, what a pool may have in use once it has a node less.
_MOST_USED = 0.9
# A node has no room if so few of its blocks are free.
_LEAST_FREE = 0.05
# A while that was doubled is halved again when so many of it have passed without a change.
_QUIET_WHILES = 8
# The statuses show within this time what was asked of a node.
_SHOWN_AFTER_S = 5.0
_POOLS = (Role.PREFILL, Role.DECODE)


@dataclass(frozen=True, slots=True)
class Change:
    """A node is to belong to another pool."""

    node_id: str
    role: Role
    # The pool that it leaves.
    expected: Role
    # Pressure of the pool that it joins, and of the one that it leaves.
    pressure_s: float
    other_pressure_s: float


class Repurpose:
    """Call `look` regularly; what it returns is to be asked of the node, whose statuses show the outcome."""

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._looked_s = -math.inf
        self._pressure_s = dict.fromkeys(_POOLS, 0.0)
        # The pool that is behind, and since when.
        self._behind: Role | None = None
        self._since_s = 0.0
        # Home pools as they were last seen, by node.
        self._homes: dict[str, Role] = {}
        # The pool that the last change went to, and when; no other comes before so many seconds have passed.
        self._last: Role | None = None
        self._changed_s = -math.inf
        self._pause_s = config.repurpose_after_s or 0.0

    def look(self, pools: Pools, num_output_tokens: float, now: float) -> Change | None:
        config = self._config
        if config.repurpose_after_s is None or now - self._looked_s < _LOOK_S:
            return None
        self._note_changes(pools, now)
        present_s = self._measure(pools, num_output_tokens, now)
        behind = self._find_behind(pools, self._pressure_s)
        if behind is not self._behind:
            self._behind, self._since_s = behind, now
        if behind is None or now - self._since_s < config.repurpose_after_s or now - self._changed_s < self._pause_s:
            return None
        # An average remembers a burst that is over.
        node = self._to_give(pools, _other(behind)) if self._find_behind(pools, present_s) is behind else None
        if node is None:
            return None
        other = _other(behind)
        change = Change(node.node_id, behind, other, self._pressure_s[behind], self._pressure_s[other])
        # Asked once: should the node refuse, all is measured anew before the next.
        self._note_change(behind, now)
        return change

    def _note_changes(self, pools: Pools, now: float) -> None:
        """Nodes that another router, or an operator, has put into another pool."""
        homes = {node.node_id: role for role in Role for node in pools[role]}
        for node_id, role in homes.items():
            was_asked = now - self._changed_s < _SHOWN_AFTER_S and role is self._last
            if self._homes.get(node_id, role) is not role and not was_asked:
                self._note_change(role, now)
        self._homes = homes

    def _note_change(self, role: Role, now: float) -> None:
        least_s = self._config.repurpose_after_s or 0.0
        while self._pause_s > least_s and now - self._changed_s > _QUIET_WHILES * self._pause_s:
            self._pause_s /= 2
        if self._last not in (None, role):
            self._pause_s *= 2
        self._last, self._changed_s = role, now
        # What was measured is of other pools.
        self._behind, self._pressure_s = None, dict.fromkeys(_POOLS, 0.0)

    def _measure(self, pools: Pools, num_output_tokens: float, now: float) -> dict[Role, float]:
        """The present pressures; the averages over the window follow them."""
        passed_s = min(now - self._looked_s, self._config.repurpose_window_s)
        share = 1 - math.exp(-passed_s / self._config.repurpose_window_s)
        self._looked_s = now
        present_s = {
            Role.PREFILL: _mean([node.prompt_wait_s for node in pools[Role.PREFILL]]),
            Role.DECODE: _mean([_token_pressure_s(node, num_output_tokens) for node in pools[Role.DECODE]]),
        }
        for role, seconds in present_s.items():
            self._pressure_s[role] += (seconds - self._pressure_s[role]) * share
        return present_s

    def _find_behind(self, pools: Pools, pressure_s: Mapping[Role, float]) -> Role | None:
        """The pool whose pressure would still be a multiple of the other's if it had a node of it."""
        config = self._config
        for role in _POOLS:
            pool, other = pools[role], pools[_other(role)]
            if not pool or len(other) <= max(1, config.min_pool_nodes):
                continue
            then_s = pressure_s[role] * len(pool) / (len(pool) + 1)
            more = len(other) / (len(other) - 1)
            other_then_s = pressure_s[_other(role)] * more
            if then_s > max(config.repurpose_pressure_s, config.repurpose_factor * other_then_s):
                return role if _mean(list(map(_used_share, other))) * more < _MOST_USED else None
        return None

    @staticmethod
    def _to_give(pools: Pools, role: Role) -> NodeLoad | None:
        """A node that does the other pool's work already, else the first by name, as all routers choose the same."""
        free = [node for node in pools[role] if not node.status.is_pinned]
        return min(free, key=lambda node: (node.role is role, node.node_id), default=None)


def _other(role: Role) -> Role:
    return Role.DECODE if role is Role.PREFILL else Role.PREFILL


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _token_pressure_s(node: NodeLoad, num_output_tokens: float) -> float:
    status, times = node.status, node.times
    step_s = times.step_s(0, status.num_running, status.running_tokens)
    extra_s = max(0.0, step_s - times.base_s - times.sequence_s)
    if status.total_blocks and node.free_blocks < _LEAST_FREE * status.total_blocks:
        # Another one waits until one of those here has ended.
        extra_s += step_s
    return num_output_tokens * extra_s


def _used_share(node: NodeLoad) -> float:
    """Of its time with prompts, or of its blocks."""
    status = node.status
    if node.home_role is Role.PREFILL:
        return node.busy_share
    return 1 - node.free_blocks / status.total_blocks if status.total_blocks else 0.0
