"""`priority` of a request: over both faces to the nodes, and in the order in which a client's requests are placed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

import baton
from baton import errors
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside, until

PROMPT = [1, 2, 3]


@asynccontextmanager
async def both_faces(cluster: FakeCluster) -> AsyncIterator[tuple[httpx.AsyncClient, baton.AsyncClient]]:
    async with (
        router_beside(cluster) as router,
        httpx.AsyncClient(base_url=router.http) as http,
        baton.AsyncClient(router.grpc) as client,
    ):
        yield http, client


async def test_both_faces_tell_the_nodes() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, both_faces(cluster) as (http, client):
        for priority in (0, 7, -3, 1_000_000, -1_000_000):
            body = {"prompt": PROMPT, "max_tokens": 2, "priority": priority}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            specs = [cluster["prefill-0"].script.last_spec]
            await client.complete(PROMPT, max_tokens=2, priority=priority)
            specs.append(cluster["prefill-0"].script.last_spec)
            assert [spec and spec.priority for spec in specs] == [priority, priority]


async def test_priorities_out_of_range_are_refused_by_name() -> None:
    async with FakeCluster(mixed=1) as cluster, both_faces(cluster) as (http, client):
        for priority in (1_000_001, -1_000_001):
            with pytest.raises(errors.InvalidRequest, match=f"priority is {priority}, expected") as refused:
                await client.complete(PROMPT, max_tokens=2, priority=priority)
            assert refused.value.param == "priority"
            body = {"prompt": PROMPT, "max_tokens": 2, "priority": priority}
            answer = await http.post("/v1/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")


async def test_the_better_priority_is_placed_first_and_equal_ones_in_turn() -> None:
    """The node has room for one sequence; the others wait in the router."""
    order: list[str] = []
    config = FakeConfig(num_blocks=1, block_tokens=16)
    async with FakeCluster(config, mixed=1) as cluster, router_beside(cluster) as router:
        scheduler = router.dispatcher.scheduler
        async with baton.AsyncClient(router.grpc) as client, asyncio.TaskGroup() as group:

            async def ask(name: str, priority: int) -> None:
                await client.complete(PROMPT, max_tokens=4, ignore_eos=True, priority=priority)
                order.append(name)

            cluster["mixed-0"].runner.hold()
            group.create_task(ask("first", 9))
            await until(lambda: scheduler.num_in_flight == 1 and scheduler.num_waiting == 0)
            asked = [("late", 5), ("usual", 0), ("soon", -5), ("usual too", 0)]
            for num, (name, priority) in enumerate(asked, 1):
                group.create_task(ask(name, priority))
                await until(lambda num=num: scheduler.num_waiting == num)
            cluster["mixed-0"].runner.resume()
    assert order == ["first", "soon", "usual", "usual too", "late"]
