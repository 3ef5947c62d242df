"""Compares a 1+1 cluster on one GPU with a single node: equal tokens, and the cost of the hand-off.

A prefill and a decode worker share the GPU and hand KV over by cuda_ipc; a mixed worker with the same model runs beside
them. Each prompt is sent to both, alone and among the others: all four answers must have the same token ids. Under
Triton's interpreter a small model takes the same path over shared memory, and times mean nothing.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from bench.gpu_child import Context
from bench.gpu_measure import Case, Task

if TYPE_CHECKING:
    from bench.cluster import Cluster, Timing

_DEMO = Path(__file__).resolve().parents[1] / "demo" / "model"
# Few steps are recorded and warmed up: most of the time here is the start.
_GPU_OPTIONS = ("--gpus", "0", "--max-graph-seqs", "8", "--max-num-seqs", "16")


@dataclass(frozen=True, slots=True)
class _Work:
    name: str
    folder: Callable[[], Path]
    dtype: str
    # Prompts within a block, across its edge, and long enough to be pushed layer by layer.
    lengths: tuple[int, ...]
    num_output: int
    num_rounds: int
    transport: str


def cases(context: Context) -> Iterator[Case]:
    is_gpu = context.device.is_gpu
    if context.wheels is not None:
        yield Task("1+1 cluster", "wheels", partial(_installed, context.wheels))
    lengths = (1, 63, 64, 65, 500, 1000)
    if is_gpu:
        demo = _Work("demo model", lambda: _DEMO, "float32", lengths, 32, 2, "cuda_ipc")
        large = _Work("0.25B", _bench_model, "bfloat16", (*lengths, 2000, 3900), 64, 5, "cuda_ipc")
        works = [demo] if context.is_tiny else [demo, large]
    else:
        works = [_Work("demo model", lambda: _DEMO, "float32", (2, 65), 2, 1, "shm")]
    for work in works:
        run = partial(_run, work, is_gpu=is_gpu)
        yield Task("1+1 cluster", f"{work.name}, by {work.transport}", run, work.dtype)


def install(wheels: Path, to: Path) -> int:
    """Installs missing packages from wheels into a folder that comes first on the path; returns how many. Uses no
    network."""
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise FileNotFoundError(f"no wheels in {wheels}; `python scripts/gpu_wheels.py {wheels}` gathers them")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--target", str(to)]
    done = subprocess.run([*command, *found], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip: {done.stderr.strip()[-1000:]}")
    return len(found)


def _installed(wheels: Path) -> dict[str, Any]:
    """Installs packages for this process and the cluster's processes."""
    folder = tempfile.mkdtemp(prefix="baton-wheels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    count = install(wheels, Path(folder))
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    return {"is_right": True, "said": f"{count} wheels"}


def _bench_model() -> Path:
    from bench import model

    return model.bench_model()


def _run(work: _Work, *, is_gpu: bool) -> dict[str, Any]:
    """``is_right`` and, on a GPU, times: split beside colocated, one request at a time."""
    return asyncio.run(_measure(work, is_gpu=is_gpu))


async def _measure(work: _Work, *, is_gpu: bool) -> dict[str, Any]:
    # Imported here: it needs packages that may just have been installed.
    from bench.cluster import NO_PREFIX_CACHE, ask, cluster, compare, summary

    rng, folder = Random(0), work.folder()
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    prompts = [[rng.randrange(1, vocab_size) for _ in range(length)] for length in work.lengths]
    common = ("--kernels", "triton", "--dtype", work.dtype, *NO_PREFIX_CACHE, *(_GPU_OPTIONS if is_gpu else ()))
    async with contextlib.AsyncExitStack() as stack:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))

        async def start(name: str, *roles: str) -> Cluster:
            return await stack.enter_async_context(cluster(name, [*roles, *common], folder, run_dir))

        async with asyncio.TaskGroup() as group:
            starting = [
                group.create_task(start("split", "--prefill", "1", "--decode", "1", "--transport", work.transport)),
                group.create_task(start("colocated", "--mixed", "1")),
            ]
        split, colocated = (task.result() for task in starting)
        # The first round is a warm-up. The order alternates.
        alone: dict[str, list[Timing]] = {split.name: [], colocated.name: []}
        for number in range(work.num_rounds + is_gpu):
            for where in (split, colocated) if number % 2 else (colocated, split):
                taken = [await ask(where, prompt, work.num_output) for prompt in prompts]
                alone[where.name] += taken if number or not is_gpu else []
        crowded = {where.name: await _at_once(where, prompts, work.num_output) for where in (split, colocated)}
    wrong = differences(work.lengths, [*alone.values(), *crowded.values()])
    moved = [t.transfer for t in (*alone[split.name], *crowded[split.name])]
    if any(t is None or t.transport != work.transport for t in moved):
        found = sorted({"none" if t is None else t.transport for t in moved})
        wrong.append(f"moved by {', '.join(found)}, expected {work.transport}")
    result: dict[str, Any] = {"is_right": not wrong, "said": "; ".join(wrong) or "one answer to each prompt"}
    if is_gpu:
        result["clusters"] = [{"cluster": name, **summary(timings)} for name, timings in alone.items()]
        result["compared"] = compare(alone[split.name], alone[colocated.name])
        result["gb_per_s"] = [
            t.num_bytes / t.total_s / 1e9 for t in moved[-len(work.lengths) :] if t is not None and t.total_s > 0
        ]
    return result


async def _at_once(where: Cluster, prompts: Sequence[Sequence[int]], num_output: int) -> list[Timing]:
    from bench.cluster import ask

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(where, prompt, num_output)) for prompt in prompts]
    return [task.result() for task in tasks]


def differences(lengths: Sequence[int], runs: Sequence[Sequence[Timing]]) -> list[str]:
    """The prompts, by length, whose answers differ between runs. Each run holds the prompts in order, repeatedly."""
    answers: dict[int, set[tuple[int, ...]]] = {}
    for timings in runs:
        for i, timing in enumerate(timings):
            answers.setdefault(lengths[i % len(lengths)], set()).add(timing.token_ids)
    return [f"{length} prompt tokens: {len(found)} answers" for length, found in answers.items() if len(found) > 1]
