"""Checks and times one case of the GPU benchmark, part by part. Independent of Baton's kernels.

A ``Work`` is one kernel at one shape: names, ``make`` for inputs, ``ours`` and ``peers`` to run on them, ``expected``
and ``alone`` for the checks, and the minimum ``bytes`` and ``flops`` of the task. A module of cases has a function
``works(sizes, device, ...) -> Iterator[Work]``; `bench.gpu_stages` lists the modules of each stage.

A case consists of parts, and each part gives a row or a fault of its own: ``check`` (ours against ``expected``, and a
row alone against the batch), ``time`` (ours), and ``peer NAME`` for each peer (peer and ours alternating). A failure in
one part does not affect the others. Timed calls are recorded in CUDA graphs on inputs that rotate through more than the
L2 cache; figures are medians. Without a GPU the calls are made twice and nothing is timed.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels.cases import relative_error

NOT_MEASURED = "not measured on a GPU"
_ROUNDS = 5
_L2_TIMES = 4
_MAX_ROTATED = 64
# Share of the free memory for rotated inputs.
_ROTATED_SHARE = 0.4
# Share of the free memory that a case may request: the allocator cannot use all of it.
_USABLE_SHARE = 0.9
# Duration of a replay: long enough that its launch does not affect the time of one call.
_REPLAY_S = 2e-3
_MIN_CALLS, _MAX_CALLS = 10, 200
# Calls that are queued one by one: the host must stay ahead of the device.
_MIN_QUEUED = 3


class CaptureFailedError(RuntimeError):
    """Recording failed. Torch's allocator stays in its capturing state, so this process cannot measure any more."""


class TooLittleMemoryError(RuntimeError):
    """The memory that a case needs is not free; nothing was allocated."""


class Replay(NamedTuple):
    """Calls that run together, and their number."""

    run: Callable[[], object]
    num_calls: int


@dataclass(frozen=True)
class Device:
    """The device of the benchmark and its limits; this one is the CPU, where nothing is timed."""

    name: str = "CPU, Triton's interpreter"
    is_gpu: bool = False
    l2_bytes: int = 0
    memory_bytes: int = 0
    copy_bytes_per_s: float = 0.0
    flops_per_s: float = 0.0

    @property
    def torch(self) -> str:
        return "cuda" if self.is_gpu else "cpu"

    def free_bytes(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def check_usable(self) -> None:
        """Raises the error of a kernel after which this process cannot be used."""

    def forget(self) -> None:
        """Release memory that the allocator caches but does not use."""

    def record(self, calls: Sequence[Callable[[], object]]) -> Replay:
        """Raises CaptureFailedError."""
        raise NotImplementedError

    def seconds(self, replays: Mapping[str, Replay]) -> dict[str, float]:
        """Median seconds of one call of each; the replays alternate."""
        raise NotImplementedError


class Gpu(Device):
    """The first CUDA device."""

    def free_bytes(self) -> int:
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held

    def check_usable(self) -> None:
        torch.cuda.synchronize()
        assert int(torch.ones(8, device="cuda").sum()) == 8

    def forget(self) -> None:
        torch.cuda.empty_cache()

    def record(self, calls: Sequence[Callable[[], object]]) -> Replay:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # Inputs were made on the current stream, and later work reads what is written here.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except Exception as error:
            raise CaptureFailedError(f"{type(error).__name__}: {error}") from error
        graph.replay()
        torch.cuda.synchronize()
        return Replay(graph.replay, len(calls))

    def seconds(self, replays: Mapping[str, Replay]) -> dict[str, float]:
        taken: dict[str, list[float]] = {name: [] for name in replays}
        for _ in range(_ROUNDS):
            for name, replay in replays.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                replay.run()
                stop.record()
                stop.synchronize()
                taken[name].append(start.elapsed_time(stop) / 1e3 / replay.num_calls)
        return {name: statistics.median(values) for name, values in taken.items()}


def find_device(copy_bytes_per_s: float = 0.0, flops_per_s: float = 0.0) -> Device:
    """The GPU with its known limits, or the CPU."""
    if not torch.cuda.is_available():
        return Device()
    has = torch.cuda.get_device_properties(0)
    return Gpu(has.name, True, has.L2_cache_size, has.total_memory, copy_bytes_per_s, flops_per_s)


@dataclass(frozen=True, slots=True)
class Peer:
    """An implementation to compare with, on the same inputs."""

    run: Callable[[Any], object]
    # Device memory that it needs beside the inputs; checked before it runs.
    needs_bytes: float = 0.0
    # False: timed with its launches, for code that cannot be recorded or is compared as users run it.
    is_recorded: bool = True
    # Releases what it holds, such as models.
    drop: Callable[[], None] = lambda: None


class Part(NamedTuple):
    """The unit that gives one row."""

    name: str
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Task:
    """A case of one part that is not a kernel: ``run`` gives the row; its ``is_right`` says whether it passed."""

    kernel: str
    shape: str
    run: Callable[[], dict[str, Any]]
    dtype: str = ""

    def parts(self, device: Device) -> list[Part]:
        return [Part("check", self.run)]


@dataclass(frozen=True, slots=True)
class Work:
    """One kernel at one shape. ``make(i)`` gives the i-th set of inputs as one argument for each contender."""

    kernel: str
    shape: str
    make: Callable[[int], Any]
    ours: Callable[[Any], Any]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    # The expected result of ``ours``, and the tolerance.
    expected: Callable[[Any], Tensor] | None = None
    tolerance: float = 0.0
    # The part of the result that is compared, if all of it would be too large in float64.
    compared: Callable[[Any], Tensor] = lambda found: found
    # Bits that must be equal: the results of ``ours`` for one row alone and in the batch.
    alone: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    # Minimum memory traffic and arithmetic of the task; the larger bound is reported.
    bytes: float = 0.0
    flops: float = 0.0
    # Bytes of one set of inputs.
    input_bytes: float = 0.0
    # Device memory of a set, the check and the result together, if that is more than three times the inputs.
    needs_bytes: float = 0.0
    dtype: str = ""
    # False: checked only. ``is_recorded`` is False where ours is a graph already or cannot be recorded.
    is_timed: bool = True
    is_recorded: bool = True

    def parts(self, device: Device) -> list[Part]:
        measurement = _Measurement(self, device)
        parts = [Part("check", measurement.check)]
        if self.is_timed:
            parts.append(Part("time", measurement.time))
            parts += [Part(f"peer {name}", measurement.peer(name)) for name in self.peers]
        return parts


Case = Work | Task


def measured(work: Work, device: Device) -> dict[str, Any]:
    """A work as one row: check, time, and microseconds of each peer by name. Raises what a part raises."""
    measurement = _Measurement(work, device)
    row = measurement.check()
    if row["is_right"] is False:
        return row
    row |= measurement.time()
    return row | {name: measurement.peer(name)().get("us") for name in work.peers}


class _Measurement:
    """The parts of one work, on inputs that are made when the first part needs them."""

    def __init__(self, work: Work, device: Device) -> None:
        self._work = work
        self._device = device
        self._sets: list[Any] = []
        self._recorded: Replay | None = None

    def check(self) -> dict[str, Any]:
        work = self._work
        row: dict[str, Any] = {"is_right": None}
        inputs = self._inputs(1)[0]
        found = work.ours(inputs)
        if work.expected is not None:
            error = relative_error(work.compared(found), work.expected(inputs))
            row |= {"error": error, "is_right": error <= work.tolerance}
        if work.alone is not None:
            alone, whole = work.alone(inputs)
            is_same = torch.equal(alone, whole)
            row |= {"is_batch_invariant": is_same, "is_right": is_same and row["is_right"] is not False}
        return row

    def time(self) -> dict[str, Any]:
        work, device = self._work, self._device
        if not device.is_gpu:
            return self._called_twice(work.ours)
        seconds = device.seconds({"ours": self._ours()})["ours"]
        row = {"us": seconds * 1e6}
        if work.bytes:
            row["percent_of_copy"] = 100 * work.bytes / seconds / device.copy_bytes_per_s
        if work.flops:
            row["percent_of_products"] = 100 * work.flops / seconds / device.flops_per_s
        return row

    def peer(self, name: str) -> Callable[[], dict[str, Any]]:
        peer = self._work.peers[name]

        def run() -> dict[str, Any]:
            try:
                self._ask(peer.needs_bytes)
                if not self._device.is_gpu:
                    return self._called_twice(peer.run)
                # Ours runs first: a failure from here on is the peer's.
                ours = self._ours()
                theirs = self._replay(peer.run, is_recorded=peer.is_recorded)
                seconds = self._device.seconds({"ours": ours, "peer": theirs})
                ratio = seconds["peer"] / seconds["ours"]
                return {"us": seconds["peer"] * 1e6, "ours_us": seconds["ours"] * 1e6, "ratio": ratio}
            finally:
                peer.drop()

        return run

    def _called_twice(self, run: Callable[[Any], object]) -> dict[str, Any]:
        """Calls it a second time: a call that changes its inputs or keeps references fails here, as it would in a
        timed loop."""
        for inputs in self._inputs(1) * 2:
            run(inputs)
        return {"time": NOT_MEASURED}

    def _ours(self) -> Replay:
        if self._recorded is None:
            self._recorded = self._replay(self._work.ours, is_recorded=self._work.is_recorded)
        return self._recorded

    def _replay(self, run: Callable[[Any], object], *, is_recorded: bool) -> Replay:
        sets = self._inputs(self._num_sets())
        calls: list[Callable[[], object]] = [_call(run, inputs) for inputs in sets]
        for call in calls[:2]:
            call()
        one = self._device.seconds({"call": Replay(lambda: [call() for call in calls], len(calls))})["call"]
        wanted = min(_MAX_CALLS, max(_MIN_CALLS if is_recorded else _MIN_QUEUED, int(_REPLAY_S / one)))
        repeated = calls * -(-wanted // len(calls))
        return (
            self._device.record(repeated)
            if is_recorded
            else Replay(lambda: [call() for call in repeated], len(repeated))
        )

    def _inputs(self, count: int) -> list[Any]:
        work = self._work
        if not self._sets:
            self._ask(max(work.needs_bytes, 3 * work.input_bytes))
        while len(self._sets) < count:
            self._sets.append(work.make(len(self._sets)))
        return self._sets

    def _num_sets(self) -> int:
        if not self._work.input_bytes:
            return 1
        wanted = -(-_L2_TIMES * self._device.l2_bytes // int(self._work.input_bytes))
        fitting = len(self._sets) + int(_ROTATED_SHARE * self._device.free_bytes() / self._work.input_bytes)
        return max(1, len(self._sets), min(wanted, fitting, _MAX_ROTATED))

    def _ask(self, num_bytes: float) -> None:
        free = self._device.free_bytes()
        if num_bytes > _USABLE_SHARE * free:
            raise TooLittleMemoryError(f"needs {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def _call(run: Callable[[Any], object], inputs: Any) -> Callable[[], object]:
    return lambda: run(inputs)
