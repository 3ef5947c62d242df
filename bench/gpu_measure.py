"""How GPU kernels are timed: recorded in CUDA graphs, on inputs that rotate through more than the L2 cache, contenders
in turns, medians. Beside them the device's own limits: copying and multiplying. Without a GPU the same calls are made
once and nothing is timed. Knows no kernel of Baton.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NOT_MEASURED = "not measured on a GPU"
_ROUNDS = 5
_L2_TIMES = 4
_MAX_ROTATED = 64
# Share of the device's memory that rotated inputs may take.
_MEMORY_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Device:
    """Where the bench runs, and what it can do at best."""

    name: str
    is_gpu: bool
    l2_bytes: int = 0
    memory_bytes: int = 0
    copy_bytes_per_s: float = 0.0
    flops_per_s: float = 0.0

    @property
    def torch(self) -> str:
        return "cuda" if self.is_gpu else "cpu"


def find_device() -> Device:
    """The GPU with its limits measured, or the CPU."""
    if not torch.cuda.is_available():
        return Device("CPU, Triton's interpreter", is_gpu=False)
    has = torch.cuda.get_device_properties(0)
    bare = Device(has.name, True, has.L2_cache_size, has.total_memory)
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_s = _seconds(bare, {"copy": [lambda: target.copy_(source)]})["copy"]
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product_s = _seconds(bare, {"product": [lambda: a @ b]})["product"]
    return Device(
        bare.name, True, bare.l2_bytes, bare.memory_bytes,
        copy_bytes_per_s=2 * (1 << 30) / copy_s, flops_per_s=2 * 8192**3 / product_s,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """One shape. ``make(i)`` gives the i-th set of inputs, as one argument for each contender."""

    kernel: str
    shape: str
    make: Callable[[int], Any]
    ours: Callable[[Any], Any]
    # By name; a peer that raises is recorded with what it said.
    peers: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    # What must come out of ``ours``, and how far it may be off.
    expected: Callable[[Any], Tensor] | None = None
    tolerance: float = 0.0
    # The part of the result that is compared, where all of it would be too much for float64.
    compared: Callable[[Tensor], Tensor] = lambda found: found
    # Bits that must be equal: what ``ours`` gives for one row alone and in the batch.
    alone: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    # Memory traffic and arithmetic that the task needs at least; whichever is the bound is reported.
    bytes: float = 0.0
    flops: float = 0.0
    # Bytes of one set of inputs.
    input_bytes: float = 0.0
    dtype: str = ""


def measure(work: Work, device: Device, relative_error: Callable[[Tensor, Tensor], float]) -> dict[str, Any]:
    """One row of the table; ``is_right`` is None where nothing says what is. A wrong result gets no speed."""
    row: dict[str, Any] = {"kernel": work.kernel, "shape": work.shape, "dtype": work.dtype}
    first = work.make(0)
    try:
        row |= _check(work, first, relative_error)
    except Exception as error:
        # A kernel that fails is a row of the table, not its end.
        return {**row, "is_right": False, "error": f"{type(error).__name__}: {error}"[:300]}
    if row["is_right"] is False:
        return row
    sets = [first, *(work.make(i) for i in range(1, _num_sets(work, device)))]
    contenders: dict[str, Callable[[Any], Any]] = {"baton": work.ours}
    for name, peer in work.peers.items():
        try:
            peer(first)
        except Exception as error:
            row[f"{name}_said"] = f"{type(error).__name__}: {error}"[:160]
        else:
            contenders[name] = peer
    if not device.is_gpu:
        return {**row, "time": NOT_MEASURED}
    calls = {name: [_call(contender, inputs) for inputs in sets] for name, contender in contenders.items()}
    seconds = _seconds(device, calls)
    row["us"] = seconds["baton"] * 1e6
    row |= {f"vs_{name}": taken / seconds["baton"] for name, taken in seconds.items() if name != "baton"}
    if work.bytes:
        row["percent_of_copy"] = 100 * work.bytes / seconds["baton"] / device.copy_bytes_per_s
    if work.flops:
        row["percent_of_products"] = 100 * work.flops / seconds["baton"] / device.flops_per_s
    return row


def _check(work: Work, inputs: Any, relative_error: Callable[[Tensor, Tensor], float]) -> dict[str, Any]:
    found = work.ours(inputs)
    row: dict[str, Any] = {"is_right": None if work.expected is None and work.alone is None else True}
    if work.expected is not None:
        row["error"] = relative_error(work.compared(found), work.expected(inputs))
        row["is_right"] = row["error"] <= work.tolerance
    if work.alone is not None:
        alone, whole = work.alone(inputs)
        row["is_batch_invariant"] = torch.equal(alone, whole)
        row["is_right"] &= row["is_batch_invariant"]
    return row


def _call(contender: Callable[[Any], Any], inputs: Any) -> Callable[[], Any]:
    return lambda: contender(inputs)


def _num_sets(work: Work, device: Device) -> int:
    if not device.is_gpu or not work.input_bytes:
        return 1
    wanted = -(-_L2_TIMES * device.l2_bytes // int(work.input_bytes))
    fitting = int(_MEMORY_SHARE * device.memory_bytes / work.input_bytes)
    return max(1, min(wanted, fitting, _MAX_ROTATED))


def _seconds(device: Device, calls: Mapping[str, Sequence[Callable[[], Any]]]) -> dict[str, float]:
    """Seconds of one call of each contender: each records its calls once, then all replay in turns."""
    assert device.is_gpu
    graphs = {name: _record(each) for name, each in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, (replay, num_calls) in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            taken[name].append(start.elapsed_time(stop) / 1e3 / num_calls)
    return {name: statistics.median(values) for name, values in taken.items()}


def _record(calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], int]:
    """(replay, calls in it): at least ten calls, recorded if the contender can be."""
    repeated = [*calls] * -(-10 // len(calls))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in repeated:
                call()
    except RuntimeError:
        # Not every peer can be recorded; it is timed with its launches then.
        torch.cuda.synchronize()
        return lambda: [call() for call in repeated], len(repeated)
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, len(repeated)


class Budget:
    """Wall clock of the whole run: what does not fit any more is skipped by name."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    @property
    def is_spent(self) -> bool:
        return time.monotonic() > self._ends_at
