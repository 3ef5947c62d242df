"""The demo model answers from its context: a lost, garbled or misplaced KV block is a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.tasks import Task, recall_prompts
from tests.support.cluster import StartCluster
from tests.support.load import Answer, Job, run_all

CONCURRENCY = 16
MIN_ACCURACY = 0.95


def jobs(tasks: list[Task]) -> list[Job]:
    return [Job(task.prompt, task.num_output_tokens + 4) for task in tasks]


def accuracy(tasks: list[Task], answers: list[Answer]) -> float:
    return sum(t.accepts(a.text) for t, a in zip(tasks, answers, strict=True)) / len(tasks)


async def split_equals_colocated(shared_cluster: StartCluster, model: Path, count: int) -> None:
    tasks = recall_prompts(seed=97, count=count)
    cluster = shared_cluster(model, prefill=2, decode=2)
    split = await run_all(cluster.http, jobs(tasks), CONCURRENCY)
    cluster.wait_baseline()
    cluster = shared_cluster(model, prefill=0, decode=0, mixed=2)
    colocated = await run_all(cluster.http, jobs(tasks), CONCURRENCY)
    cluster.wait_baseline()
    assert [a.error for a in split + colocated] == [None] * (2 * count)
    assert [a.token_ids for a in split] == [a.token_ids for a in colocated]
    assert all(a.relay["prefill_node_id"] != a.relay["decode_node_id"] for a in split)
    assert all(a.relay["prefill_node_id"] == a.relay["decode_node_id"] for a in colocated)
    assert accuracy(tasks, split) >= MIN_ACCURACY


async def test_split_answers_like_colocated(shared_cluster: StartCluster, demo_model: Path) -> None:
    await split_equals_colocated(shared_cluster, demo_model, 40)


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_500_prompts_split_answer_like_colocated(shared_cluster: StartCluster, demo_model: Path) -> None:
    await split_equals_colocated(shared_cluster, demo_model, 500)


async def test_corrupted_block_is_caught_and_the_request_ends_right(
    start_cluster: StartCluster, shared_cluster: StartCluster, demo_model: Path
) -> None:
    tasks = recall_prompts(seed=98, count=12)
    expected = await run_all(shared_cluster(demo_model, prefill=1, decode=1).http, jobs(tasks), 4)
    cluster = start_cluster(demo_model, prefill=1, decode=1, transport="fake:corrupt=5,seed=3,over=shm")
    answers = await run_all(cluster.http, jobs(tasks), 4)
    cluster.wait_baseline()
    assert [a.error for a in answers] == [None] * len(tasks)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    # Without a retransmission or a rerun nothing was corrupted and this test has shown nothing.
    retransmits = sum(a.relay["transfer"]["retransmits"] for a in answers if a.relay["transfer"])
    assert retransmits + sum(a.relay["attempts"] - 1 for a in answers) > 0
