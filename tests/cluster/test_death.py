"""kill -9 under load: every stream goes on with the very tokens of an undisturbed run, survivors lose no block."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, StartCluster
from tests.support.figures import figure
from tests.support.load import Answer, Job, mixed_jobs, run_all

CONCURRENCY = 16


async def kill_under_load(cluster: Cluster, role: str, jobs: list[Job], after_s: float, which: int) -> list[Answer]:
    """Run the jobs, kill one node of the role after a while, and wait until it is back."""
    running = asyncio.create_task(run_all(cluster.http, jobs, CONCURRENCY))
    await asyncio.sleep(after_s)
    dead = cluster.kill(f"{role}-{which}")
    answers = await running
    await asyncio.to_thread(cluster.wait_back, dead)
    return answers


async def survives(cluster: Cluster, roles: Sequence[str]) -> None:
    """Deaths of these roles, one after the other."""
    rng = random.Random("/".join(roles))
    jobs = mixed_jobs(48)
    began_s = time.monotonic()
    undisturbed = await run_all(cluster.http, jobs, CONCURRENCY)
    took_s = time.monotonic() - began_s
    assert [a.error for a in undisturbed] == [None] * len(jobs)
    num_reruns = 0
    for kill, role in enumerate(roles):
        answers = await kill_under_load(cluster, role, jobs, rng.uniform(0.02, 0.7) * took_s, rng.randrange(2))
        assert [a.error for a in answers] == [None] * len(jobs), f"kill {kill}"
        assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed], f"kill {kill}"
        assert [a.text for a in answers] == [a.text for a in undisturbed], f"kill {kill}"
        num_reruns += sum(a.relay["attempts"] - 1 for a in answers)
        pause_s = max(a.relay["recovery_s"] for a in answers)
        figure(2 if role == "prefill" else 3, f"{role} killed under load, longest pause of a stream", pause_s)
        await asyncio.to_thread(cluster.wait_baseline)
    # Had nothing run again, the kills would have hit no request and this test would have shown nothing.
    assert num_reruns > 0


async def test_streams_survive_a_death_of_either_role(shared_cluster: StartCluster, demo_model: Path) -> None:
    await survives(shared_cluster(demo_model, prefill=2, decode=2), ["prefill", "decode"])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_streams_survive_twenty_deaths(start_cluster: StartCluster, demo_model: Path, role: str) -> None:
    await survives(start_cluster(demo_model, prefill=2, decode=2, disaggregation="auto"), [role] * 20)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_16_a_whole_pool_that_is_killed_is_used_again(
    start_cluster: StartCluster, demo_model: Path, role: str
) -> None:
    cluster = start_cluster(demo_model, prefill=2, decode=2)
    router_pid = cluster.router_pid
    jobs = mixed_jobs(48)
    undisturbed = await run_all(cluster.http, jobs, CONCURRENCY)
    running = asyncio.create_task(run_all(cluster.http, jobs, CONCURRENCY))
    await asyncio.sleep(0.5)
    dead = [cluster.kill(f"{role}-{number}") for number in range(2)]
    answers = await running
    assert [a.error for a in answers] == [None] * len(jobs)
    assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]
    assert sum(a.relay["attempts"] - 1 for a in answers) > 0, "the kills hit no request: nothing was tested"
    figure(16, f"{role} pool killed, longest pause of a stream", max(a.relay["recovery_s"] for a in answers))
    for node in dead:
        await asyncio.to_thread(cluster.wait_back, node)
    # By the same router, without a word from outside.
    assert cluster.router_pid == router_pid
    again = await run_all(cluster.http, jobs, CONCURRENCY)
    assert [a.token_ids for a in again] == [a.token_ids for a in undisturbed]
    assert {a.relay["attempts"] for a in again} == {1}
    assert {a.relay[f"{role}_node_id"] for a in again} == {node.id for node in dead}
    await asyncio.to_thread(cluster.wait_baseline)
