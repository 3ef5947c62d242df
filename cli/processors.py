"""What a load takes of the processors: router, nodes and this client by their own counters, and, where all of them are
on this host, what is left of the host's: other work."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cli.observe import Live
from kvtransfer.host import host_id
from loadgen import counters, machine
from planner.overhead import grown


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of processor time. ``other_s``: of other work, None where the cluster is not on this host alone."""

    elapsed_s: float
    router_s: float
    client_s: float
    nodes_s: float
    other_s: float | None

    @property
    def other_cores(self) -> float:
        return (self.other_s or 0.0) / self.elapsed_s


class Processors:
    """From ``begin`` to ``end``."""

    def __init__(self, cluster: Live) -> None:
        self._cluster = cluster
        self.began_s = self._client_s = 0.0
        self._before: Mapping[str, float] | None = None
        self._host_s: float | None = None

    async def begin(self) -> None:
        self._before = await counters.processor_s(self._cluster.server)
        self._host_s = machine.processor_s() if num_cores(self._cluster) is not None else None
        self.began_s, self._client_s = time.monotonic(), time.process_time()

    async def end(self) -> Taken | None:
        """None if a process does not say what it took."""
        elapsed_s, client_s = time.monotonic() - self.began_s, time.process_time() - self._client_s
        host_s = machine.processor_s() if self._host_s is not None else None
        after = await counters.processor_s(self._cluster.server)
        if self._before is None or after is None:
            return None
        router_s, nodes_s = (grown(self._before, after, is_router=is_router) for is_router in (True, False))
        other_s = None
        if host_s is not None and self._host_s is not None:
            other_s = max(0.0, host_s - self._host_s - router_s - client_s - nodes_s)
        return Taken(elapsed_s, router_s, client_s, nodes_s, other_s)


def num_cores(cluster: Live) -> int | None:
    """Of this host, if all nodes are here as well."""
    is_here = all(node.host_id == host_id() for node in cluster.nodes)
    return len(os.sched_getaffinity(0)) if is_here else None
