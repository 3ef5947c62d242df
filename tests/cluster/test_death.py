"""kill -9 under load: every stream goes on with the very tokens of an undisturbed run, survivors lose no block."""

from __future__ import annotations

import asyncio
import random

import pytest

from demo import MODEL_DIR
from demo.tasks import mixed_prompts
from tests.cluster.conftest import Cluster, StartCluster
from tests.cluster.load import Answer, Job, run_all

CONCURRENCY = 16


def load(count: int) -> list[Job]:
    """Half greedy, half sampled with a seed, prompts of every length, answers of up to a few hundred tokens."""
    tasks = mixed_prompts(seed=11, count=count)
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "ignore_eos": True}
    return [Job(t.prompt, 24 + 12 * (i % 10), sampled if i % 2 else {"ignore_eos": True}) for i, t in enumerate(tasks)]


async def kill_under_load(cluster: Cluster, role: str, jobs: list[Job], rng: random.Random) -> list[Answer]:
    """Run the jobs; kill one node of the role at a random moment; wait until it is back."""
    running = asyncio.create_task(run_all(cluster.http, jobs, CONCURRENCY))
    await asyncio.sleep(rng.uniform(0.05, 1.5))
    victim = rng.choice([node for node in cluster.nodes() if node.role == role])
    cluster.kill(victim)
    answers = await running
    await asyncio.to_thread(cluster.wait_all_ready)
    return answers


async def survives(start_cluster: StartCluster, role: str, num_kills: int) -> None:
    rng = random.Random(f"{role}/{num_kills}")
    jobs = load(48)
    with start_cluster(MODEL_DIR, prefill=2, decode=2) as cluster:
        undisturbed = await run_all(cluster.http, jobs, CONCURRENCY)
        num_reruns = 0
        for _ in range(num_kills):
            answers = await kill_under_load(cluster, role, jobs, rng)
            assert [a.error for a in answers] == [None] * len(jobs)
            assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]
            assert [a.text for a in answers] == [a.text for a in undisturbed]
            num_reruns += sum(a.relay["attempts"] - 1 for a in answers)
            cluster.wait_baseline()
    # Nothing ran again: the kills hit nobody and this test has shown nothing.
    assert num_reruns > 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_streams_survive_a_death(start_cluster: StartCluster, role: str) -> None:
    await survives(start_cluster, role, num_kills=2)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_streams_survive_twenty_deaths(start_cluster: StartCluster, role: str) -> None:
    await survives(start_cluster, role, num_kills=20)
