"""Assigns GPUs (round robin) or sets of cores to the workers of a local cluster. Starts nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from baton.errors import BadConfig, quoted
from cli.launch import cores, host
from engine.devices import Devices, seen_gpus

_ALL = "all"
# Beside the threads that compute a worker has an event loop, and threads that send, receive and hash. On a single CPU
# they would take turns with the computation while another one idles.
_LEAST_BOUND_CPUS = 2


@dataclass(frozen=True, slots=True)
class Place:
    """``device`` as torch calls it; ``gpu_workers``: how many workers share that GPU. ``cpus`` empty: all there are.
    ``threads`` compute on the processor."""

    device: str = "cpu"
    gpu_workers: int = 1
    cpus: tuple[int, ...] = ()
    threads: int = 1

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"


def on_devices(gpus: str, kernels: str, num_workers: int, devices: Devices) -> tuple[Place, ...]:
    """``gpus``: ``auto`` (all that the kernels can use), ``none``, or indices as torch counts. Raises BadConfig."""
    indices = _indices(gpus, kernels, devices)
    if not indices:
        return (Place(),) * num_workers
    chosen = [indices[i % len(indices)] for i in range(num_workers)]
    count = Counter(chosen)
    return tuple(Place(f"cuda:{index}", count[index]) for index in chosen)


def _indices(gpus: str, kernels: str, devices: Devices) -> list[int]:
    computes_on_gpus = kernels in ("auto", "triton")
    if gpus == "none" or (gpus == "auto" and not computes_on_gpus):
        return []
    if gpus == "auto":
        return [i for i in range(devices.num_gpus) if kernels == "triton" or _is_usable(devices, i)]
    if re.fullmatch(r"\d{1,4}(,\d{1,4})*", gpus) is None:
        raise BadConfig(f"--gpus is {quoted(gpus)}, expected auto, none or indices such as 0,1", param="gpus")
    if not computes_on_gpus:
        raise BadConfig(f"--gpus {gpus} with --kernels {kernels}, which compute on the processor", param="gpus")
    indices = [int(word) for word in gpus.split(",")]
    twice = [index for index, count in Counter(indices).items() if count > 1]
    missing = [index for index in indices if index >= devices.num_gpus]
    if missing or twice:
        fault = f"GPU {missing[0]} is not there" if missing else f"GPU {twice[0]} is named twice"
        raise BadConfig(f"--gpus {gpus}: {fault}; {seen_gpus(devices)}", param="gpus")
    return indices


def _is_usable(devices: Devices, index: int) -> bool:
    from engine.kernels import choose  # with torch, which takes seconds

    return choose(devices.look(index)).kernels == "triton"


def on_cores(wanted: str, places: Sequence[Place]) -> tuple[Place, ...]:
    """Divides the CPUs of ``wanted`` among workers on the processor. ``auto``: those of this process, and a worker
    whose share is a single CPU is not bound to it; ``all``: no worker is bound. Raises BadConfig."""
    if wanted == _ALL or places[0].is_gpu:
        threads = max(1, host.usable_cores() // len(places))
        return tuple(replace(place, threads=threads) for place in places)
    cpus = cores.allowed() if wanted == "auto" else cores.parse(wanted, "--cpus")
    cores.check(cpus, "--cpus")
    shares = cores.shares(cores.topology(cpus), len(places))
    count, quota = Counter(shares), host.quota_cores()
    most = len(cpus) if quota is None else quota // len(places)
    least = _LEAST_BOUND_CPUS if wanted == "auto" else 1
    return tuple(
        replace(place, cpus=share if len(share) >= least else (), threads=max(1, min(most, len(share) // count[share])))
        for place, share in zip(places, shares, strict=True)
    )


def described(names: Sequence[str], places: Sequence[Place], utilization: float) -> Iterator[str]:
    """Lines about the placement for the user who starts a cluster; none if there is nothing special."""
    by_gpu: dict[str, list[str]] = {}
    for name, place in zip(names, places, strict=True):
        if place.is_gpu:
            by_gpu.setdefault(place.device, []).append(name)
    for device, workers in by_gpu.items():
        line = f"{device}: {', '.join(workers)}"
        if len(workers) > 1:
            line += f", which share it: each may use {utilization / len(workers):.0%} of its memory"
        yield line
