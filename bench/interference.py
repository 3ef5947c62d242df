"""What a prompt of 1,500 tokens costs those that generate: gaps between tokens of running streams while prompts arrive.

Every cluster has two workers with the same number of threads: one prefills and one decodes, or both do both (mixed),
without a target for gaps and with several. Each runs by itself. Its streams are measured alone first (idle), then while
prompts arrive at fixed times, whatever the answers. One replica is measured by itself as well, in processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from baton.v1 import common_pb2, router_pb2
from bench import cluster as clusters
from bench import model as bench_model
from bench.interference_engine import Work, measure
from bench.measure import BandwidthProbe
from loadgen.samples import Samples

NUM_STREAMS = 8
STREAM_PROMPT_TOKENS = 200
PROMPT_TOKENS = 1500
# What such a prompt's request generates, so that mixed workers decode it beside the streams.
ANSWER_TOKENS = 16
# A worker's thread computes such a prompt in about three seconds.
PERIOD_S = 5.0
_SETTLED_TOKENS = 16
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    options: tuple[str, ...]
    target_ms: int | None = None


def cases(quick: bool) -> tuple[Case, ...]:
    mixed = ("--mixed", "2")
    targets = (100,) if quick else (50, 100, 200, 500)
    return (
        Case("split", ("--prefill", "1", "--decode", "1", "--disaggregation", "always")),
        Case("mixed", mixed),
        *(Case(f"mixed, target {target} ms", (*mixed, "--tbt-target-ms", str(target)), target) for target in targets),
    )


@dataclass(slots=True)
class Stream:
    """Arrival times of its tokens, by the client's clock."""

    stamps_s: list[float] = field(default_factory=list)
    # Its first tokens have come.
    is_settled: asyncio.Event = field(default_factory=asyncio.Event)

    def gaps_s(self, since_s: float, until_s: float) -> list[float]:
        """Those that began in this time."""
        return [b - a for a, b in pairwise(self.stamps_s) if since_s <= a < until_s]


@contextlib.asynccontextmanager
async def streams(where: clusters.Cluster, rng: Random) -> AsyncIterator[list[Stream]]:
    """Requests that generate until the end of the context."""
    made = [Stream() for _ in range(NUM_STREAMS)]
    num_tokens = bench_model.MAX_MODEL_TOKENS - STREAM_PROMPT_TOKENS
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_follow(where, prompt(rng, STREAM_PROMPT_TOKENS), num_tokens, s)) for s in made]
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                for stream in made:
                    await stream.is_settled.wait()
            yield made
            if any(task.done() for task in tasks):
                raise RuntimeError(f"{where.name}: a stream ended while it was measured")
        finally:
            for task in tasks:
                task.cancel()


async def _follow(where: clusters.Cluster, token_ids: Sequence[int], num_tokens: int, into: Stream) -> None:
    request = router_pb2.GenerateRequest(
        prompt_token_ids=router_pb2.TokenIds(token_ids=token_ids),
        sampling=common_pb2.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
    )
    async for response in where.stub.Generate(request, timeout=_TIMEOUT_S):
        into.stamps_s += [time.perf_counter()] * len(response.delta.token_ids)
        if len(into.stamps_s) >= _SETTLED_TOKENS:
            into.is_settled.set()


def prompt(rng: Random, num_tokens: int) -> list[int]:
    return [rng.randrange(1, bench_model.VOCAB_SIZE) for _ in range(num_tokens)]


async def _arrivals(where: clusters.Cluster, rng: Random, num_prompts: int) -> list[clusters.Timing]:
    async with asyncio.TaskGroup() as group:
        asked = []
        for _ in range(num_prompts):
            asked.append(group.create_task(clusters.ask(where, prompt(rng, PROMPT_TOKENS), ANSWER_TOKENS)))
            await asyncio.sleep(PERIOD_S)
    return [task.result() for task in asked]


async def _measure_one(case: Case, folder: Path, run_dir: Path, rng: Random, quick: bool) -> dict[str, Any]:
    num_prompts, idle_s = (3, 3.0) if quick else (8, 10.0)
    async with clusters.cluster(
        f"r{rng.random()}", (*case.options, *clusters.NO_PREFIX_CACHE), folder, run_dir
    ) as where:
        # Measured step times, and all that is done once.
        await _arrivals(where, rng, 1)
        async with streams(where, rng) as running:
            began_s = time.perf_counter()
            await asyncio.sleep(idle_s)
            loaded_s = time.perf_counter()
            timings = await _arrivals(where, rng, num_prompts)
            ended_s = time.perf_counter()
        idle = [gap for stream in running for gap in stream.gaps_s(began_s, loaded_s)]
        loaded = [gap for stream in running for gap in stream.gaps_s(loaded_s, ended_s)]
    return {
        "idle": idle,
        "loaded": loaded,
        "ttft": [timing.ttft_s for timing in timings],
        "handed_over": sum(timing.prefill_node_id != timing.decode_node_id for timing in timings),
        "tokens_s": len(loaded) / (ended_s - loaded_s),
    }


def row(case: Case, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    idle, loaded = (Samples.of(gap for r in rounds for gap in r[name]) for name in ("idle", "loaded"))
    ttft = Samples.of(value for r in rounds for value in r["ttft"])
    return {
        "cluster": case.name,
        "idle_p50_ms": idle.median * 1e3,
        "idle_p99_ms": idle.percentile(0.99) * 1e3,
        "p50_ms": loaded.median * 1e3,
        "p99_ms": loaded.percentile(0.99) * 1e3,
        "max_ms": max(loaded.values) * 1e3,
        "p99_over_idle": loaded.percentile(0.99) / idle.percentile(0.99),
        "p99_over_target": None if case.target_ms is None else loaded.percentile(0.99) * 1e3 / case.target_ms,
        "ttft_p50_s": ttft.median,
        "ttft_max_s": max(ttft.values),
        "stream_tokens_s": Samples.of(r["tokens_s"] for r in rounds).median,
        "handed_over": f"{sum(r['handed_over'] for r in rounds)} of {len(ttft.values)}",
        "samples_ttft_s": [round(value, 4) for value in ttft.values],
        "samples_gaps_ms": [round(gap * 1e3, 2) for gap in loaded.values],
    }


async def _measure(quick: bool) -> dict[str, Any]:
    folder, probe, rng = bench_model.bench_model(), BandwidthProbe(), Random(0)
    taken: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases(quick)}
    bandwidths = []
    with TemporaryDirectory(prefix="baton-bench-") as run_dir:
        for _ in range(1 if quick else 3):
            for case, rounds in taken.items():
                bandwidths.append(probe.read_gb_s())
                rounds.append(await _measure_one(case, folder, Path(run_dir), rng, quick))
    return {
        "streams": NUM_STREAMS,
        "prompt_tokens": PROMPT_TOKENS,
        "period_s": PERIOD_S,
        "read_gb_s": Samples.of(bandwidths).median,
        "rows": [row(case, rounds) for case, rounds in taken.items()],
    }


def run(quick: bool) -> dict[str, Any]:
    """A row for each cluster, over all rounds; and for each target of one replica."""
    targets = (None, *(case.target_ms for case in cases(quick) if case.target_ms is not None))
    num_prompts, stream_tokens = (2, 100) if quick else (4, 200)
    work = Work(
        NUM_STREAMS, STREAM_PROMPT_TOKENS, stream_tokens, num_prompts, PROMPT_TOKENS, ANSWER_TOKENS, period_s=3.0
    )  # fmt: skip
    return {"one_replica": {"rows": measure(work, targets)}, "clusters": asyncio.run(_measure(quick))}
