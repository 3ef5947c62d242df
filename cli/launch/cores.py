"""Assigns cores to the workers of this machine: whole cores, of one NUMA node if possible.

Memory is then local: Linux takes a page from the node of the thread that touches it first, and all threads of a worker
are on its cores. Reads sysfs; only ``bind`` changes anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TypeVar

from baton.errors import BadConfig, quoted

_SYSTEM = Path("/sys/devices/system")
# What a list may name: far beyond all machines.
_MAX_CPUS = 1 << 16
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Core:
    """``cpus``: the threads of one core, those of them that this process may use."""

    cpus: tuple[int, ...]
    node: int


def parse(text: str, option: str) -> tuple[int, ...]:
    """Of a list as Linux writes them, ``0-3,8``. Raises BadConfig."""
    cpus: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last or last >= _MAX_CPUS:
            raise BadConfig(f"{option} is {quoted(text)}, expected CPUs such as 0-3,8, or all", param="cpus")
        cpus.update(range(first, last + 1))
    return tuple(sorted(cpus))


def shown(cpus: Collection[int]) -> str:
    """The way back."""
    ordered = sorted(cpus)
    runs = [[cpu for _, cpu in run] for _, run in groupby(enumerate(ordered), key=lambda item: item[1] - item[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def allowed() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0)))


def bind(cpus: Collection[int], option: str) -> None:
    """This process computes there from now on; threads that it starts inherit it. Raises BadConfig."""
    check(cpus, option)
    os.sched_setaffinity(0, cpus)


def check(cpus: Collection[int], option: str) -> None:
    """Raises BadConfig unless this process may use all of them."""
    usable = allowed()
    missing = set(cpus) - set(usable)
    if missing:
        raise BadConfig(
            f"{option} names CPU {shown(missing)}, expected some of {shown(usable)}, which this process may use",
            param="cpus",
        )


def topology(cpus: Collection[int], system: Path = _SYSTEM) -> tuple[Core, ...]:
    """The cores that ``cpus`` are threads of, by node. Where sysfs does not tell, a CPU is a core, all of one node."""
    usable, nodes = set(cpus), _nodes(system)
    cores: dict[tuple[int, ...], Core] = {}
    for cpu in sorted(usable):
        folder = system / "cpu" / f"cpu{cpu}" / "topology"
        siblings = _list(folder / "core_cpus_list") or _list(folder / "thread_siblings_list") or (cpu,)
        together = tuple(sorted(usable & {cpu, *siblings}))
        cores.setdefault(together, Core(together, nodes.get(cpu, 0)))
    return tuple(sorted(cores.values(), key=lambda core: (core.node, core.cpus)))


def shares(cores: Sequence[Core], num_workers: int) -> tuple[tuple[int, ...], ...]:
    """The CPUs of each worker. Nodes get workers by their number of cores and divide these among them; fewer workers
    than nodes get whole nodes. Where a node has fewer cores than workers, these have all of it, each.

    Successive workers are on different nodes: those of a pool want the same of a node.
    """
    nodes = [list(group) for _, group in groupby(cores, key=lambda core: core.node)]
    if num_workers < len(nodes):
        groups = [[core for node in part for core in node] for part in _parts(nodes, num_workers)]
        return tuple(_cpus(group) for group in groups)
    by_node: list[list[tuple[int, ...]]] = []
    for node, count in zip(nodes, _apportioned([len(node) for node in nodes], num_workers), strict=True):
        is_crowded = len(node) < count
        by_node.append([_cpus(node)] * count if is_crowded else [_cpus(part) for part in _parts(node, count)])
    return tuple(share for turn in zip_longest(*by_node) for share in turn if share is not None)


def _apportioned(sizes: Sequence[int], num_workers: int) -> list[int]:
    """At least one for each, the others one by one to where the cores of each worker are most."""
    counts = [1] * len(sizes)
    for _ in range(num_workers - len(sizes)):
        widest = max(range(len(sizes)), key=lambda i: sizes[i] / counts[i])
        counts[widest] += 1
    return counts


def _parts(items: Sequence[_Item], num_parts: int) -> list[Sequence[_Item]]:
    """Runs of equal length, but for one item."""
    return [items[i * len(items) // num_parts : (i + 1) * len(items) // num_parts] for i in range(num_parts)]


def _cpus(cores: Sequence[Core]) -> tuple[int, ...]:
    return tuple(sorted(cpu for core in cores for cpu in core.cpus))


def _nodes(system: Path) -> dict[int, int]:
    """The node of each CPU."""
    found: dict[int, int] = {}
    for folder in sorted((system / "node").glob("node[0-9]*")):
        for cpu in _list(folder / "cpulist"):
            found[cpu] = int(folder.name.removeprefix("node"))
    return found


def _list(path: Path) -> tuple[int, ...]:
    """Empty where there is no such file, or nothing in it: a node may have memory alone."""
    try:
        text = path.read_text().strip()
    except OSError:
        return ()
    return parse(text, str(path)) if text else ()
