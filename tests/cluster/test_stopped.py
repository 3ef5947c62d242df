"""SIGSTOP of the router, and of the only decode node: a stalled process blames no peer, and is used again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, StartCluster
from tests.support.figures import figure
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


@pytest.mark.parametrize("seconds", [4.0, pytest.param(10.0, marks=pytest.mark.long)])
async def test_10_the_only_decode_node_frozen_under_load_is_used_again(
    shared_cluster: StartCluster, demo_model: Path, seconds: float
) -> None:
    """Sequences that it had run on elsewhere, new ones do not wait for it, and it comes back by itself."""
    cluster = shared_cluster(demo_model, prefill=1, decode=1)
    jobs = [Job([5, 6, 7, i], 120, {"ignore_eos": True}) for i in range(24)]
    began_s = time.monotonic()
    undisturbed = await run_all(cluster.http, jobs, 12)
    took_s = time.monotonic() - began_s
    running = asyncio.create_task(run_all(cluster.http, jobs, 12))
    await asyncio.sleep(min(0.5, 0.3 * took_s))
    pid = cluster.nodes["decode-0"].pid
    os.kill(pid, signal.SIGSTOP)
    stopped_s = time.monotonic()
    try:
        answers = await running
        await asyncio.sleep(max(0.0, stopped_s + seconds - time.monotonic()))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [a.error for a in answers] == [None] * len(jobs)
    assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]
    assert sum(a.relay["attempts"] - 1 for a in answers) > 0, "it stood still beside no request: nothing was tested"
    figure(10, "decode frozen under load, longest pause of a stream", max(a.relay["recovery_s"] for a in answers))

    def all_ready() -> bool:
        return [n.state for n in cluster.status().nodes] == ["ready"] * 2

    woken_s = time.monotonic()
    await asyncio.to_thread(cluster.wait_until, all_ready, "decode-0 back", 15.0)
    await asyncio.to_thread(cluster.wait_baseline, 15.0)
    back_s = time.monotonic() - woken_s
    figure(10, f"decode frozen for {seconds:g} s, its return to ready with all blocks free", back_s)
    again = await run_all(cluster.http, jobs, 12)
    assert [a.token_ids for a in again] == [a.token_ids for a in undisturbed]
    assert "decode-0" in {a.relay["decode_node_id"] for a in again}
