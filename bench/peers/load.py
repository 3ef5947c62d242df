"""One load generator for every server: random prompts as token ids over the OpenAI completions API, streamed.

Closed loops keep a number of streams busy; an open loop sends at a rate, independent of the answers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import httpx

from bench.measure import Samples
from bench.peers.cells import prompts


@dataclass(frozen=True, slots=True)
class Load:
    """``streams`` at a time, or, if ``rate`` is set, that many requests a second at random times."""

    name: str
    prompt_tokens: int
    num_requests: int
    streams: int = 0
    rate: float = 0.0
    output_tokens: int = 64
    limit_s: float = 180.0


LOADS: tuple[Load, ...] = (
    Load("1 stream 1024 in", 1024, 2, streams=1),
    Load("8 streams 512 in", 512, 16, streams=8),
    Load("32 streams 512 in", 512, 48, streams=32),
    Load("open loop 0.45/s 1024 in", 1024, 10, rate=0.45),
)
QUICK_LOADS: tuple[Load, ...] = (
    Load("1 stream 1024 in", 1024, 1, streams=1),
    Load("8 streams 512 in", 512, 8, streams=8),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The arrival times of tokens by the client's clock, or the reason for a failure."""

    started_s: float
    stamps_s: tuple[float, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    answers: tuple[Answer, ...]
    wall_s: float
    # Requests that the load's time limit cut off or prevented.
    num_cut: int

    def figures(self) -> dict[str, Any]:
        """Seconds and milliseconds for the table; None without answers."""
        whole = [answer for answer in self.answers if answer.error is None]
        ttft = Samples.of(answer.stamps_s[0] - answer.started_s for answer in whole)
        gaps = Samples.of(b - a for answer in whole for a, b in pairwise(answer.stamps_s))
        errors = [answer.error for answer in self.answers if answer.error is not None]
        return {
            "requests": len(whole),
            "errors": len(errors),
            "cut": self.num_cut,
            "first_error": errors[0] if errors else None,
            "wall_s": self.wall_s,
            "tokens_s": sum(len(answer.stamps_s) for answer in whole) / self.wall_s,
            "ttft_s": [round(value, 4) for value in ttft.values],
            "gaps_ms": [round(value * 1e3, 2) for value in gaps.values],
        }


async def run(load: Load, base_url: str, model: str, seed: str) -> Outcome:
    """The whole load, or as much of it as the time limit allows."""
    rng = Random(seed)
    texts = prompts(seed, load.num_requests, load.prompt_tokens)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    answers: list[Answer] = []
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=load.limit_s, trust_env=False) as client:

        async def one(prompt: list[int]) -> None:
            answers.append(await ask(client, model, prompt, load.output_tokens))

        async def stream(waiting: list[list[int]]) -> None:
            while waiting:
                await one(waiting.pop())

        started_s = time.perf_counter()
        try:
            async with asyncio.timeout(load.limit_s), asyncio.TaskGroup() as group:
                if load.rate:
                    for prompt in texts:
                        group.create_task(one(prompt))
                        await asyncio.sleep(rng.expovariate(load.rate))
                else:
                    for _ in range(load.streams):
                        group.create_task(stream(texts))
        except TimeoutError:
            # Reported as cut off.
            pass
        wall_s = time.perf_counter() - started_s
    return Outcome(tuple(answers), wall_s, load.num_requests - len(answers))


async def ask(client: httpx.AsyncClient, model: str, prompt: Sequence[int], num_tokens: int) -> Answer:
    """One greedy request whose output never ends early."""
    body = {
        "model": model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip
    stamps: list[float] = []
    started_s = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Answer(started_s, (), f"HTTP {response.status_code}: {text[:300]}")
            async for event in _events(response):
                if "error" in event:
                    return Answer(started_s, tuple(stamps), str(event["error"])[:300])
                ids = [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
                stamps += [time.perf_counter()] * len(ids)
    except httpx.HTTPError as error:
        return Answer(started_s, tuple(stamps), f"{type(error).__name__}: {error}")
    if len(stamps) != num_tokens:
        return Answer(started_s, tuple(stamps), f"{len(stamps)} tokens, expected {num_tokens}")
    return Answer(started_s, tuple(stamps))


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)
