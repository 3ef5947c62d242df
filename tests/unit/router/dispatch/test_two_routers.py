"""Two routers over the same nodes, which know of each other's work by what the nodes say alone."""

from __future__ import annotations

import asyncio

import baton
from baton import errors
from baton.types import Role
from router.serve import Router
from tests.support.fake_nodes import FakeCluster
from tests.support.router import router_beside, until
from worker.roles import Reason


def client_of(router: Router) -> baton.AsyncClient:
    assert router.grpc is not None
    return baton.AsyncClient(router.grpc)


async def test_each_places_by_the_load_that_the_other_has_made() -> None:
    async with (
        FakeCluster(prefill=2, decode=1) as cluster,
        router_beside(cluster) as one,
        router_beside(cluster) as other,
        client_of(one) as busy,
        client_of(other) as client,
    ):
        prefill = [node for node in cluster.nodes.values() if node.role is Role.PREFILL]
        for node in prefill:
            node.runner.hold()
        long = asyncio.create_task(busy.complete([7] * 2000, max_tokens=2, seed=0))
        await until(lambda: any(node.used_blocks for node in prefill))
        (holder,) = (node for node in prefill if node.used_blocks)
        (idle,) = (node for node in prefill if node is not holder)
        idle.runner.resume()
        nodes = other.dispatcher.scheduler
        await until(lambda: nodes.node(holder.node_id).status.queued_prompt_tokens > 0)
        done = [await client.complete([i, 2, 3], max_tokens=2, seed=i) for i in range(1, 7)]
        assert {x.relay.prefill_node_id for x in done} == {idle.node_id}
        holder.runner.resume()
        assert (await long).relay.prefill_node_id == holder.node_id


async def test_of_two_schedulers_that_decide_the_same_one_is_obeyed() -> None:
    async with (
        FakeCluster(prefill=1, decode=2) as cluster,
        router_beside(cluster) as one,
        router_beside(cluster) as other,
    ):
        address = cluster["decode-1"].address
        links = [router.dispatcher.nodes.links[address] for router in (one, other)]
        asked = [link.set_role(Role.PREFILL, expected=Role.DECODE) for link in links]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(x, errors.Conflict) for x in answers) == 1
        # Nor does one that disagrees undo it at once.
        for link in links:
            back = await asyncio.gather(link.set_role(Role.DECODE, expected=Role.PREFILL), return_exceptions=True)
            assert isinstance(back[0], errors.Conflict)
        assert [x.reason for x in cluster["decode-1"].role_changes] == [Reason.SCHEDULER]
        for router in (one, other):
            load = router.dispatcher.scheduler
            await until(lambda load=load: load.node("decode-1").status.home_role is Role.PREFILL)
