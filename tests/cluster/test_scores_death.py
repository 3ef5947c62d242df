"""Log-probabilities of prompts survive kill -9 of the prefill node that computes them: each figure is the same."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import baton
from tests.support.cluster import Cluster, StartCluster

NUM_PROMPTS = 3
PROMPT_TOKENS = 700
VOCAB_SIZE = 2800
# Over HTTP: what is asked beside the prompt.
ASKED: tuple[dict[str, Any], ...] = (
    {"echo": True, "logprobs": 2, "max_tokens": 24},
    {"echo": True, "logprobs": 1, "max_tokens": 0},
    {"prompt_logprobs": 2, "logprobs": 1, "max_tokens": 24},
)


class Answer(NamedTuple):
    """What must be equal, and how often it was begun."""

    content: Any
    num_attempts: int


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(300, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)]


async def over_http(client: httpx.AsyncClient, prompt: list[int], asked: dict[str, Any], temperature: float) -> Answer:
    body = {
        "prompt": prompt, "temperature": temperature, "seed": 7, "ignore_eos": True, "return_relay": True,
        "return_token_ids": True, **asked,
    }  # fmt: skip
    got = await client.post("/v1/completions", json=body)
    assert got.status_code == 200, got.text
    answer = got.json()
    num_attempts = answer["baton"]["relay"]["attempts"]
    changing = ("id", "created", "baton", "usage")
    return Answer({name: value for name, value in answer.items() if name not in changing}, num_attempts)


async def over_grpc(client: baton.AsyncClient, prompt: list[int], temperature: float, *, is_only: bool) -> Answer:
    settings: dict[str, Any] = {"prompt_only": True} if is_only else {"max_tokens": 24, "logprobs": 1}
    got = await client.complete(
        prompt, temperature=temperature, seed=7, ignore_eos=True, prompt_logprobs=2, timeout_s=120, **settings
    )
    assert len(got.prompt_logprobs) == PROMPT_TOKENS - 1
    return Answer((got.token_ids, got.text, got.logprobs, got.prompt_logprobs), got.relay.attempts)


async def ask_all(cluster: Cluster) -> list[Answer]:
    async with (
        httpx.AsyncClient(base_url=cluster.http, timeout=120) as http,
        baton.AsyncClient(cluster.grpc) as grpc,
        asyncio.TaskGroup() as group,
    ):
        calls = [
            call
            for prompt in prompts()
            for temperature in (0.0, 1.0)
            for call in (
                *(over_http(http, prompt, asked, temperature) for asked in ASKED),
                over_grpc(grpc, prompt, temperature, is_only=False),
                over_grpc(grpc, prompt, temperature, is_only=True),
            )
        ]
        tasks = [group.create_task(call) for call in calls]
        await asyncio.wait(tasks)
    return [task.result() for task in tasks]


async def test_scores_are_the_same_after_a_death_of_the_prefill_node(
    shared_cluster: StartCluster, demo_model: Path
) -> None:
    cluster = shared_cluster(demo_model, prefill=2, decode=2)
    began_s = time.monotonic()
    undisturbed = await ask_all(cluster)
    took_s = time.monotonic() - began_s
    running = asyncio.create_task(ask_all(cluster))
    # All are under way then: what the node computes and what waits for it is lost.
    await asyncio.sleep(0.4 * took_s)
    dead = cluster.kill("prefill-0")
    disturbed = await running
    for number, (before, after) in enumerate(zip(undisturbed, disturbed, strict=True)):
        assert after.content == before.content, number
    assert sum(answer.num_attempts - 1 for answer in disturbed) > 0, "the kill hit no request: nothing was tested"
    await asyncio.to_thread(cluster.wait_back, dead)
    await asyncio.to_thread(cluster.wait_baseline)
