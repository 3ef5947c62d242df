"""Overload: three times the requests that the cluster can serve, with and without admission by objective.

One router over HTTP and fake nodes whose prompts take time, all in this process. First the best goodput: requests per
second that have their first token within the objective, over several rates. Then three times the capacity for a while,
and at once a rate that is easily served, until all requests meet the objective again. Every request says its objective;
without admission the router does not know it. A third of them are sheddable. Takes five minutes.

    python -m bench overload
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from router.cluster.config import PolicyConfig
from router.cluster.membership import State
from router.config import RouterConfig
from router.serve import running
from worker.fake import FakeCluster, FakeConfig

_PROMPT_TOKENS, _OUTPUT_TOKENS = 1000, 16
_NODES = FakeConfig(num_blocks=8192, step_s=0.005, prefill_token_s=4e-4, max_batch_tokens=2048)
# So many of these prompts a second, as the prefill node alone computes them.
_CAPACITY = 1 / (_PROMPT_TOKENS * _NODES.prefill_token_s)
_OBJECTIVE_S = 4.0
# Of the requests, those that may be shed before others.
_SHEDDABLE_SHARE = 1 / 3
_RATES = (0.8, 0.9, 1.0)
_OVERLOAD, _AFTERWARDS = 3.0, 0.7
# Overloaded, or no node was heard of in time.
_REFUSED = (429, 503)


@dataclass(frozen=True, slots=True)
class _Answer:
    sent_s: float
    # To the first token, or to the refusal.
    seconds: float
    is_refused: bool
    is_sheddable: bool

    @property
    def is_good(self) -> bool:
        return not self.is_refused and self.seconds <= _OBJECTIVE_S


def run(quick: bool) -> dict[str, Any]:
    return asyncio.run(_run(10.0 if quick else 20.0, 20.0 if quick else 60.0))


async def _run(sweep_s: float, overload_s: float) -> dict[str, Any]:
    sweep = []
    for share in _RATES:
        async with _served(admits=True) as http:
            answers = await _load(http, [(share * _CAPACITY, sweep_s)])
        sweep.append({"rate of capacity": share} | _summary(answers, sweep_s))
    best = max(row["goodput 1/s"] for row in sweep)
    rows = []
    for admits in (True, False):
        async with _served(admits=admits) as http:
            answers = await _load(
                http, [(_OVERLOAD * _CAPACITY, overload_s), (_AFTERWARDS * _CAPACITY, overload_s / 3)]
            )
        begun_s = min(answer.sent_s for answer in answers)
        during = [answer for answer in answers if answer.sent_s < begun_s + overload_s]
        after = [answer for answer in answers if answer.sent_s >= begun_s + overload_s]
        row = {"admission": "by objective" if admits else "none"} | _summary(during, overload_s)
        row["share of best goodput"] = row["goodput 1/s"] / best
        row["recovery s"] = _recovery_s(after, begun_s + overload_s)
        rows.append(row)
    return {
        "capacity 1/s": _CAPACITY, "objective s": _OBJECTIVE_S, "best goodput 1/s": best, "sweep": sweep,
        f"{_OVERLOAD:g} times the capacity for {overload_s:g} s": rows,
    }  # fmt: skip


def _summary(answers: Sequence[_Answer], seconds: float) -> dict[str, Any]:
    refused = [answer.seconds for answer in answers if answer.is_refused]
    served = [answer.seconds for answer in answers if not answer.is_refused and math.isfinite(answer.seconds)]
    kept = [answer for answer in answers if not answer.is_sheddable]
    return {
        "requests": len(answers),
        "refused": len(refused),
        "goodput 1/s": sum(answer.is_good for answer in answers) / seconds,
        "late": sum(not answer.is_good for answer in answers) - len(refused),
        "good of priority 0": sum(answer.is_good for answer in kept) / max(1, len(kept)),
        "TTFT p50 s": statistics.median(served) if served else None,
        "TTFT p99 s": _p99(served),
        "refused in ms p50": statistics.median(refused) * 1e3 if refused else None,
        "refused in ms p99": None if not refused else (_p99(refused) or 0.0) * 1e3,
        "refused in ms max": max(refused) * 1e3 if refused else None,
    }


def _p99(values: Sequence[float]) -> float | None:
    return sorted(values)[int(0.99 * (len(values) - 1))] if values else None


def _recovery_s(after: Sequence[_Answer], over_at_s: float) -> float | None:
    """From the end of the overload until a request was sent from which on all were good; None: it was not seen."""
    bad = [answer.sent_s for answer in after if not answer.is_good]
    if not bad:
        return 0.0
    good = [answer.sent_s for answer in after if answer.sent_s > max(bad)]
    return min(good) - over_at_s if len(good) >= 5 else None


@asynccontextmanager
async def _served(*, admits: bool) -> AsyncIterator[httpx.AsyncClient]:
    async with FakeCluster(_NODES, prefill=1, decode=1) as cluster:
        policy = PolicyConfig(disaggregation="always")
        async with running(RouterConfig(nodes=cluster.addresses, policy=policy)) as router:
            members = router.dispatcher.nodes.members
            while not all(member.state is State.READY for member in members):  # noqa: ASYNC110 (nothing tells of it)
                await asyncio.sleep(0.01)
            assert router.http is not None
            headers = {"x-slo-ttft-ms": f"{_OBJECTIVE_S * 1e3:g}"} if admits else {}
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=router.http, headers=headers, timeout=600, limits=limits) as http:
                await _load(http, [(_CAPACITY / 2, 5.0)])  # rates are learned
                yield http


async def _load(http: httpx.AsyncClient, phases: Sequence[tuple[float, float]]) -> list[_Answer]:
    """Poisson arrivals at (rate, for so many seconds), one phase after the other, whatever becomes of them."""
    rng = random.Random(7)
    answers: list[_Answer] = []
    due_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        asked = []
        for rate, seconds in phases:
            end_s = due_s + seconds
            while (due_s := due_s + rng.expovariate(rate)) < end_s:
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                what = rng.random() < _SHEDDABLE_SHARE, rng.randrange(1 << 30)
                asked.append(group.create_task(_ask(http, *what, answers)))
            due_s = end_s
        # What has no first token by then is late in any case.
        await asyncio.wait(asked, timeout=_OBJECTIVE_S)
        for task in asked:
            task.cancel()
    return answers


async def _ask(http: httpx.AsyncClient, is_sheddable: bool, seed: int, answers: list[_Answer]) -> None:
    prompt = [seed % 499 + 1] + [(seed + i) % 500 for i in range(_PROMPT_TOKENS - 1)]
    body = {"prompt": prompt, "max_tokens": _OUTPUT_TOKENS, "ignore_eos": True, "stream": True}
    sent_s, first_s, status = time.monotonic(), math.inf, 200
    try:
        async with http.stream("POST", "/v1/completions", json=body | {"priority": int(is_sheddable)}) as answer:
            # The status line comes with the first token.
            first_s, status = time.monotonic(), answer.status_code
            if status not in (200, *_REFUSED):
                raise RuntimeError(f"HTTP {status}: {(await answer.aread()).decode()}")
            async for _ in answer.aiter_raw():
                pass
    finally:
        answers.append(_Answer(sent_s, first_s - sent_s, status in _REFUSED, is_sheddable))
