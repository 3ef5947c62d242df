"""Nodes that have left in good order are not asked for ledgers, caches and traces, so nothing of them is missing."""

from __future__ import annotations

import asyncio

import pytest

import baton
from baton import errors
from baton.types import Role
from router.cluster.membership import State
from tests.support.fake_nodes import FakeCluster
from tests.support.router import quick, router_beside, until


async def test_only_lost_nodes_are_unreachable() -> None:
    async with (
        FakeCluster(prefill=1, decode=3) as cluster,
        router_beside(cluster) as router,
        baton.AsyncClient(router.grpc) as client,
    ):

        def states() -> list[State]:
            return [member.state for member in router.dispatcher.nodes.members]

        cluster["decode-1"].drain(0.0)
        await until(lambda: State.DRAINING in states())
        await cluster["decode-1"].die()
        await until(lambda: State.LEFT in states())
        await cluster["decode-2"].die()
        await until(lambda: State.LOST in states())
        cache, ledger = await client.cache(), await client.ledger()
        for answer in (cache, ledger):
            assert [node.node_id for node in answer.nodes] == ["decode-0", "prefill-0"]
            assert [*answer.unreachable] == [cluster["decode-2"].address]
        with baton.Client(router.grpc) as threaded:
            traced = await asyncio.to_thread(threaded.trace)
        nodes = [part.node for part in traced if part.HasField("node")]
        assert [node.address for node in nodes if node.unreachable] == [cluster["decode-2"].address]
        assert len(nodes) == 3


async def test_a_node_that_is_given_up_while_it_is_asked_is_unreachable() -> None:
    async with (
        FakeCluster(prefill=1, decode=1) as cluster,
        router_beside(cluster, timing=quick) as router,
        baton.AsyncClient(router.grpc) as client,
    ):
        address = cluster["decode-0"].address
        cluster["decode-0"].mute()
        asked = asyncio.create_task(client.set_role("decode-0", Role.MIXED))
        ledger = await client.ledger()
        assert [node.node_id for node in ledger.nodes] == ["prefill-0"]
        assert [*ledger.unreachable] == [address]
        with pytest.raises(errors.Unavailable, match=f"{address}: the connection ended before the answer came"):
            await asked
        cluster["decode-0"].resume()
