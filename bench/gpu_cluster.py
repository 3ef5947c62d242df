"""The 1+1 cluster on one GPU: are its tokens those of one node, and what does the hand-over cost?

A prefill and a decode worker share the GPU and hand KV over by cuda_ipc; beside them stands one mixed worker with the
same model. Each prompt is asked of both alone and among the others: all four answers must have the same token ids. On
Triton's interpreter a small model takes the same path over shared memory, and times mean nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from bench import model as bench_model
from bench.cluster import Cluster, Timing, ask, cluster, compare, summary

_DEMO = Path(__file__).resolve().parents[1] / "demo" / "model"


@dataclass(frozen=True, slots=True)
class _Work:
    folder: Path
    dtype: str
    # Within a block, across its edge, and long enough to be pushed layer by layer.
    lengths: tuple[int, ...]
    num_output: int
    num_rounds: int
    transport: str


def _work(is_gpu: bool) -> _Work:
    if is_gpu:
        folder = bench_model.bench_model()
        return _Work(folder, "bfloat16", (1, 63, 64, 65, 500, 1000, 2000, 4000), 64, 5, "cuda_ipc")
    return _Work(_DEMO, "float32", (2, 65, 130), 3, 1, "shm")


def run(*, is_gpu: bool) -> dict[str, Any]:
    """``is_right`` and, on a GPU, times: split beside colocated, one request at a time."""
    return asyncio.run(_measure(_work(is_gpu), is_gpu=is_gpu))


async def _measure(work: _Work, *, is_gpu: bool) -> dict[str, Any]:
    rng = Random(0)
    vocab_size = json.loads((work.folder / "config.json").read_text())["vocab_size"]
    prompts = [[rng.randrange(1, vocab_size) for _ in range(length)] for length in work.lengths]
    common = ("--kernels", "triton", "--dtype", work.dtype)
    async with contextlib.AsyncExitStack() as stack:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))

        async def start(name: str, *roles: str) -> Cluster:
            return await stack.enter_async_context(cluster(name, [*roles, *common], work.folder, run_dir))

        split = await start("split", "--prefill", "1", "--decode", "1", "--transport", work.transport)
        colocated = await start("colocated", "--mixed", "1")
        # The first round warms up. Who goes first changes.
        alone: dict[str, list[Timing]] = {split.name: [], colocated.name: []}
        for number in range(work.num_rounds + is_gpu):
            for where in (split, colocated) if number % 2 else (colocated, split):
                taken = [await ask(where, prompt, work.num_output) for prompt in prompts]
                alone[where.name] += taken if number or not is_gpu else []
        crowded = {where.name: await _at_once(where, prompts, work.num_output) for where in (split, colocated)}
    wrong = _differences(work, [*alone.values(), *crowded.values()])
    moved = [t.transfer for t in (*alone[split.name], *crowded[split.name])]
    if any(t is None or t.transport != work.transport for t in moved):
        found = sorted({"none" if t is None else t.transport for t in moved})
        wrong.append(f"1+1 cluster: moved by {', '.join(found)}, expected {work.transport}")
    result: dict[str, Any] = {
        "model": work.folder.name,
        "is_right": not wrong,
        "wrong": wrong,
        "transport": work.transport,
    }
    if is_gpu:
        result["rows"] = [{"cluster": name, **summary(timings)} for name, timings in alone.items()]
        result["compared"] = compare(alone[split.name], alone[colocated.name])
        result["gb_per_s"] = [
            t.num_bytes / t.total_s / 1e9 for t in moved[-len(work.lengths) :] if t is not None and t.total_s > 0
        ]
    return result


async def _at_once(where: Cluster, prompts: Sequence[Sequence[int]], num_output: int) -> list[Timing]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(where, prompt, num_output)) for prompt in prompts]
    return [task.result() for task in tasks]


def _differences(work: _Work, runs: Sequence[Sequence[Timing]]) -> list[str]:
    """Prompts, by length, whose answers are not the same in all runs, which hold the prompts in order, repeatedly."""
    answers: dict[int, set[tuple[int, ...]]] = {}
    for timings in runs:
        for i, timing in enumerate(timings):
            answers.setdefault(work.lengths[i % len(work.lengths)], set()).add(timing.token_ids)
    return [
        f"1+1 cluster, {length} prompt tokens: {len(found)} answers"
        for length, found in answers.items()
        if len(found) > 1
    ]
