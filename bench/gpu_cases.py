"""The stages of `bench.gpu` that need no model: facts about the machine, correctness of kernels, speed of kernels."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from bench import gpu_kernels
from bench.gpu_child import Context
from bench.gpu_measure import Case, Device, Replay, Task, Work
from bench.gpu_sizes import LLAMA_8B, TINY, Sizes
from engine.kernels.triton.pointwise import embed
from engine.kernels.triton.tuning import Tuning, load

_GIB = 1 << 30


def tuning_for(device: Device) -> Tuning:
    if not device.is_gpu:
        return load("interpreter", (8, 0), 1)
    has = torch.cuda.get_device_properties(0)
    return load(has.name, (has.major, has.minor), has.multi_processor_count)


def machine(context: Context) -> Iterator[Case]:
    device = context.device
    yield Task("machine", "versions", lambda: {"facts": _versions(device)})
    yield Task("machine", "compiler", _compiler)
    yield Task("machine", "first kernel", lambda: _first_kernel(device))
    if device.is_gpu:
        yield Task("machine", "copy rate", lambda: {"facts": {"copy_bytes_per_s": _copy_rate(device)}})
        yield Task("machine", "product rate", lambda: {"facts": {"flops_per_s": _product_rate(device)}})


def _versions(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device.name,
        "is_gpu": device.is_gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "host_memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1),
        "num_cpus": len(os.sched_getaffinity(0)),
        "locked_memory_limit": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    }
    if device.is_gpu:
        has = torch.cuda.get_device_properties(0)
        found |= {
            "gpu_memory_gib": round(device.memory_bytes / _GIB, 1),
            "gpu_free_gib": round(device.free_bytes() / _GIB, 1),
            "l2_mib": device.l2_bytes >> 20,
            "processors": has.multi_processor_count,
            "capability": f"{has.major}.{has.minor}",
            "num_gpus": torch.cuda.device_count(),
            "tuning": tuning_for(device).gpu,
        }
    return found


def _compiler() -> dict[str, Any]:
    """The compiler that Triton uses for its launchers; Triton reports a missing one only when it fails."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return {"facts": {"c_compiler": compiler or "none", "python_h": header.is_file()}}


def _first_kernel(device: Device) -> dict[str, Any]:
    table = torch.arange(64.0, device=device.torch).view(4, 16)
    ids = torch.tensor([3, 0], device=device.torch)
    return {"is_right": torch.equal(embed(table, ids), table[ids])}


def _copy_rate(device: Device) -> float:
    source, target = (torch.empty(_GIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    for _ in range(3):
        target.copy_(source)
    replay = Replay(lambda: [target.copy_(source) for _ in range(10)], 10)
    return 2 * _GIB / device.seconds({"copy": replay})["copy"]


def _product_rate(device: Device) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    replay = Replay(lambda: [a @ b for _ in range(10)], 10)
    return 2 * 8192**3 / device.seconds({"product": replay})["product"]


def tiny(context: Context) -> Iterator[Work]:
    yield from _all(TINY, context, is_timed=False)


def real(context: Context) -> Iterator[Work]:
    yield from _all(TINY[-1:] if context.is_tiny else (LLAMA_8B,), context, is_timed=False)


def timed(context: Context) -> Iterator[Work]:
    yield from _all(TINY if context.is_tiny else (LLAMA_8B,), context, is_timed=True)


def _all(scales: tuple[Sizes, ...], context: Context, *, is_timed: bool) -> Iterator[Work]:
    tuning = tuning_for(context.device)
    for sizes in scales:
        for work in gpu_kernels.works(sizes, tuning, context.device):
            yield dataclasses.replace(work, is_timed=is_timed)
