"""Compiles Triton kernels for GPUs that are not present, exactly as a launch would: `python -m bench.aot`.

A stand-in replaces Triton's GPU driver. Kernels are launched on tensors without memory; Triton specializes and compiles
them for the stand-in's target, and the binary is inspected instead of loaded: registers, stack (spills), shared memory,
and whether the expected matrix instructions are there. With
``--ahead``, on a machine with a GPU, the same launches fill Triton's cache: the kernels that `bench.gpu` will launch
are compiled on all cores while its first stages run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench import gpu_kernels, tune
from bench.gpu_measure import Device, Work
from bench.gpu_sizes import LLAMA_8B, QWEN_06B, SERVED, TINY
from engine.kernels.interface import DRAW_DTYPES, Draws
from engine.kernels.triton.decode_attention import decode_attention
from engine.kernels.triton.fake_driver import SHARED_LIMIT_BYTES, FakeDriver, standing_in
from engine.kernels.triton.gemm import linear
from engine.kernels.triton.kv_copy import gather_blocks, scatter_blocks
from engine.kernels.triton.pointwise import add_rms_norm, embed, rms_norm, rope_store, silu_mul
from engine.kernels.triton.prefill_attention import contiguous_prefill_attention, paged_prefill_attention
from engine.kernels.triton.sampling import TritonSampler
from engine.kernels.triton.shared_prefix import SharedPlan, shared_decode_attention
from engine.kernels.triton.tuning import Tuning, load, parse

_COUNTED = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in one specialization."""

    kernel: str
    case: str
    arch: int
    triton: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    # Counts of the instructions of interest, by their SASS name without modifiers.
    instructions: dict[str, int] = field(default_factory=dict)


class CompileOnlyDriver(FakeDriver):
    """Replaces Triton's GPU driver: a launch compiles the kernel and does nothing else; binaries are inspected."""

    def __init__(self, arch: int, *, inspects: bool = True) -> None:
        super().__init__(arch, self._inspect if inspects else None)
        self.is_recording = False
        self.case = ""
        self.compiled: list[Compiled] = []
        self._inspected_arch = arch

    def _inspect(self, name: str, binary: bytes, shared_bytes: int, metadata: Any) -> None:
        registers, stack, counts = inspect_binary(binary)
        self.compiled.append(
            Compiled(
                name, self.case, self._inspected_arch, triton.__version__, metadata.num_warps, metadata.num_stages,
                registers, stack, shared_bytes, counts,
            )
        )  # fmt: skip


def inspect_binary(binary: bytes) -> tuple[int, int, dict[str, int]]:
    """(registers, stack bytes, counts of instructions) of a cubin with one kernel."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", sass, re.MULTILINE)
    return int(found[1]), int(found[2]), {name: names.count(name) for name in _COUNTED}


@dataclass(frozen=True, slots=True)
class Case:
    """One launch as serving makes it. ``has_hgmma``: on Hopper it must use warp-group products."""

    name: str
    launch: Callable[[], object]
    has_hgmma: bool = False
    # The cases that the test suite compiles.
    is_fast: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """The shapes of a model that is served."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    has_qk_norm: bool = False
    window: int | None = None


MODELS = (
    Model("llama-3-8b", 4096, 32, 8, 128, 14336),
    Model("llama-3.2-1b", 2048, 32, 8, 64, 8192),
    Model("qwen3-0.6b", 1024, 16, 8, 128, 3072, has_qk_norm=True),
    Model("mistral-7b", 4096, 32, 8, 128, 14336, window=4096),
    Model("phi-3-mini", 3072, 32, 32, 96, 8192),
    Model("head-80", 2560, 32, 8, 80, 6912),
    Model("head-256", 2048, 8, 1, 256, 16384, window=1024),
)
_ROWS = {"one row": 1, "a few rows": 40, "many rows": 4096}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def cases(tuning: Tuning) -> Iterator[Case]:
    """Every configuration in use: kernels x models x dtypes, with the tiles of ``tuning``."""
    sampler = TritonSampler(256, 128256, torch.device("meta"))
    draws = Draws(*(meta(64, dtype=dtype) for dtype in DRAW_DTYPES))
    logits, drawn = meta(64, 128256, dtype=torch.float32), meta(256, dtype=torch.int64)
    yield Case("sampling", partial(sampler.draw, logits, draws, drawn), is_fast=True)
    cache = meta(32, 512, 8, 2, 64, 128, dtype=torch.bfloat16)
    yield Case("blocks out", partial(gather_blocks, cache, indices(16), cache[:, :16].contiguous()))
    yield Case("blocks in", partial(scatter_blocks, cache[:, :16].contiguous(), indices(16), cache))
    for model in MODELS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if dtype == torch.bfloat16 or model.name in ("llama-3-8b", "head-256"):
                yield from _attention_cases(model, dtype, tuning)
                yield from _other_cases(model, dtype, tuning)


def _attention_cases(model: Model, dtype: torch.dtype, tuning: Tuning) -> Iterator[Case]:
    label = f"{model.name} {str(dtype).removeprefix('torch.')}"
    query = meta(4096, model.heads, model.head_dim, dtype=dtype)
    is_first = model is MODELS[0] and dtype == torch.bfloat16
    tile = tuning.prefill_tile(model.head_dim, dtype, is_windowed=model.window is not None)
    for block_tokens in (16, 64):
        cache = meta(512, model.kv_heads, 2, block_tokens, model.head_dim, dtype=dtype)
        yield Case(
            f"{label}, blocks of {block_tokens}: prefill",
            partial(
                paged_prefill_attention, query, cache, indices(8, 128), indices(512, 4), scale_log2=0.1, tile=tile,
                window=model.window,
            ),
            has_hgmma=dtype != torch.float32,
            is_fast=is_first and block_tokens == 64,
        )  # fmt: skip
        yield Case(
            f"{label}, blocks of {block_tokens}: decode",
            partial(
                decode_attention, query[:64], cache, indices(64, 128), indices(64), indices(64), scale_log2=0.1,
                max_length=8192, tile=tuning.decode_tile(model.head_dim, dtype), window=model.window,
            ),
            is_fast=is_first and block_tokens == 64,
        )  # fmt: skip
    plan = SharedPlan(indices(64), indices(8, 4), indices(64), 4)
    yield Case(
        f"{label}, blocks of 64: shared prefix",
        partial(
            shared_decode_attention, query[:64], cache, indices(64, 128), indices(64), indices(64), plan,
            scale_log2=0.1, max_length=8192, tile=tuning.decode_tile(model.head_dim, dtype),
        ),
        is_fast=is_first,
    )  # fmt: skip
    key = meta(4096, model.kv_heads, model.head_dim, dtype=dtype)
    yield Case(
        f"{label}: prefill, contiguous",
        partial(
            contiguous_prefill_attention, query, key, key, indices(8, 1), indices(512, 4), scale_log2=0.1, tile=tile,
            window=model.window,
        ),
        has_hgmma=dtype != torch.float32,
    )  # fmt: skip


def _other_cases(model: Model, dtype: torch.dtype, tuning: Tuning) -> Iterator[Case]:
    label = f"{model.name} {str(dtype).removeprefix('torch.')}"
    is_first = model is MODELS[0] and dtype == torch.bfloat16
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    products = (
        ("qkv", qkv, model.hidden, False),
        ("output", model.hidden, model.heads * model.head_dim, False),
        ("gate and up", 2 * model.inner, model.hidden, True),
        ("down", model.hidden, model.inner, False),
    )
    for name, out, inner, is_gated in products:
        plan = tuning.gemm_plan(out, inner, dtype)
        for size, rows in _ROWS.items():
            x, weight = meta(rows, inner, dtype=dtype), meta(out, inner, dtype=dtype)
            yield Case(
                f"{label}: {name}, {size}",
                partial(linear, x, weight, None, plan, is_gated=is_gated),
                has_hgmma=dtype != torch.float32,
                is_fast=is_first and (name, size) in (("output", "many rows"), ("gate and up", "one row")),
            )
    x, weight = meta(64, model.hidden, dtype=dtype), meta(model.hidden, dtype=dtype)
    yield Case(f"{label}: norm", partial(rms_norm, x, weight, 1e-6))
    yield Case(f"{label}: add and norm", partial(add_rms_norm, x, x, weight, 1e-6))
    ids = meta(64, dtype=torch.int64)
    yield Case(f"{label}: embed", partial(embed, meta(128256, model.hidden, dtype=dtype), ids, ids))
    yield Case(f"{label}: silu * mul", partial(silu_mul, meta(64, 2 * model.inner, dtype=dtype)))
    norm = meta(model.head_dim, dtype=dtype)
    norms = (norm, norm) if model.has_qk_norm else None
    angles = meta(64, model.head_dim // 2, dtype=torch.float32)
    cache = meta(512, model.kv_heads, 2, 64, model.head_dim, dtype=dtype)
    slots = meta(64, dtype=torch.int64)
    yield Case(
        f"{label}: rope and store",
        partial(rope_store, meta(64, qkv, dtype=dtype), norms, 1e-6, angles, angles, cache, slots),
    )


def compile_all(arch: int, *, only_fast: bool = False) -> list[tuple[Compiled, bool]]:
    """The compiled kernels of every case, each with whether it must use HGMMA."""
    name = f"sm{arch}.json"
    text = (resources.files("engine.kernels.triton") / "tuned" / name).read_text()
    tuning = parse(json.loads(text), name)
    found: list[tuple[Compiled, bool]] = []
    with standing_in(CompileOnlyDriver(arch)) as stand_in:
        for case in cases(tuning):
            if only_fast and not case.is_fast:
                continue
            stand_in.case = case.name
            before = len(stand_in.compiled)
            case.launch()
            wanted = case.has_hgmma and arch == 90
            helpers = ("_combine_kernel", "_reduce_kernel")
            found += [(c, wanted and c.kernel not in helpers) for c in stand_in.compiled[before:]]
    return found


class Meta(Device):
    """Makes tensors without memory: works build their inputs and launch kernels, and nothing is executed."""

    @property
    def torch(self) -> str:
        return "meta"


def _works_ahead(gpu: str, capability: tuple[int, int], num_processors: int, *, is_tuning: bool) -> Iterator[Work]:
    """The launches of `bench.gpu`, in the order of its stages."""
    if is_tuning:
        tuner = tune.on_gpu(gpu, capability, num_processors, Meta())
        for section in tuner.sections():
            for candidate in section.candidates:
                yield from section.tuned(tuner.base, candidate)
        return
    tuning = load(gpu, capability, num_processors)
    for sizes in (*TINY, *SERVED[:2], LLAMA_8B, *SERVED[2:], QWEN_06B):
        try:
            yield from gpu_kernels.works(sizes, tuning, Meta())
        except Exception as error:
            # If building a case needs the value of a tensor, the remaining cases of its size are skipped.
            print(f"{sizes.name} {sizes.dtype_name}: not compiled ahead from there on: {error}")


def ahead(
    gpu: str, capability: tuple[int, int], num_processors: int, is_tuning: bool, part: int, num_parts: int
) -> str:
    """Compile every ``num_parts``-th work from ``part`` on."""
    works = _works_ahead(gpu, capability, num_processors, is_tuning=is_tuning)
    failed: dict[str, int] = {}
    with standing_in(CompileOnlyDriver(capability[0] * 10 + capability[1], inspects=False)) as stand_in:
        for work in itertools.islice(works, part, None, num_parts):
            for run in (work.ours, work.alone):
                try:
                    if run is not None:
                        run(work.make(0))
                except Exception as error:
                    # The case needs the value of a tensor, which has none here: its kernels are compiled when they are
                    # first used.
                    failed[type(error).__name__] = failed.get(type(error).__name__, 0) + 1
    return f"part {part}: {stand_in.num_loaded} kernels, not compiled ahead: {failed or 'none'}"


def ahead_on_all_cores(*, is_tuning: bool) -> None:
    """Compile for the GPU of this machine, which is used by other stages meanwhile."""
    os.nice(10)
    has = torch.cuda.get_device_properties(0)
    arguments = has.name, (has.major, has.minor), has.multi_processor_count, is_tuning
    num_parts = max(1, len(os.sched_getaffinity(0)) - 2)
    with ProcessPoolExecutor(num_parts, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(ahead, *arguments, part, num_parts) for part in range(num_parts)]):
            print(done.result(), flush=True)


def faults(compiled: Compiled, must_use_hgmma: bool) -> list[str]:
    """The problems of a compiled kernel, as text."""
    wrong = []
    if compiled.stack_bytes or compiled.instructions["LDL"] or compiled.instructions["STL"]:
        wrong.append(f"spills: {compiled.stack_bytes} bytes of stack")
    if compiled.shared_bytes > SHARED_LIMIT_BYTES[compiled.arch]:
        wrong.append(f"{compiled.shared_bytes} bytes of shared memory, limit {SHARED_LIMIT_BYTES[compiled.arch]}")
    if must_use_hgmma and not compiled.instructions["HGMMA"]:
        wrong.append("no HGMMA")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_LIMIT_BYTES))
    parser.add_argument("--fast", action="store_true", help="only what the test suite compiles")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--ahead", action="store_true", help="fill Triton's cache for the GPU of this machine")
    parser.add_argument("--tune", action="store_true", help="with --ahead: the candidates of tuning")
    options = parser.parse_args()
    if options.ahead:
        ahead_on_all_cores(is_tuning=options.tune)
        return 0
    rows, bad = [], 0
    for arch in options.arch:
        for compiled, must_use_hgmma in compile_all(arch, only_fast=options.fast):
            wrong = faults(compiled, must_use_hgmma)
            bad += bool(wrong)
            rows.append({**dataclasses.asdict(compiled), "faults": wrong})
            print(_line(compiled, wrong), flush=True)
    print(f"triton {triton.__version__}: {len(rows)} compiled, {bad} with faults")
    if not options.fast:
        options.results.mkdir(exist_ok=True)
        path = options.results / f"aot-triton-{triton.__version__}.json"
        path.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
        print(path)
    return 1 if bad else 0


def _line(c: Compiled, wrong: list[str]) -> str:
    counts = " ".join(f"{name} {count}" for name, count in c.instructions.items() if count)
    shape = f"sm_{c.arch} {c.kernel:20} {c.case:52} {c.num_warps} warps {c.num_stages} stages"
    return f"{shape} {c.registers:3} registers {c.shared_bytes:6} shared  {counts}  {'; '.join(wrong)}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
