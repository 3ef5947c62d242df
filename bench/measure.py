"""Shared by all benches: the memory-bandwidth probe, ratios, facts about the machine."""

from __future__ import annotations

import mmap
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import loadgen.machine
from loadgen.samples import Samples

_PROBE_BYTES = 256 * 2**20  # larger than any cache


class BandwidthProbe:
    """Reads a large buffer with all threads. It runs beside each sample, since a virtual machine's bandwidth drifts.

    The buffer is in huge pages and the arithmetic has no dependency chain: a sum over small pages stays below the rate
    at which kernels read.
    """

    def __init__(self) -> None:
        import torch

        self._memory = mmap.mmap(-1, _PROBE_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._buffer = torch.frombuffer(self._memory, dtype=torch.float32)
        self._buffer.fill_(1.0)
        self.read_gb_s()

    def read_gb_s(self) -> float:
        started = time.perf_counter()
        self._buffer.max()
        return _PROBE_BYTES / (time.perf_counter() - started) / 1e9


def ratio(ours: Samples, theirs: Samples) -> float:
    """Median of ours / theirs over neighbouring samples, which were taken under the same conditions."""
    return statistics.median(a / b for a, b in zip(ours.values, theirs.values, strict=True))


def percent_more(on: Sequence[float], off: Sequence[float]) -> tuple[float, float, float]:
    """Median of the paired ratios less one, with its 95 % bootstrap interval, in per cent."""
    ratios = [100 * (a / b - 1) for a, b in zip(on, off, strict=True)]
    rng = Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def machine() -> dict[str, object]:
    """The facts that decide whether two result files are comparable."""
    return {**loadgen.machine.machine(), "gpus": _gpu_names()}


def commit() -> str:
    """Short hash, with a plus sign if tracked files differ from it; empty outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=10)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
