"""Running requests move between real workers: not a token changes, no block is lost, and drains take seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest

import baton
from baton.client import Completion
from tests.support.cluster import Cluster, StartCluster
from tests.support.figures import figure
from tests.support.moving_router import BY_HAND, MovingRouter, moving_router, same

_log = logging.getLogger(__name__)

CONCURRENCY = 4


async def move_many(router: MovingRouter, cluster: Cluster, num_moves: int, max_tokens: int, num_prompt: int) -> None:
    """Moves of requests of every kind; then each answer is compared."""
    async with baton.AsyncClient(router.address) as client:
        undisturbed = await asyncio.gather(*router.run(client, CONCURRENCY, max_tokens, num_prompt))
        while router.outcomes.get(("balance", "moved"), 0) < num_moves:
            assert router.num_begun < 5 * num_moves, router.outcomes
            tasks = router.run(client, CONCURRENCY, max_tokens, num_prompt)
            while not all(task.done() for task in tasks):
                router.move_one()
                await asyncio.sleep(0.01)
            done = await asyncio.gather(*tasks)
            same(done, undisturbed)
            assert [x.relay.attempts for x in done] == [1] * CONCURRENCY
    figure(31, "moves without a changed token", router.outcomes["balance", "moved"], "moves")
    # One that ends while it is to move does not; one whose node is far ahead of this router has outgrown its lease.
    assert set(router.outcomes) <= {("balance", "moved"), ("balance", "ended"), ("balance", "failed")}
    await asyncio.to_thread(cluster.wait_baseline)


async def test_running_requests_move_and_no_token_changes(shared_cluster: StartCluster, demo_model: Path) -> None:
    cluster = shared_cluster(demo_model, prefill=2, decode=2)
    async with moving_router(cluster) as router:
        await move_many(router, cluster, 20, max_tokens=1200, num_prompt=100)
        # What its new node holds already is not pushed.
        assert any(move.num_bytes > 0 for move in router.moves)


@pytest.mark.long
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_five_hundred_moves(start_cluster: StartCluster, demo_model: Path, transport: str) -> None:
    cluster = start_cluster(demo_model, prefill=1, decode=3, transport=transport)
    async with moving_router(cluster) as router:
        await move_many(router, cluster, 500, max_tokens=1000, num_prompt=1000)
        report("moves", router)


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_fifty_moves_whose_target_is_killed_in_the_middle(start_cluster: StartCluster, demo_model: Path) -> None:
    cluster = start_cluster(demo_model, prefill=1, decode=2)
    async with moving_router(cluster) as router:
        async with baton.AsyncClient(router.address) as client:
            undisturbed = await asyncio.gather(*router.run(client, CONCURRENCY, 1200, 500))
            num_killed = 0
            while num_killed < 50:
                tasks = router.run(client, CONCURRENCY, 1200, 500)
                target = router.decode_ids[num_killed % 2]
                while not router.move_one(target):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                for _ in range(3):
                    router.move_one(target)
                # Before, while and after its bytes are on their way.
                await asyncio.sleep(0.002 * (num_killed % 25))
                dead = cluster.kill(target)
                num_killed += 1
                done = await asyncio.gather(*tasks)
                same(done, undisturbed)
                await asyncio.to_thread(cluster.wait_back, dead)
                await until_ready(router, client)
        report("moves to nodes that were killed", router)
    assert router.outcomes.get(("balance", "failed"), 0) > 0, router.outcomes
    await asyncio.to_thread(cluster.wait_baseline)


async def until_ready(router: MovingRouter, client: baton.AsyncClient) -> None:
    """Until this router sees all nodes as well."""
    async with asyncio.timeout(60):
        while sum(node.state == "ready" for node in (await client.status()).nodes) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.long
@pytest.mark.parametrize("migrates", [True, False])
async def test_draining_a_node_with_sixteen_long_streams(
    start_cluster: StartCluster, demo_model: Path, migrates: bool
) -> None:
    """How long the node takes to be empty, and what the streams notice of it."""
    cluster = start_cluster(demo_model, prefill=1, decode=2, arguments=("--migration", "on" if migrates else "off"))
    policy = replace(BY_HAND, migrates=migrates)
    async with moving_router(cluster, policy=policy) as router:
        async with baton.AsyncClient(router.address) as client:
            undisturbed = await asyncio.gather(*router.run(client, 16, 1000, 1000))
            tasks = router.run(client, 16, 1000, 1000)
            leaving = cluster.nodes["decode-0"]
            # Not all sixteen: on a busy machine the first ones end before the last ones begin.
            async with asyncio.timeout(60):
                while len(there := router.movable_from(leaving.id)) < 4:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            began_s = time.monotonic()
            await client.drain(leaving.id, grace_s=120.0)
            async with asyncio.timeout(120):
                while router.num_on(leaving.id):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            emptied_s = time.monotonic() - began_s
            num_left = sum(not active.flow.has_ended for active in there)
            await asyncio.to_thread(cluster.wait_back, leaving)
            done: list[Completion] = await asyncio.gather(*tasks)
        same(done, undisturbed)
        assert [x.relay.attempts for x in done] == [1] * 16
        _log.info("without a stream after %.2f s, migration %s", emptied_s, migrates)
        report("moves off a node that drains", router)
        assert num_left or not migrates, "it waited for answers to end"
    assert {reason for reason, _ in router.outcomes} == ({"drain"} if migrates else set())
    assert router.outcomes.get(("drain", "moved"), 0) > 0 or not migrates, router.outcomes


def report(what: str, router: MovingRouter) -> None:
    """Figures, for who runs this with --log-cli-level=INFO."""
    steps = sorted(
        move.pause_s / ended.relay.tbt_mean_s
        for ended in router.ended
        for move in ended.relay.moves
        if move.pause_s and ended.relay.tbt_mean_s
    )
    _log.info("%s: %s", what, router.outcomes)
    if steps:
        pauses = sorted(move.pause_s for move in router.moves if move.pause_s)
        for name, found, unit in (("pause", pauses, "s"), ("pause", steps, "times the mean gap")):
            p50, p99 = found[len(found) // 2], found[len(found) * 99 // 100]
            _log.info("%s p50 %.4f, p99 %.4f %s", name, p50, p99, unit)
        figure(31, f"{what}, p99 of the pause", pauses[len(pauses) * 99 // 100])
