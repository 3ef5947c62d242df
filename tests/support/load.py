"""Ask a running cluster many things at once over its OpenAI API and keep what came back, token ids included."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from demo.tasks import mixed_prompts

REQUEST_TIMEOUT_S = 120.0


@dataclass
class Answer:
    """One finished stream: everything the client saw, in order."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    relay: dict[str, Any] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return self.error is None and self.finish_reason is not None


@dataclass(frozen=True)
class Job:
    """A completion to ask for; ``prompt`` is text or token ids, ``extra`` overrides any field of the request."""

    prompt: str | Sequence[int]
    max_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)


async def complete(client: httpx.AsyncClient, model: str, job: Job) -> Answer:
    """Stream one completion to its end; a failure is kept in ``error``, never raised."""
    body = {
        "model": model,
        "prompt": job.prompt if isinstance(job.prompt, str) else list(job.prompt),
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "return_relay": True,
        **job.extra,
    }
    answer = Answer()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode()}"
                return answer
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(answer, json.loads(line[len("data: ") :]))
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _take(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        answer.error = chunk["error"]["message"]
        return
    if "baton" in chunk:
        answer.relay = chunk["baton"]["relay"]
    for choice in chunk.get("choices", []):
        answer.text += choice.get("text") or ""
        answer.token_ids += choice.get("token_ids") or []
        answer.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


async def run_all(base_url: str, jobs: Sequence[Job], concurrency: int) -> list[Answer]:
    """All jobs, at most ``concurrency`` at a time; the answers come in the order of the jobs."""
    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency + 4)
    async with httpx.AsyncClient(base_url=base_url, timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(job: Job) -> Answer:
            async with gate:
                return await complete(client, model, job)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(job)) for job in jobs]
    return [task.result() for task in tasks]


def mixed_jobs(count: int) -> list[Job]:
    """Half greedy, half sampled with a seed; prompts of every length, answers of 24 to 132 tokens."""
    tasks = mixed_prompts(seed=11, count=count)
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "ignore_eos": True}
    return [Job(t.prompt, 24 + 12 * (i % 10), sampled if i % 2 else {"ignore_eos": True}) for i, t in enumerate(tasks)]
