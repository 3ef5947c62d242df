"""Energy of this worker's hardware, if it can be read: NVML for its GPU, RAPL for the host's processors.

Nothing is estimated: an unreadable source has no value. RAPL counts whole processor packages with all their processes:
two workers on one host see the same joules.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Protocol

_log = logging.getLogger("baton.worker.energy")
_RAPL_ROOT = Path("/sys/class/powercap")


class EnergySource(Protocol):
    """``device`` names what is measured. Both readings are None when it does not answer."""

    source: str
    device: str

    def joules(self) -> float | None:
        """Since the worker's start; never falls."""

    def watts(self) -> float | None:
        """At this moment; None where only energy is counted."""


class RaplPackage:
    """One processor package of the powercap tree."""

    source = "rapl"

    def __init__(self, folder: Path) -> None:
        self.device = f"{(folder / 'name').read_text().strip()}"
        self._counter = folder / "energy_uj"
        self._range_uj = int((folder / "max_energy_range_uj").read_text())
        self._last_uj = int(self._counter.read_text())
        self._total_uj = 0

    def joules(self) -> float | None:
        try:
            now_uj = int(self._counter.read_text())
        except (OSError, ValueError):
            return None
        # The counter wraps. Every scrape looks; it takes a quarter of an hour at full load.
        self._total_uj += (now_uj - self._last_uj) % (self._range_uj + 1)
        self._last_uj = now_uj
        return self._total_uj / 1e6

    def watts(self) -> float | None:
        return None


class NvmlGpu:
    """One GPU. ``nvml`` is the module pynvml, or what a test has in its place."""

    source = "nvml"

    def __init__(self, nvml: Any, handle: Any, device: str) -> None:
        self.device = device
        self._nvml = nvml
        self._handle = handle
        self._first_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def joules(self) -> float | None:
        try:
            total_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError:
            return None
        return float(total_mj - self._first_mj) / 1e3

    def watts(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3
        except self._nvml.NVMLError:
            return None


def rapl_packages(root: Path = _RAPL_ROOT) -> list[EnergySource]:
    """The packages whose counters this process may read; usually that takes root."""
    found: list[EnergySource] = []
    for folder in sorted(root.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") == 1:  # a package; below it are parts of it
            with contextlib.suppress(OSError, ValueError):
                found.append(RaplPackage(folder))
    return found


def gpu(uuid: str, nvml: Any) -> list[EnergySource]:
    """The GPU with this UUID ("GPU-..."), if NVML knows what it draws."""
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        return [NvmlGpu(nvml, handle, uuid)]
    except nvml.NVMLError as error:
        _log.info("no energy of %s: %s", uuid, error)
        return []


def sources(device: str) -> list[EnergySource]:
    """What can be measured for a worker on ``device``, "cpu" or "cuda:N"."""
    if not device.startswith("cuda"):
        return rapl_packages()
    try:
        import pynvml
    except ImportError:
        _log.info("no energy of %s: nvidia-ml-py is not installed", device)
        return []
    import torch

    return gpu(f"GPU-{torch.cuda.get_device_properties(device).uuid}", pynvml)
