"""Shared by all benches: the memory-bandwidth probe, medians, facts about the machine."""

from __future__ import annotations

import mmap
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from random import Random

_PACKAGES = ("baton-serve", "torch", "transformers", "grpcio", "protobuf", "numpy")
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


@dataclass(frozen=True, slots=True)
class Samples:
    """Repeated measurements of one figure."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Samples:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def percentile(self, share: float) -> float:
        """The percentile by the nearest-rank method."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def spread(self) -> float:
        """(largest - smallest) / median, a measure of the noise."""
        return (max(self.values) - min(self.values)) / self.median


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
    return {
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpu_names(),
        "platform": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """Short hash, with a plus sign if tracked files differ from it; empty outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=10)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
