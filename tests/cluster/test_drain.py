"""Nodes that leave under load: drained ones fail nothing and repeat nothing, cut-off work runs again elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import baton
from tests.support.cluster import Cluster, StartCluster
from tests.support.load import Answer, Job, mixed_jobs, run_all

CONCURRENCY = 12
# Against hanging: what a machine with other work needs is no fault.
END_TIMEOUT_S = 90


async def loop_load(cluster: Cluster, jobs: list[Job], stop: asyncio.Event) -> list[list[Answer]]:
    """The same jobs again and again until told to stop; at least once."""
    rounds = [await run_all(cluster.http, jobs, CONCURRENCY)]
    while not stop.is_set():
        rounds.append(await run_all(cluster.http, jobs, CONCURRENCY))
    return rounds


def assert_same(answers: list[Answer], undisturbed: list[Answer]) -> None:
    assert [a.error for a in answers] == [None] * len(undisturbed)
    assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]


@pytest.mark.long
async def test_draining_each_node_in_turn_under_load_fails_nothing(
    start_cluster: StartCluster, demo_model: Path
) -> None:
    jobs = mixed_jobs(24)
    cluster = start_cluster(demo_model, prefill=2, decode=2)
    undisturbed = await run_all(cluster.http, jobs, CONCURRENCY)
    stop = asyncio.Event()
    running = asyncio.create_task(loop_load(cluster, jobs, stop))
    try:
        async with baton.AsyncClient(cluster.grpc) as client:
            for node in cluster.nodes.values():
                answer = (await client.drain(node.id, grace_s=60.0)).drain
                assert answer.node_id == node.id
                # It ends by itself, is started again by the launcher, and is another node.
                await asyncio.to_thread(cluster.wait_back, node)
    finally:
        stop.set()
    for answers in await running:
        assert_same(answers, undisturbed)
        assert [a.relay["attempts"] for a in answers] == [1] * len(jobs), "nothing had to run again"
    await asyncio.to_thread(cluster.wait_baseline)
    logs = cluster.logs()
    assert all(f"{node_id} has drained and leaves" in logs for node_id in cluster.nodes)


@pytest.mark.parametrize("role", ["prefill", pytest.param("decode", marks=pytest.mark.long)])
async def test_a_second_sigterm_cuts_off_and_the_router_runs_the_rest_elsewhere(
    shared_cluster: StartCluster, demo_model: Path, role: str
) -> None:
    jobs = mixed_jobs(48)
    cluster = shared_cluster(demo_model, prefill=2, decode=2)
    undisturbed = await run_all(cluster.http, jobs, CONCURRENCY)
    running = asyncio.create_task(run_all(cluster.http, jobs, CONCURRENCY))
    await asyncio.sleep(0.5)
    node = cluster.nodes[f"{role}-0"]
    # The second one is sent as soon as the process has taken the first, and so meets a worker that drains. One that
    # waited for a line in the log could come after the worker has left.
    os.kill(node.pid, signal.SIGTERM)
    while has_signal(node.pid, "ShdPnd", signal.SIGTERM):  # noqa: ASYNC110 - another process's state
        await asyncio.sleep(0.001)
    os.kill(node.pid, signal.SIGTERM)
    assert_same(await running, undisturbed)
    await asyncio.to_thread(cluster.wait_back, node)
    await asyncio.to_thread(cluster.wait_baseline)
    logs = cluster.logs()
    assert f"{node.id} drains" in logs
    assert f"{node.id} leaves, told twice to stop" in logs


@pytest.mark.parametrize("after_s", [0.0, 0.5, 1.5])
def test_a_worker_told_to_stop_while_it_loads_exits_with_0(demo_model: Path, tmp_path: Path, after_s: float) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "worker", "--model", str(demo_model), "--role", "mixed", "--kv-mib", "64"],
            stdout=output,
            stderr=output,
        )
    try:
        # From here on signals are its own to handle: the kernel's list of caught ones says so.
        gives_up_at = time.monotonic() + END_TIMEOUT_S
        while not has_signal(process.pid, "SigCgt", signal.SIGTERM):
            assert time.monotonic() < gives_up_at
            time.sleep(0.005)
        time.sleep(after_s)
        process.terminate()
        assert process.wait(END_TIMEOUT_S) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def has_signal(pid: int, field: str, number: signal.Signals) -> bool:
    """Whether the signal is in this mask of the kernel's: SigCgt, those caught; ShdPnd, those that wait to be taken."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:"))
    return bool(int(mask, 16) >> (number - 1) & 1)
