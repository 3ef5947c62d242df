"""The nodes that take new work, by the role that they act in. Pure.

A node has a home pool, which its description names, and an acting role, which its status names; today they are equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from baton.types import Role
from router.cluster.load import NodeLoad


class Pools:
    def __init__(self) -> None:
        self._acting: dict[Role, dict[str, NodeLoad]] = {role: {} for role in Role}

    def __len__(self) -> int:
        return sum(map(len, self._acting.values()))

    def __contains__(self, node_id: str) -> bool:
        return any(node_id in pool for pool in self._acting.values())

    def __getitem__(self, role: Role) -> Collection[NodeLoad]:
        return self._acting[role].values()

    def among(self, role: Role, node_ids: Collection[str]) -> Iterator[NodeLoad]:
        """Those of the role that are named."""
        pool = self._acting[role]
        return (pool[node_id] for node_id in node_ids if node_id in pool)

    @property
    def num_generating(self) -> int:
        """Nodes that generate tokens: where there is no other node, those of the prompt pool do."""
        return len(self._acting[Role.DECODE]) + len(self._acting[Role.MIXED]) or len(self._acting[Role.PREFILL])

    def put(self, node: NodeLoad) -> None:
        """The node takes new work, in the role of its last status."""
        if node.node_id not in self._acting[node.role]:
            self.remove(node.node_id)
        self._acting[node.role][node.node_id] = node

    def remove(self, node_id: str) -> None:
        """The node takes no new work."""
        for pool in self._acting.values():
            pool.pop(node_id, None)

    def without(self, node_ids: Collection[str]) -> Pools:
        others = Pools()
        for role, pool in self._acting.items():
            others._acting[role] = {node_id: node for node_id, node in pool.items() if node_id not in node_ids}
        return others
