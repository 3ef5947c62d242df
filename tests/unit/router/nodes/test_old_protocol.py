"""A router beside a node of protocol 1, which opens a session for each phase and knows no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import grpc

from baton import PROTOCOL_VERSION
from baton.types import NodeDescription, Role
from router.cluster.membership import State
from tests.support.fake_nodes import FakeCluster, FakeNode
from tests.support.router import router_beside, until


class OldNode(FakeNode):
    """It answers Describe, and has no Node/Session."""

    @property
    def description(self) -> NodeDescription:
        return replace(super().description, protocol_version=1)

    async def Session(self, request_iterator: Any, context: Any) -> Any:  # type: ignore[override]  # noqa: N802
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        yield


async def test_a_node_of_protocol_1_is_refused_with_both_versions() -> None:
    cluster = FakeCluster(mixed=1)
    old = cluster.nodes["old"] = OldNode("old", Role.MIXED, cluster, cluster.config)
    async with cluster, router_beside(cluster, all_up=False) as router:
        member = router.dispatcher.nodes.membership.members[old.address]
        await until(lambda: member.state is State.REFUSED)
        assert member.reason == f"protocol version is {PROTOCOL_VERSION} here and 1 at old"
        await until(lambda: router.dispatcher.is_ready)
