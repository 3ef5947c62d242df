"""What this machine has for us: cores, memory, a GPU. Honours the limits of containers. Changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from engine.memory import of_machine

_CGROUP = Path("/sys/fs/cgroup")
_DEFAULT_KV_SHARE = 0.4
_MAX_DEFAULT_KV_MIB = 4096
_MIN_DEFAULT_KV_MIB = 64


def usable_cores() -> int:
    """Cores this process may run on, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, within the container's limit."""
    return of_machine().available_bytes


def default_kv_mib(num_workers: int) -> int:
    """KV cache per worker if nobody said: the workers together take two fifths of what is free, and never too much.

    Pages of the cache that are never written cost nothing, so a small model does not pay for a generous bound.
    """
    share_mib = int(available_memory_bytes() * _DEFAULT_KV_SHARE / num_workers) >> 20
    return max(_MIN_DEFAULT_KV_MIB, min(_MAX_DEFAULT_KV_MIB, share_mib))


def gpus() -> list[str]:
    """One line per NVIDIA GPU, as nvidia-smi lists them; empty without one or without the driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    done = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=False)
    return [line for line in done.stdout.splitlines() if line.startswith("GPU")] if done.returncode == 0 else []
