"""What operators ask of the nodes through the router: ledgers, prefix caches, traces, roles, and that a node drains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from baton import errors
from baton.clock import Clock
from baton.types import Role
from baton.v1 import node_pb2, router_pb2
from router.cluster.membership import Membership, State
from router.nodes.sessions import NodeLink

_AnswerT = TypeVar("_AnswerT", node_pb2.LedgerResponse, node_pb2.CacheResponse)
NodeTrace = router_pb2.ClusterTraceResponse.NodeTrace


class NodeAdmin:
    def __init__(self, membership: Membership, links: Mapping[str, NodeLink], clock: Clock) -> None:
        self._membership = membership
        self._links = links
        self._clock = clock

    async def ledgers(self) -> tuple[list[node_pb2.LedgerResponse], dict[str, str]]:
        """The present ledger of every node, and by address the reasons of those that did not answer."""
        return await self._of_all(lambda link: link.ledger())

    async def caches(self, *, drop: bool) -> tuple[list[node_pb2.CacheResponse], dict[str, str]]:
        """The prefix cache of every node, likewise; ``drop``: each forgets its blocks first."""
        return await self._of_all(lambda link: link.cache(drop=drop))

    def _present(self) -> list[tuple[str, NodeLink]]:
        """All but nodes that have left in good order: of these nothing can be missing."""
        members = self._membership.members
        gone = {address for address, member in members.items() if member.state is State.LEFT}
        return [(address, link) for address, link in self._links.items() if address not in gone]

    async def _of_all(
        self, question: Callable[[NodeLink], Awaitable[_AnswerT]]
    ) -> tuple[list[_AnswerT], dict[str, str]]:
        found: list[_AnswerT] = []
        unreachable: dict[str, str] = {}

        async def ask(address: str, link: NodeLink) -> None:
            try:
                found.append(await question(link))
            except errors.BatonError as error:
                unreachable[address] = error.message

        async with asyncio.TaskGroup() as tasks:
            for address, link in self._present():
                tasks.create_task(ask(address, link))
        return sorted(found, key=lambda x: x.node_id), unreachable

    async def traces(self, last_s: float) -> list[NodeTrace]:
        """The trace of every node; ``unreachable`` of one that did not answer says why."""

        async def ask(address: str, link: NodeLink) -> NodeTrace:
            try:
                found = await link.trace(last_s, self._clock)
            except errors.BatonError as error:
                found = NodeTrace(unreachable=error.message)
            found.address = address
            return found

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask(address, link)) for address, link in self._present()]
        return sorted((x.result() for x in asked), key=lambda x: x.trace.node_id)

    async def drain(self, node: str, grace_s: float) -> tuple[str, node_pb2.DrainResponse]:
        """Ask a node, by id or address, to leave; its address and answer. Raises UnknownNode, Unavailable."""
        address = self._address_of(node)
        return address, await self._links[address].drain(grace_s)

    async def set_role(self, node: str, role: Role | None) -> tuple[str, node_pb2.SetRoleResponse]:
        """Put a node, by id or address, into another pool, None: the one that it started in. As `drain`."""
        address = self._address_of(node)
        return address, await self._links[address].set_role(role)

    def _address_of(self, node: str) -> str:
        members = self._membership.members
        member = self._membership.member_of(node) or members.get(node)
        if member is None:
            known = sorted(x.node.node_id for x in members.values() if x.is_up and x.node is not None)
            raise errors.UnknownNode(
                f"no node {errors.quoted(node)} is up, expected one of {known} or an address", param="node"
            )
        return member.address
