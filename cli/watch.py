"""Watches a running cluster for a while: what its processes export, at both ends, and what they recorded between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

from baton.client import AsyncClient
from baton.errors import Unavailable, described
from cli.environment import trust
from cli.observe import Live, live
from loadgen.client import Server, get
from planner.advise.cluster import Watched
from planner.advise.commands import Member
from planner.advise.samples import Samples, Window

# Of one answer; how many are asked at the same time.
_SCRAPE_S = 10.0
_AT_ONCE = 16
# How often the time that is left is told.
_TICK_S = 0.5


async def watch(
    addresses: Sequence[str], api_key: str, seconds: float, tick: Callable[[float, float], None]
) -> Watched:
    """``addresses`` of routers over the same nodes. Raises Unavailable: a process does not answer, or the cluster is
    another one at the end."""
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(address, api_key=api_key, **trust())) for address in addresses
        ]
        pairs = list(zip(clients, addresses, strict=True))
        routers = [await live(client, address, is_idle=False) for client, address in pairs]
        began_s = time.monotonic()
        before = await _scraped(routers)
        while (passed_s := time.monotonic() - began_s) < seconds:
            tick(passed_s, seconds)
            await asyncio.sleep(min(_TICK_S, seconds - passed_s))
        after = await _scraped(routers)
        watched_s = time.monotonic() - began_s
        first, last = routers[0], await live(*pairs[0], is_idle=False)
        _refuse_changes(first, last)
        observed = await first.since(began_s)
    windows = {source: Window(before[source], after[source]) for source in after}
    members = [Member(*pair) for pair in zip(last.nodes, last.statuses, strict=True)]
    return Watched(
        watched_s,
        tuple(windows.pop(_name(router)) for router in routers),
        tuple(sorted(members, key=lambda member: member.node_id)),
        windows,
        observed,
    )


def _name(router: Live) -> str:
    """Apart from node ids."""
    return f"router {router.server.host}:{router.server.port}"


async def _scraped(routers: Sequence[Live]) -> Mapping[str, Samples]:
    """By node id, and by the routers' names."""
    sources = {_name(router): router.server for router in routers}
    for node in routers[0].nodes:
        if node.metrics_address:
            sources[node.node_id] = Server.parse(f"http://{node.metrics_address}")
    turns = asyncio.Semaphore(_AT_ONCE)

    async def scrape(source: str, server: Server) -> Samples:
        try:
            async with turns, asyncio.timeout(_SCRAPE_S):
                text = (await get(server, "/metrics")).decode()
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"{source} did not say its metrics at {server.host}:{server.port} ({described(error)}); expected "
                "GET /metrics to be reachable from here"
            ) from error
        return Samples.parse(text, source)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = {source: group.create_task(scrape(source, server)) for source, server in sources.items()}
    except* Unavailable as errors:
        # All of them say the same: one is enough.
        raise errors.exceptions[0] from None
    return {source: task.result() for source, task in tasks.items()}


def _refuse_changes(first: Live, last: Live) -> None:
    then, now = (
        {
            (node.node_id, node.incarnation, (status.home or status.role).value)
            for node, status in zip(cluster.nodes, cluster.statuses, strict=True)
        }
        for cluster in (first, last)
    )
    if then != now:
        changed = sorted({node_id for node_id, _, _ in then ^ now})
        raise Unavailable(
            f"the cluster changed while it was watched ({', '.join(changed[:8])} came, left, or changed the pool): "
            "what was measured is of two clusters; ask again"
        )
