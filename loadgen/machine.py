"""The facts of this machine and its packages that decide whether two results are comparable."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

_PACKAGES = ("baton-serve", "torch", "transformers", "grpcio", "protobuf", "numpy")
# Kinds of time in a line of /proc/stat, up to that of other guests.
_NUM_TICKS = 8


def machine() -> dict[str, object]:
    return {
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def processor_s(stat: str | None = None) -> float | None:
    """Seconds that this host's processors have worked, for all processes and for other guests of its hardware, by
    ``stat`` or /proc/stat; None where there is none."""
    try:
        text = Path("/proc/stat").read_text() if stat is None else stat
    except OSError:
        return None
    # cpu user nice system idle iowait irq softirq steal ...
    words = text.partition("\n")[0].split()
    if len(words) <= _NUM_TICKS or words[0] != "cpu":
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1 : _NUM_TICKS + 1])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
