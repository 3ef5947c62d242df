"""A cluster whose nodes are found in Redis, and what its users see of Redis being gone: nothing."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from baton.faults.kinds import FaultKind, Layer
from baton.faults.plan import Plan
from baton.registry import Registry, RegistryConfig
from tests.support.cluster import Cluster, StartCluster, starter
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
    assert [a.relay["failures"] for answers in rounds for a in answers if a.relay["attempts"] > 1] == []
    # No node was restarted or lost, and all of them register again.
    assert {n.node.node_id: n.node.incarnation for n in cluster.status().nodes} == before
    await until_registered(server, len(before))
    await asyncio.to_thread(cluster.wait_baseline)
    num_requests = len(rounds) * len(jobs)
    figure(17, f"whole at the first attempt beside {seconds:g} s without Redis", num_requests, "requests")
    return num_requests


async def until_registered(server: RedisServer, num_nodes: int, cluster: str = "default") -> None:
    registry = Registry(RegistryConfig(server.url, cluster))
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


# Gone for all, while a node dies and comes back; then without an answer to any call, then slow.
SCHEDULE = """
[[fault]]
layer = "registry"
at_s = 0.5
fault = "disconnect"
seconds = 4

[[fault]]
layer = "registry"
after_s = 4.5
until_s = 7
probability = 1
fault = "drop"

[[fault]]
layer = "registry"
after_s = 7
until_s = 10
probability = 1
fault = "delay"
seconds = 0.7

[[fault]]
layer = "process"
node = "decode-0"
life = 1
at_s = 1.5
fault = "die"
"""


@pytest.mark.long
async def test_a_registry_that_is_gone_and_slow_by_a_schedule_is_not_noticed(
    start_cluster: StartCluster, server: RedisServer, demo_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "faults.toml"
    file.write_text(SCHEDULE)
    arguments = ("--registry", server.url, "--cluster", "faulty", "--faults", str(file), "--kv-mib", "64")
    cluster = start_cluster(demo_model, prefill=1, decode=2, arguments=arguments)
    first = cluster.nodes["decode-0"]
    jobs = mixed_jobs(16)
    # A node dies under the first of them: its requests are run again, with the same tokens.
    rounds = await load_for(cluster, jobs, 10.0)
    assert_same(rounds, rounds[-1])
    back = await asyncio.to_thread(cluster.wait_back, first)
    assert back.pid != first.pid
    await until_registered(server, 3, "faulty")
    await asyncio.to_thread(cluster.wait_baseline)
    drawn = Plan.load(tmp_path / "faults-drawn")
    struck = {(rule.node, rule.fault) for rule in drawn.rules if rule.layer is Layer.REGISTRY}
    nodes = {"prefill-0", "decode-0", "decode-1", "router"}
    assert {node for node, fault in struck if fault is FaultKind.DISCONNECT} >= nodes - {"decode-0"}
    assert {FaultKind.DROP, FaultKind.DELAY} <= {fault for _, fault in struck}
