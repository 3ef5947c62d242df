"""The nodes that take new work, by the pool that they belong to. Pure.

A node acts in the role of its home pool, or as mixed while it also has the other pool's work; its status says both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from baton.types import Role
from router.cluster.load import NodeLoad


class Pools:
    def __init__(self) -> None:
        self._home: dict[Role, dict[str, NodeLoad]] = {role: {} for role in Role}
        # Those that also have the other pool's work, by name.
        self._away: dict[Role, dict[str, NodeLoad]] = {role: {} for role in Role}

    def __len__(self) -> int:
        return sum(map(len, self._home.values()))

    def __contains__(self, node_id: str) -> bool:
        return any(node_id in pool for pool in self._home.values())

    def __getitem__(self, role: Role) -> Collection[NodeLoad]:
        """The nodes whose home pool it is."""
        return self._home[role].values()

    def among(self, role: Role, node_ids: Collection[str]) -> Iterator[NodeLoad]:
        """Those of the pool that are named."""
        pool = self._home[role]
        return (pool[node_id] for node_id in node_ids if node_id in pool)

    def to_lend(self, role: Role, min_nodes: int) -> Collection[NodeLoad]:
        """Those that may do the other pool's work while ``min_nodes`` do their own pool's alone. A node that is away
        already takes nothing more from its pool.

        Routers lend at the same time, before they have heard of each other. If that is too many nodes, all go on
        with the same few: did they wait until all are home, they would lend too many again.
        """
        away, num_to_lend = self._away[role], len(self._home[role]) - min_nodes
        if len(away) < num_to_lend:
            return self._home[role].values()
        return [away[node_id] for node_id in sorted(away)[: max(0, num_to_lend)]]

    @property
    def num_generating(self) -> int:
        """Nodes that generate tokens: where there is no other node, those of the prompt pool do."""
        return len(self._home[Role.DECODE]) + len(self._home[Role.MIXED]) or len(self._home[Role.PREFILL])

    def put(self, node: NodeLoad) -> None:
        """The node takes new work, in the roles of its last status."""
        if node.node_id not in self._home[node.home_role]:
            self.remove(node.node_id)
        self._home[node.home_role][node.node_id] = node
        if node.role is node.home_role:
            self._away[node.home_role].pop(node.node_id, None)
        else:
            self._away[node.home_role][node.node_id] = node

    def remove(self, node_id: str) -> None:
        """The node takes no new work."""
        for pool in (*self._home.values(), *self._away.values()):
            pool.pop(node_id, None)

    def without(self, node_ids: Collection[str]) -> Pools:
        others = Pools()
        for mine, theirs in ((self._home, others._home), (self._away, others._away)):
            for role, pool in mine.items():
                theirs[role] = {node_id: node for node_id, node in pool.items() if node_id not in node_ids}
        return others
