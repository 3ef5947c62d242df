"""The resources of this machine: cores, memory, a GPU, within the limits of containers. Changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from engine.memory import of_machine

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may run on, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, quota_cores() or cores)


def quota_cores() -> int | None:
    """What the container may use at once, at least 1; None if there is no such bound."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, within the container's limit."""
    return of_machine().available_bytes


def has_card() -> bool:
    """Whether there are signs of an NVIDIA GPU, also where nvidia-smi is not, as in many containers. Milliseconds."""
    signs = Path("/proc/driver/nvidia"), Path("/dev/nvidiactl")
    return any(sign.exists() for sign in signs) or any(Path("/dev").glob("nvidia[0-9]*"))


def gpus() -> list[str]:
    """One line per NVIDIA GPU, as nvidia-smi lists them; empty without one or without the driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    done = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=False)
    return [line for line in done.stdout.splitlines() if line.startswith("GPU")] if done.returncode == 0 else []
