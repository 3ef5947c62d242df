"""SIGSTOP of the router, and of every worker at once: a stalled process blames no peer, and is used again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from tests.support.cluster import Cluster, StartCluster
from tests.support.load import Job, run_all

STOPPED_S = 3.0


def losses(cluster: Cluster) -> set[str]:
    """Lines of logs, each with its time, and nodes that are not ready now."""
    not_ready = {f"{x.node.node_id} {x.state}" for x in cluster.status().nodes if x.state != "ready"}
    return cluster.lines_with("is lost") | not_ready


async def test_a_router_that_was_stopped_loses_no_node_and_no_attempt(
    shared_cluster: StartCluster, demo_model: Path
) -> None:
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    before = await asyncio.to_thread(losses, cluster)
    jobs = [Job([5, 6, 7, i], 120, {"ignore_eos": True}) for i in range(24)]
    undisturbed = await run_all(cluster.http, jobs, 12)
    running = asyncio.create_task(run_all(cluster.http, jobs, 12))
    await asyncio.sleep(0.5)
    os.kill(cluster.router_pid, signal.SIGSTOP)
    try:
        await asyncio.to_thread(time.sleep, STOPPED_S)
    finally:
        os.kill(cluster.router_pid, signal.SIGCONT)
    answers = await running
    assert [a.error for a in answers] == [None] * len(jobs)
    assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]
    assert {a.relay["attempts"] for a in answers} == {1}
    assert await asyncio.to_thread(losses, cluster) <= before
    await asyncio.to_thread(cluster.wait_baseline)
