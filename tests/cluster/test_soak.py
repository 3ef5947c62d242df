"""Thousands of requests of the demo model over split clusters, each compared with the answer of an engine alone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import psutil
import pytest

from demo.tasks import mixed_prompts
from tests.support.cluster import Cluster, StartCluster
from tests.support.figures import figure
from tests.support.load import Job, run_all

CONCURRENCY = 16
NUM_PROMPTS = 100


def jobs_of(count: int) -> list[Job]:
    """Short requests, each prompt many times, greedy and sampled."""
    tasks = mixed_prompts(seed=12, count=NUM_PROMPTS)
    kinds = ({"ignore_eos": True}, {"ignore_eos": True, "temperature": 0.9, "top_p": 0.95, "seed": 5})
    return [Job(tasks[n % NUM_PROMPTS].prompt[:400], 4 + n % 8, kinds[n % NUM_PROMPTS % 2]) for n in range(count)]


async def right_answers(cluster: Cluster, jobs: list[Job]) -> dict[tuple[str, int], list[int]]:
    """Of mixed nodes, one request at a time: no transfer and no batch."""
    different = list({(str(job.prompt), job.max_tokens): job for job in jobs}.values())
    answers = await run_all(cluster.http, different, 1)
    assert [a.error for a in answers] == [None] * len(different)
    return {(str(j.prompt), j.max_tokens): a.token_ids for j, a in zip(different, answers, strict=True)}


def open_files(cluster: Cluster) -> int:
    return sum(psutil.Process(pid).num_fds() for pid in (cluster.router_pid, *(n.pid for n in cluster.nodes.values())))


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.long)])
async def test_12_every_answer_of_a_soak_is_the_oracles(
    start_cluster: StartCluster, shared_cluster: StartCluster, demo_model: Path, count: int
) -> None:
    jobs = jobs_of(count)
    alone = shared_cluster(demo_model, prefill=0, decode=0, mixed=2)
    right = await right_answers(alone, jobs)
    await asyncio.to_thread(alone.wait_baseline)
    # Without a prefix cache each prompt is computed and moved again.
    cluster = start_cluster(demo_model, prefill=1, decode=1, arguments=("--prefix-cache", "off"))
    await run_all(cluster.http, jobs[:NUM_PROMPTS], CONCURRENCY)
    files, began_s = open_files(cluster), time.monotonic()
    answers = await run_all(cluster.http, jobs, CONCURRENCY)
    took_s = time.monotonic() - began_s
    assert [a.error for a in answers if a.error] == []
    wrong = [j for j, a in zip(jobs, answers, strict=True) if a.token_ids != right[str(j.prompt), j.max_tokens]]
    figure(12, f"wrong answers of {count} of the demo model", len(wrong), "answers")
    figure(12, f"{count} short requests over 1+1", took_s)
    assert wrong == []
    assert all(a.relay["attempts"] == 1 for a in answers)
    await asyncio.to_thread(cluster.wait_baseline)
    assert [n.state for n in cluster.status().nodes] == ["ready"] * 2
    # Connections of the load itself may still be open.
    assert open_files(cluster) <= files + 2 * CONCURRENCY
