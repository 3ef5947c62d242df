"""Fake GPUs for tests: invented names and numbers, and memory that is counted but does not exist."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.devices import Accelerator, GpuMemory
from engine.memory import Memory


@dataclass
class FakeGpuMemory:
    """What tests, and kernels made for them, say is taken. ``others_bytes``: by other processes and the driver."""

    total_bytes: int
    others_bytes: int = 0
    taken_bytes: int = 0
    peak_bytes: int = 0

    def take(self, num_bytes: int) -> None:
        """``num_bytes`` below 0 gives them back."""
        self.taken_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.taken_bytes)

    def pass_through(self, num_bytes: int) -> None:
        """Taken and given back, as the activations of a layer are."""
        self.take(num_bytes)
        self.take(-num_bytes)


class FakeDevices:
    """``memory``: of whatever device is asked about, so that kernels of the processor may play those of a GPU."""

    def __init__(
        self,
        gpus: Sequence[Accelerator] = (),
        *,
        memory: FakeGpuMemory | None = None,
        host: Memory | None = None,
    ) -> None:
        self._gpus = tuple(gpus)
        self._memory = memory
        self._host = host or Memory(1 << 40, "what a test has")
        # (name of the thread, device), in order.
        self.entered: list[tuple[str, str]] = []

    @property
    def num_gpus(self) -> int:
        return len(self._gpus)

    def look(self, index: int) -> Accelerator:
        return self._gpus[index] if index < len(self._gpus) else Accelerator()

    def enter(self, device: torch.device) -> None:
        self.entered.append((threading.current_thread().name, str(device)))

    def gpu_memory(self, device: torch.device) -> GpuMemory | None:
        memory = self._memory
        if memory is None:
            return None
        free = memory.total_bytes - memory.others_bytes - memory.taken_bytes
        return GpuMemory(memory.total_bytes, free, memory.taken_bytes, memory.peak_bytes)

    def settle(self, device: torch.device) -> None:
        if self._memory is not None:
            self._memory.peak_bytes = self._memory.taken_bytes

    def host_memory(self) -> Memory:
        return self._host
