"""A cluster whose nodes are found in Redis, and what its users see of Redis being gone: nothing."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from baton.registry import Registry, RegistryConfig
from tests.support.cluster import Cluster, starter
from tests.support.figures import figure
from tests.support.load import Answer, Job, mixed_jobs, run_all
from tests.support.redis_server import RedisServer

CONCURRENCY = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), password="s3cret")
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture(scope="module")
def cluster(server: RedisServer, tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[Cluster]:
    """All are registered; each test leaves it so."""
    with ExitStack() as clusters:
        start = starter(tmp_path_factory.mktemp("cluster"), clusters)
        yield start(demo_model, prefill=2, decode=2, arguments=("--registry", server.url))


async def load_for(cluster: Cluster, jobs: list[Job], seconds: float) -> list[list[Answer]]:
    """The same jobs again and again for a while; at least once."""
    until_s = time.monotonic() + seconds
    rounds = [await run_all(cluster.http, jobs, CONCURRENCY)]
    while time.monotonic() < until_s:
        rounds.append(await run_all(cluster.http, jobs, CONCURRENCY))
    return rounds


def assert_same(rounds: list[list[Answer]], undisturbed: list[Answer]) -> None:
    for answers in rounds:
        assert [a.error for a in answers] == [None] * len(undisturbed)
        assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]


async def outage(cluster: Cluster, server: RedisServer, seconds: float) -> int:
    """Redis gone under load, also while a request is asked for; the number of requests that went well."""
    jobs = mixed_jobs(16)
    undisturbed = await run_all(cluster.http, jobs, CONCURRENCY)
    before = {n.node.node_id: n.node.incarnation for n in cluster.status().nodes}
    running = asyncio.create_task(load_for(cluster, jobs, 1.0))
    await asyncio.sleep(0.3)
    server.kill()
    rounds = await load_for(cluster, jobs, seconds)
    await asyncio.to_thread(server.start)
    rounds += await load_for(cluster, jobs, 1.0) + await running
    assert_same(rounds, undisturbed)
    assert [a.relay["attempts"] for answers in rounds for a in answers] == [1] * len(rounds) * len(jobs)
    # No node was restarted or lost, and all of them register again.
    assert {n.node.node_id: n.node.incarnation for n in cluster.status().nodes} == before
    await until_registered(server, len(before))
    await asyncio.to_thread(cluster.wait_baseline)
    num_requests = len(rounds) * len(jobs)
    figure(17, f"whole at the first attempt beside {seconds:g} s without Redis", num_requests, "requests")
    return num_requests


async def until_registered(server: RedisServer, num_nodes: int) -> None:
    registry = Registry(RegistryConfig(server.url))
    try:
        async with asyncio.timeout(10):
            while len((await registry.nodes())[0]) < num_nodes:  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.1)
    finally:
        await registry.close()


async def test_17_redis_gone_for_seconds(cluster: Cluster, server: RedisServer) -> None:
    assert await outage(cluster, server, 2.0) > 0


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", [5, 30, 120])
async def test_17_redis_gone_for_minutes(cluster: Cluster, server: RedisServer, seconds: float) -> None:
    count = await outage(cluster, server, seconds)
    # Shown with -rP.
    sys.stdout.write(f"{count} requests, none failed and none ran twice, while Redis was gone for {seconds} s\n")


async def test_nodes_come_back_on_the_same_address_while_redis_is_there_and_while_it_is_gone(
    cluster: Cluster, server: RedisServer
) -> None:
    jobs = mixed_jobs(16)
    undisturbed = await run_all(cluster.http, jobs, CONCURRENCY)
    for node_id in ("decode-0", "prefill-1"):
        running = asyncio.create_task(load_for(cluster, jobs, 0.0))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(cluster.wait_back, cluster.kill(node_id))
        assert_same([*await running, *await load_for(cluster, jobs, 0.0)], undisturbed)
        server.kill()
    await asyncio.to_thread(cluster.wait_baseline)
    await asyncio.to_thread(server.start)
    await until_registered(server, len(cluster.nodes))
