"""A router that finds its nodes in Redis: they come, go, come back, and Redis itself goes, under load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

import baton
from baton.clock import MonotonicClock
from baton.errors import BadConfig, Unavailable
from baton.registry import NodeRecord, Registry, RegistryConfig
from baton.types import Role
from router.cluster.membership import State
from router.config import RouterConfig, WatchConfig
from router.serve import Router, running
from tests.support.fake_nodes import FakeCluster, FakeConfig, FakeNode, expected_tokens
from tests.support.redis_server import RedisServer
from tests.support.router import quick, until
from worker.registration import LeaseConfig, Registration

VOCAB = FakeConfig().vocab_size
SLOW = FakeConfig(step_s=0.005)


async def register(server: RedisServer, node: FakeNode, ttl_s: float = 0.6) -> Registration:
    said = node.description
    record = NodeRecord(said.node_id, said.address, said.incarnation, said.home_role, said.model.fingerprint)
    registry = Registry(RegistryConfig(server.url, timeout_s=0.3))
    registration = Registration(registry, record, LeaseConfig(ttl_s), MonotonicClock())
    await registration.start()
    return registration


async def fall_silent(registration: Registration) -> None:
    """It renews no more, and takes nothing back: as if its process had been killed."""
    registration._driver.close()
    async with asyncio.timeout(5):
        await registration._settled()


@asynccontextmanager
async def router_on(server: RedisServer) -> AsyncIterator[Router]:
    config = RouterConfig(registry=RegistryConfig(server.url, timeout_s=0.3), watch=WatchConfig(poll_s=0.1))
    async with running(quick(config)) as router:
        yield router
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        router.dispatcher.scheduler.check()


def states(router: Router) -> dict[str, State]:
    return {x.node.node_id if x.node else x.address: x.state for x in router.dispatcher.nodes.members}


async def ask(router: Router, count: int, max_tokens: int = 20) -> None:
    """Concurrent requests; every one has the tokens of an undisturbed run."""
    assert router.grpc is not None
    async with baton.AsyncClient(router.grpc) as client:
        done = await asyncio.gather(*(client.complete([1, 2, i], max_tokens=max_tokens, seed=i) for i in range(count)))
    for i, completion in enumerate(done):
        assert completion.token_ids == tuple(expected_tokens([1, 2, i], i, max_tokens, VOCAB))


async def test_nodes_come_go_and_come_back_on_the_same_address(redis_server: RedisServer) -> None:
    async with (
        FakeCluster(SLOW, prefill=1, decode=2) as cluster,
        router_on(redis_server) as router,
        AsyncExitStack() as stack,
    ):

        async def joins(name: str) -> Registration:
            lease = await register(redis_server, cluster[name])
            stack.push_async_callback(lease.close)
            return lease

        assert states(router) == {}
        leases = {name: await joins(name) for name in cluster.nodes}
        await until(lambda: list(states(router).values()) == [State.READY] * 3)
        await ask(router, 4)
        # One dies without a word: its requests run elsewhere, its lease runs out, and it is in the cluster no more.
        load = asyncio.create_task(ask(router, 8, max_tokens=60))
        await until(lambda: any(cluster[name].used_blocks for name in ("decode-0", "decode-1")))
        dead = "decode-0" if cluster["decode-0"].used_blocks else "decode-1"
        await cluster[dead].die()
        await fall_silent(leases[dead])
        await load
        await until(lambda: dead not in states(router))
        await cluster[dead].start()
        again = await joins(dead)
        await until(lambda: states(router).get(dead) is State.READY)
        await ask(router, 4)
        # It leaves in good order: it is up for as long as it answers, and forgotten when it does not.
        await again.withdraw()
        await asyncio.sleep(0.3)
        assert states(router)[dead] in (State.READY, State.SUSPECT), "up, on a machine that may be slow"
        await cluster[dead].die()
        await until(lambda: dead not in states(router))


async def test_a_new_incarnation_replaces_a_session_that_still_looks_alive(redis_server: RedisServer) -> None:
    async with FakeCluster(SLOW, mixed=1) as cluster, router_on(redis_server) as router:
        node = cluster["mixed-0"]
        first = await register(redis_server, node)
        await until(lambda: states(router) == {"mixed-0": State.READY})
        old = node.incarnation
        # Its host vanished without closing a connection, and a new life of it registers.
        node.incarnation += 1
        node.service.node = node.description
        second = await register(redis_server, node)
        await until(
            lambda: [x.node.incarnation for x in router.dispatcher.nodes.members if x.is_up and x.node] == [old + 1]
        )
        await ask(router, 2)
        await first.close()
        await second.close()


@pytest.mark.parametrize("how", ["killed", "hung"])
async def test_17_redis_gone_disturbs_nothing_and_new_work_is_admitted(redis_server: RedisServer, how: str) -> None:
    async with FakeCluster(SLOW, prefill=1, decode=1) as cluster, router_on(redis_server) as router:
        leases = [await register(redis_server, node) for node in cluster.nodes.values()]
        await until(lambda: list(states(router).values()) == [State.READY] * 2)
        running_load = asyncio.create_task(ask(router, 6, max_tokens=200))
        await asyncio.sleep(0.1)
        if how == "killed":
            redis_server.kill()
        else:
            redis_server.pause()
        for _ in range(8):  # longer than the leases last
            await ask(router, 3, max_tokens=5)
            await asyncio.sleep(0.2)
        # A node that restarts meanwhile is found on its last known address.
        await cluster["decode-0"].die()
        await until(lambda: states(router)["decode-0"] is State.LOST)
        await cluster["decode-0"].start()
        await until(lambda: states(router)["decode-0"] is State.READY)
        await ask(router, 3)
        if how == "killed":
            redis_server.start()
        else:
            redis_server.resume()
        await ask(router, 3)
        await running_load
        # A new node is found again, and none was lost by what Redis has forgotten.
        newcomer = cluster.add("decode-1", Role.DECODE)
        await newcomer.start()
        leases.append(await register(redis_server, newcomer))
        await until(lambda: list(states(router).values()) == [State.READY] * 3)
        for lease in leases:
            await lease.close()


async def test_a_router_may_start_before_redis_but_not_with_a_wrong_password(redis_server: RedisServer) -> None:
    redis_server.kill()
    async with FakeCluster(mixed=1) as cluster, router_on(redis_server) as router:
        assert states(router) == {}
        assert router.grpc is not None
        redis_server.start()
        lease = await register(redis_server, cluster["mixed-0"])
        await until(lambda: states(router) == {"mixed-0": State.READY})
        await ask(router, 2)
        await lease.close()
    config = RouterConfig(registry=RegistryConfig(redis_server.url.replace("s3cret", "guess")))
    with pytest.raises(BadConfig, match="does not let us in"):
        async with running(quick(config)):
            pass


async def test_without_any_node_requests_are_refused_after_a_while(redis_server: RedisServer) -> None:
    async with router_on(redis_server) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            with pytest.raises(Unavailable, match="no node"):
                await client.complete([1, 2, 3], max_tokens=2, timeout_s=20)


def test_a_router_needs_nodes_or_a_registry() -> None:
    with pytest.raises(BadConfig, match="registry"):
        RouterConfig()


async def test_two_routers_serve_over_the_same_nodes_and_one_may_leave(redis_server: RedisServer) -> None:
    async with FakeCluster(SLOW, prefill=1, decode=1) as cluster, router_on(redis_server) as stays:
        leases = [await register(redis_server, node) for node in cluster.nodes.values()]
        async with router_on(redis_server) as leaves:
            for router in (stays, leaves):
                await until(lambda router=router: list(states(router).values()) == [State.READY] * 2)
            await asyncio.gather(ask(stays, 6, max_tokens=40), ask(leaves, 6, max_tokens=40))
            load = asyncio.create_task(ask(stays, 6, max_tokens=100))
        await load
        await until(lambda: cluster.used_blocks == 0)
        for lease in leases:
            await lease.close()
