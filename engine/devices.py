"""The engine's interface to the GPUs that a process sees, and the only way to make a thread use one of them.

A GPU's index is torch's: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER have been applied to it. Each method is one line;
the decisions that follow from the answers are made elsewhere and tested on ``FakeDevices``.
"""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from baton.errors import BadConfig
from engine.memory import Memory, of_machine

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What there is beside the processor. ``gpu``: the name of the one asked about, None if there is none."""

    gpu: str | None = None
    capability: tuple[int, int] = (0, 0)
    # Torch calls GPUs of AMD cuda as well.
    is_nvidia: bool = True
    has_triton: bool = True
    num_multiprocessors: int = 1


class GpuMemory(NamedTuple):
    """Of one GPU, in bytes."""

    total_bytes: int
    # The rest may belong to any process.
    free_bytes: int
    # What torch's allocator holds for this process, and the most it held since ``settle``.
    taken_bytes: int
    peak_bytes: int


class Devices(Protocol):
    @property
    def num_gpus(self) -> int: ...

    def look(self, index: int) -> Accelerator:
        """The GPU with this index, without taking memory on it; one that is not there has no name."""

    def enter(self, device: torch.device) -> None:
        """What the calling thread does from now on it does on ``device``. Every thread starts on GPU 0."""

    def gpu_memory(self, device: torch.device) -> GpuMemory | None:
        """None: the device's memory is the machine's."""

    def settle(self, device: torch.device) -> None:
        """Wait for the device, release unused memory, and begin a new peak."""

    def host_memory(self) -> Memory: ...


class TorchDevices:
    """The devices of this machine."""

    @property
    def num_gpus(self) -> int:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def look(self, index: int) -> Accelerator:
        import torch

        has_triton = importlib.util.find_spec("triton") is not None
        if not 0 <= index < self.num_gpus:
            return Accelerator(has_triton=has_triton)
        has = torch.cuda.get_device_properties(index)
        is_nvidia = torch.version.cuda is not None
        return Accelerator(has.name, (has.major, has.minor), is_nvidia, has_triton, has.multi_processor_count)

    def enter(self, device: torch.device) -> None:
        import torch

        if device.type == "cuda":
            torch.cuda.set_device(device)

    def gpu_memory(self, device: torch.device) -> GpuMemory | None:
        import torch

        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        # Reserved, not allocated: what lies between blocks is taken as well.
        return GpuMemory(total, free, torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device))

    def settle(self, device: torch.device) -> None:
        import torch

        if device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def host_memory(self) -> Memory:
        return of_machine()


def gpu_index(device: str, devices: Devices) -> int | None:
    """Of ``cuda`` or ``cuda:N``; None for ``auto`` and ``cpu``. Raises BadConfig if there is no such GPU."""
    if not device.startswith("cuda"):
        return None
    index = int(device.partition(":")[2] or 0)
    if index >= devices.num_gpus:
        raise BadConfig(f"device is {device}, but {seen_gpus(devices)}; expected one of them, or cpu", param="device")
    return index


def seen_gpus(devices: Devices) -> str:
    """For messages: how many GPUs there are, and which."""
    count = devices.num_gpus
    names = "; ".join(f"{i}: {devices.look(i).gpu}" for i in range(count))
    hint = "" if count else " (`baton doctor` says why; CUDA_VISIBLE_DEVICES may hide some)"
    return f"torch sees {count or 'no'} GPU{'' if count == 1 else 's'}" + (f" ({names})" if count else hint)
