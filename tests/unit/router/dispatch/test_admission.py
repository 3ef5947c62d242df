"""Requests that would miss their objective are refused at once, over both faces; the others are served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

import baton
from baton import errors
from router.cluster.config import PolicyConfig
from router.config import SloConfig
from router.flow.messages import Prompt
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside, until

KEY = "do-not-tell"
PROMPT = list(range(1, 501)) * 2
# A thousand tokens take a second, as long as nothing was measured.
POLICY = replace(PolicyConfig(), prompt_token_s=1e-3)


@asynccontextmanager
async def busy(num_prompts: int, **settings: Any) -> AsyncIterator[tuple[Router, httpx.AsyncClient, baton.AsyncClient]]:
    """The prefill node has so many prompts of a predicted second, and computes none of them."""
    async with (
        FakeCluster(prefill=1, decode=1) as cluster,
        router_beside(cluster, api_keys=(KEY,), policy=POLICY, **settings) as router,
        httpx.AsyncClient(base_url=router.http, headers={"authorization": f"Bearer {KEY}"}) as http,
        baton.AsyncClient(router.grpc, api_key=KEY) as client,
        asyncio.TaskGroup() as group,
    ):
        cluster["prefill-0"].runner.hold()
        scheduler = router.dispatcher.scheduler
        for _ in range(num_prompts):
            group.create_task(client.complete(PROMPT, max_tokens=2))
        await until(lambda: scheduler.num_in_flight == num_prompts and scheduler.num_waiting == 0)
        node = scheduler.node("prefill-0")
        assert node is not None
        await until(lambda: node.num_prompts == num_prompts)
        try:
            yield router, http, client
        finally:
            cluster["prefill-0"].runner.resume()


async def refusal(client: baton.AsyncClient, **settings: Any) -> errors.BatonError:
    """While no prompt is computed, so it waits for none."""
    with pytest.raises(errors.BatonError) as refused:
        await client.complete(PROMPT, max_tokens=2, timeout_s=30.0, **settings)
    assert KEY not in refused.value.message
    return refused.value


async def test_a_request_that_would_be_late_is_refused_and_hears_when_to_come_again() -> None:
    async with busy(3) as (router, http, client):
        late = await refusal(client, slo_ttft_s=2.0)
        assert late.code == "TooLate"
        assert late.retryable
        assert late.retry_after_s == pytest.approx(4.0 - 0.9 * 2.0, abs=0.5)
        assert "predicted in 4 s, too late for the objective of 2 s" in late.message
        body = {"prompt": PROMPT, "max_tokens": 2, "stream": True}
        answer = await http.post("/v1/completions", json=body, headers={"x-slo-ttft-ms": "2000"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        assert answer.json()["error"]["code"] == "too_late"
        assert KEY not in answer.text
        counted = router.metrics.refusals.children
        assert counted["TooLate",].value == 2


async def test_sheddable_requests_are_refused_before_others() -> None:
    """Four seconds are within 90 % of the objective, and not within half of it."""
    async with busy(3, slo=SloConfig(ttft_s=6.0)) as (_, _, client):
        shed = await refusal(client, priority=1)
        assert shed.code == "Shed"
        assert "too late for the objective of 6 s of which requests of priority above 0 leave a share" in shed.message
        # Patience of its own does not make it harmless to those that have the router's objective.
        assert (await refusal(client, priority=1, slo_ttft_s=1000.0)).code == "Shed"
        async with asyncio.TaskGroup() as group:
            for priority in (0, -1):
                group.create_task(_admitted(client, priority=priority))
            group.create_task(_admitted(client, priority=0, slo_ttft_s=1000.0))


async def _admitted(client: baton.AsyncClient, **settings: Any) -> None:
    parts = client.generate(PROMPT, max_tokens=2, **settings)
    async for part in parts:
        assert isinstance(part, baton.client.Accepted)
        break
    await parts.aclose()  # type: ignore[attr-defined]


async def test_without_an_objective_nothing_is_refused_for_it() -> None:
    async with busy(3) as (_, _, client):
        for settings in ({}, {"priority": 5}, {"slo_tbt_s": 1e-6}, {"priority": 5, "slo_tbt_s": 1e-6}):
            await _admitted(client, **settings)


async def test_a_node_with_nothing_to_do_tries_what_is_predicted_to_be_late() -> None:
    """So a router whose predictions are wrong finds it out."""
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, policy=POLICY) as router:
        async with baton.AsyncClient(router.grpc) as client:
            answer = await client.complete(PROMPT, max_tokens=2, slo_ttft_s=1e-6, priority=1)
        assert answer.relay.objectives == {"ttft": False}
        assert sum(sum(x.counts) for x in router.metrics.prediction_errors.values()) == 1


async def test_what_nodes_hold_of_a_prompt_is_no_work() -> None:
    """The prompt takes a second, but for its last block all of it is there."""
    config = FakeConfig(has_prefix_cache=True)
    async with FakeCluster(config, prefill=1, decode=1) as cluster, router_beside(cluster, policy=POLICY) as router:
        scheduler, node = router.dispatcher.scheduler, cluster["prefill-0"]
        await until(lambda: scheduler.prefix_scheme is not None)
        assert scheduler.prefix_scheme is not None
        node.tell_cache(Prompt(tuple(PROMPT)).keys(scheduler.prefix_scheme))
        await until(lambda: scheduler.prefix_index.num_blocks > 0)
        node.runner.hold()
        async with baton.AsyncClient(router.grpc) as client, asyncio.TaskGroup() as group:
            group.create_task(client.complete([7] * 200, max_tokens=2))
            await until(lambda: scheduler.num_in_flight == 1 and scheduler.num_waiting == 0)
            await _admitted(client, slo_ttft_s=0.5)
            late = await refusal(client, slo_ttft_s=0.1)
            node.runner.resume()
        assert late.code == "TooLate"
