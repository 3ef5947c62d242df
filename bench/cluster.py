"""Compares a split with a colocated cluster on one machine: time to first token and between tokens, interleaved.

Both clusters have two workers with equal numbers of threads: one prefills and one decodes, or both do both (mixed).
They run side by side and are asked in turn, so that both are measured under the same conditions; the cluster that is
not asked is idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from baton.access import OPEN, AccessConfig
from baton.channels import dial
from baton.types import TransferReport
from baton.v1 import common_pb2, router_pb2, router_pb2_grpc
from bench import model as bench_model
from bench.measure import BandwidthProbe
from loadgen.clusters import Shape, started
from loadgen.samples import Samples

PROMPT_TOKENS = 1000
# For benches that send a prompt again and want it computed again.
NO_PREFIX_CACHE = ("--prefix-cache", "off")
_REQUEST_TIMEOUT_S = 120.0
_NUM_CLIENTS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """One request, by the client's clock; ``gaps_s[0]`` is from the first token to the second."""

    token_ids: tuple[int, ...]
    ttft_s: float
    gaps_s: tuple[float, ...]
    router_ttft_s: float
    transfer: TransferReport | None
    prefill_node_id: str
    decode_node_id: str
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str
    stub: router_pb2_grpc.RouterAsyncStub
    nodes: tuple[str, ...]
    http: str
    # host:port of each worker's metrics.
    metrics: tuple[str, ...]


@contextlib.asynccontextmanager
async def cluster(
    name: str, options: Sequence[str], folder: Path, run_dir: Path, access: AccessConfig = OPEN
) -> AsyncIterator[Cluster]:
    """Starts ``baton up`` with these options, waits until it is ready, and stops all its processes at the end.
    ``access``: how clients know its router."""
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    shape = Shape(name, ("--threads", str(threads), "--kv-mib", "1024", *options))
    async with started(shape, str(folder), run_dir) as found, dial(found.grpc, access) as channel:
        nodes = tuple(f"{node.id} ({node.role})" for node in found.nodes)
        metrics = tuple(node.metrics for node in found.nodes)
        yield Cluster(name, router_pb2_grpc.RouterStub(channel), nodes, found.http, metrics)


def random_prompt(rng: Random) -> list[int]:
    """A random prompt: no prefix of it was seen before."""
    return [rng.randrange(1, bench_model.VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]


async def ask(where: Cluster, prompt: Sequence[int], num_output: int) -> Timing:
    """One greedy request whose output never ends early."""
    request = router_pb2.GenerateRequest(
        prompt_token_ids=router_pb2.TokenIds(token_ids=prompt),
        sampling=common_pb2.SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True),
    )
    token_ids: list[int] = []
    stamps: list[float] = []
    finished: router_pb2.GenerateResponse.Finished | None = None
    started = time.perf_counter()
    async for response in where.stub.Generate(request, timeout=_REQUEST_TIMEOUT_S):
        if response.WhichOneof("message") == "delta":
            stamps += [time.perf_counter()] * len(response.delta.token_ids)
            token_ids += response.delta.token_ids
        elif response.WhichOneof("message") == "finished":
            finished = response.finished
    if finished is None or len(stamps) != num_output:
        raise RuntimeError(f"{where.name}: asked for {num_output} tokens, got {len(stamps)}, finished: {finished}")
    transfer = finished.relay.transfer if finished.relay.HasField("transfer") else None
    return Timing(
        token_ids=tuple(token_ids),
        ttft_s=stamps[0] - started,
        gaps_s=tuple(b - a for a, b in pairwise(stamps)),
        router_ttft_s=finished.relay.ttft_s,
        transfer=None
        if transfer is None or not transfer.num_bytes
        else TransferReport(
            transport=transfer.transport,
            layerwise=transfer.layerwise,
            num_bytes=transfer.num_bytes,
            num_blocks=transfer.num_blocks,
            total_s=transfer.total_s,
            exposed_s=transfer.exposed_s,
            retransmits=transfer.retransmits,
        ),
        prefill_node_id=finished.relay.prefill_node_id,
        decode_node_id=finished.relay.decode_node_id,
        num_cached_tokens=finished.usage.cached_tokens,
    )


async def _idle_round(where: Cluster, rng: Random, num_output: int) -> list[Timing]:
    return [await ask(where, random_prompt(rng), num_output)]


async def _loaded_round(where: Cluster, rng: Random, num_output: int) -> list[Timing]:
    """A few clients, each sending one request after another, started one step apart."""

    async def client(seed: int) -> list[Timing]:
        own = Random(seed)
        return [await ask(where, random_prompt(own), num_output) for _ in range(2)]

    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(client(rng.randrange(2**32))) for _ in range(_NUM_CLIENTS)]
    return [timing for task in clients for timing in task.result()]


def summary(timings: Sequence[Timing]) -> dict[str, Any]:
    ttft = Samples.of(t.ttft_s for t in timings)
    second = Samples.of(t.gaps_s[0] for t in timings)
    later = Samples.of(gap for t in timings for gap in t.gaps_s[1:])
    transfers = [t.transfer for t in timings if t.transfer is not None]
    return {
        "requests": len(timings),
        "ttft_p50_ms": ttft.median * 1e3,
        "ttft_p90_ms": ttft.percentile(0.9) * 1e3,
        "second_token_p50_ms": second.median * 1e3,
        "tbt_p50_ms": later.median * 1e3,
        "tbt_p99_ms": later.percentile(0.99) * 1e3,
        "tbt_max_ms": max(later.values) * 1e3,
        "handed_over": len(transfers),
        "kv_mb": transfers[0].num_bytes / 1e6 if transfers else 0.0,
        "transport": transfers[0].transport if transfers else "-",
        "layerwise": transfers[0].layerwise if transfers else False,
        "exposed_p50_ms": Samples.of(t.exposed_s for t in transfers).median * 1e3 if transfers else 0.0,
    }


def compare(split: Sequence[Timing], colocated: Sequence[Timing]) -> dict[str, float]:
    """The figures that have floors: the ratio of TTFT, and the delay of the second token in decode steps."""
    gap = Samples.of(t.gaps_s[0] for t in split).median - Samples.of(t.gaps_s[0] for t in colocated).median
    step = Samples.of(g for t in colocated for g in t.gaps_s[1:]).median
    split_ttft, colocated_ttft = (Samples.of(t.ttft_s for t in side).median for side in (split, colocated))
    split_tbt = Samples.of(g for t in split for g in t.gaps_s[1:])
    colocated_tbt = Samples.of(g for t in colocated for g in t.gaps_s[1:])
    return {
        "ttft_split_over_colocated": split_ttft / colocated_ttft,
        "second_token_later_ms": gap * 1e3,
        "second_token_later_steps": gap / step,
        "tbt_p50_split_over_colocated": split_tbt.median / colocated_tbt.median,
        "tbt_p99_split_over_colocated": split_tbt.percentile(0.99) / colocated_tbt.percentile(0.99),
    }


async def _measure(quick: bool) -> dict[str, Any]:
    folder = bench_model.bench_model()
    probe, rng = BandwidthProbe(), Random(0)
    num_output = 16 if quick else 32
    bandwidths: list[float] = []
    results: dict[str, Any] = {"model": bench_model.NAME, "prompt_tokens": PROMPT_TOKENS, "output_tokens": num_output}
    async with contextlib.AsyncExitStack() as stack:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))
        split = await stack.enter_async_context(cluster("split", ["--prefill", "1", "--decode", "1"], folder, run_dir))
        mixed = await stack.enter_async_context(cluster("colocated", ["--mixed", "2"], folder, run_dir))
        results["nodes"] = {where.name: list(where.nodes) for where in (split, mixed)}
        for title, one_round, rounds in (
            ("idle", _idle_round, 3 if quick else 15),
            ("loaded", _loaded_round, 1 if quick else 3),
        ):
            timings: dict[str, list[Timing]] = {split.name: [], mixed.name: []}
            # The first idle round is a warm-up.
            for i in range(rounds + (one_round is _idle_round)):
                bandwidths.append(probe.read_gb_s())
                for where in (split, mixed) if i % 2 else (mixed, split):
                    taken = await one_round(where, rng, num_output)
                    timings[where.name] += taken if i or one_round is _loaded_round else []
            results[title] = {
                "compared": compare(timings[split.name], timings[mixed.name]),
                "rows": [{"cluster": name, **summary(taken)} for name, taken in timings.items()],
                "samples": {name: [asdict(t) for t in taken] for name, taken in timings.items()},
            }
    results["read_gb_s"] = Samples.of(bandwidths).median
    return results


def run(quick: bool) -> dict[str, Any]:
    """``idle``: one request at a time. ``loaded``: three clients. Each with the figures of both clusters and their
    comparison."""
    return asyncio.run(_measure(quick))
