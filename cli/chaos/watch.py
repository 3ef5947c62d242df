"""Looks at a running cluster now and then: memory and descriptors of its processes, and which nodes are ready."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.client import AsyncClient
from baton.errors import BatonError
from cli.chaos.verdict import Ledger

_LOOK_EVERY_S = 0.5
_CALL_S = 2.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# In the ledger, blocks that no sequence holds.
_CACHED = "cached"


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    rss_bytes: int
    num_descriptors: int


@dataclass(frozen=True, slots=True)
class Look:
    """``ready``: nodes that the router would give work; None if it did not answer."""

    at_s: float
    processes: dict[str, Process]
    ready: frozenset[str] | None


class Watch:
    """``run`` looks until it is cancelled."""

    def __init__(self, ready_file: Path, routers: Sequence[AsyncClient], now: Callable[[], float]) -> None:
        """``routers``: the first that answers is asked."""
        self._ready_file = ready_file
        self._routers = routers
        self._now = now
        self.looks: list[Look] = []

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def look(self) -> None:
        """Once more: a node that has come back since the last look is no longer absent."""
        self.looks.append(await self._look())

    async def _look(self) -> Look:
        processes = await asyncio.to_thread(self._processes)
        at_s = self._now()
        for router in self._routers:
            with contextlib.suppress(BatonError):
                status = await router.status(timeout_s=_CALL_S)
                return Look(at_s, processes, frozenset(n.node.node_id for n in status.nodes if n.state == "ready"))
        return Look(at_s, processes, None)

    def _processes(self) -> dict[str, Process]:
        """Those that run now; one that died is missing until `up` has said that another is ready."""
        try:
            said = json.loads(self._ready_file.read_text())
        except OSError:
            return {}
        pids = {process["id"]: process["pid"] for process in (*said["routers"], *said["nodes"])}
        found = {}
        for name, pid in pids.items():
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                found[name] = Process(pid, pages * _PAGE_BYTES, len(os.listdir(f"/proc/{pid}/fd")))
        return found

    async def until_ready(self, num_nodes: int, limit_s: float) -> bool:
        """Whether so many nodes are ready in time."""
        return await _within(limit_s, lambda: self._are_ready(num_nodes))

    async def _are_ready(self, num_nodes: int) -> bool:
        look = await self._look()
        return look.ready is not None and len(look.ready) == num_nodes

    async def ledger(self, num_nodes: int, limit_s: float) -> Ledger:
        """What is held when nothing runs: blocks that are on their way back get so long."""
        await _within(limit_s, lambda: self._is_settled(num_nodes))
        return await self._ledger(num_nodes)

    async def _is_settled(self, num_nodes: int) -> bool:
        return (await self._ledger(num_nodes)).is_right

    async def _ledger(self, num_nodes: int) -> Ledger:
        found = None
        for router in self._routers:
            with contextlib.suppress(BatonError):
                found = await router.ledger()
                break
        if found is None:
            return Ledger(0, num_nodes, 0, 0)
        held = sum(o.num_blocks for node in found.nodes for o in node.owners if o.state != _CACHED)
        off = sum(abs(n.total_blocks - n.free_blocks - sum(o.num_blocks for o in n.owners)) for n in found.nodes)
        return Ledger(len(found.nodes), num_nodes - len(found.nodes), held, off)


async def _within(limit_s: float, condition: Callable[[], Awaitable[bool]]) -> bool:
    """Whether it holds in time; looked at from outside, as nothing tells of it."""
    try:
        async with asyncio.timeout(limit_s):
            while not await condition():  # noqa: ASYNC110 - other processes set no event here
                await asyncio.sleep(_LOOK_EVERY_S)
    except TimeoutError:
        return False
    return True


def absences(looks: Sequence[Look], nodes: Sequence[str]) -> list[float]:
    """How long each absence of a node lasted, in seconds; those that have not ended are missing."""
    found: list[float] = []
    since: dict[str, float] = {}
    for look in looks:
        if look.ready is None:
            continue
        for node in nodes:
            if node not in look.ready:
                since.setdefault(node, look.at_s)
            elif node in since:
                found.append(look.at_s - since.pop(node))
    return found
