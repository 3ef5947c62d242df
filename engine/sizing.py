"""Measures on a GPU how much memory is left for the KV cache, by a trial of the largest step and of recording.

The caller prepares model and runner; ``engine/memory.py`` does the sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.devices import Devices, GpuMemory
from engine.memory import GpuUse

# Recorded on trial: the largest, and one more, which says what each of the others adds.
_NUM_TRIED = 2


def measure(
    devices: Devices,
    device: torch.device,
    before: GpuMemory,
    *,
    name: str,
    run_largest_step: Callable[[], object],
    record: Callable[[int], object],
    num_graphs: int,
    is_alone: bool,
) -> GpuUse:
    """``before``: as it was before weights were loaded; they are there now. ``record(n)`` records the ``n`` largest of
    ``num_graphs`` decode steps and gives what keeps them. ``is_alone``: no other worker loads on this GPU meanwhile."""
    # What loading took for a moment is over.
    devices.settle(device)
    run_largest_step()
    peak = _now(devices, device).peak_bytes
    devices.settle(device)
    # Recorded steps take memory of the driver's too, which only shows on the whole GPU.
    taken_of = _used if is_alone else (lambda memory: memory.taken_bytes)
    graph_bytes = _graph_bytes(devices, device, record, num_graphs, taken_of)
    devices.settle(device)
    now = _now(devices, device)
    return GpuUse(
        name=name,
        total_bytes=now.total_bytes,
        before_bytes=_used(before) - before.taken_bytes,
        peak_bytes=peak,
        beside_bytes=max(0, _used(now) - now.taken_bytes - (_used(before) - before.taken_bytes)),
        graph_bytes=graph_bytes,
        free_bytes=now.free_bytes,
        taken_bytes=now.taken_bytes,
    )


def _graph_bytes(
    devices: Devices,
    device: torch.device,
    record: Callable[[int], object],
    num_graphs: int,
    taken_of: Callable[[GpuMemory], int],
) -> int:
    """Of all recorded steps."""

    def taken_by(count: int) -> int:
        devices.settle(device)
        before = taken_of(_now(devices, device))
        recorded = record(count)
        taken = max(0, taken_of(_now(devices, device)) - before)
        del recorded
        return taken

    tried = [taken_by(count) for count in range(1, min(num_graphs, _NUM_TRIED) + 1)]
    return tried[0] + (num_graphs - 1) * max(0, tried[-1] - tried[0]) if tried else 0


def _now(devices: Devices, device: torch.device) -> GpuMemory:
    memory = devices.gpu_memory(device)
    assert memory is not None, "a GPU stays one"
    return memory


def _used(memory: GpuMemory) -> int:
    return memory.total_bytes - memory.free_bytes
