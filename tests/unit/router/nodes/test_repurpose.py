"""A router asks a node to change pools: it does and all see it, or it keeps its pool and the router goes on."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

import baton
from baton.types import Role
from router.cluster.config import PolicyConfig
from router.cluster.repurpose import Change
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import router_beside, until

P, D = Role.PREFILL, Role.DECODE
CHANGE = Change("decode-1", P, D, 1.5, 0.0)


def home_of(router: Router, node_id: str) -> Role | None:
    load = router.dispatcher.scheduler.node(node_id)
    return None if load is None else load.home_role


async def test_a_node_changes_pools_once_and_a_stale_change_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "baton.router")
    async with FakeCluster(prefill=1, decode=2) as cluster, router_beside(cluster) as router:
        router.dispatcher.nodes.set_role(CHANGE)
        await until(lambda: home_of(router, "decode-1") is P)
        await until(
            lambda: "moved: decode-1 from the decode pool to the prefill pool: a request loses 1.50 s" in caplog.text
        )
        router.dispatcher.nodes.set_role(CHANGE)
        await until(lambda: "not moved: decode-1" in caplog.text)
        assert "expected decode" in caplog.text
        router.dispatcher.nodes.set_role(replace(CHANGE, node_id="nobody"))
        assert home_of(router, "decode-1") is P


async def test_a_node_that_does_not_answer_holds_up_neither_the_others_nor_the_end() -> None:
    async with FakeCluster(prefill=1, decode=2) as cluster, router_beside(cluster) as router:
        cluster["decode-1"].mute()
        router.dispatcher.nodes.set_role(CHANGE)
        router.dispatcher.nodes.set_role(replace(CHANGE, node_id="decode-0"))
        await until(lambda: home_of(router, "decode-0") is P)


async def test_a_load_that_has_shifted_moves_a_node_and_no_request_fails() -> None:
    config = FakeConfig(prefill_token_s=1e-3, max_batch_tokens=256)
    policy = PolicyConfig(disaggregation="always", repurpose_after_s=0.5, repurpose_window_s=0.5)
    async with (
        FakeCluster(config, prefill=1, decode=2) as cluster,
        router_beside(cluster, policy=policy) as router,
        baton.AsyncClient(router.grpc or "") as client,
    ):
        async with asyncio.TaskGroup() as tasks:
            # Six seconds of prompts for one node.
            prompts = [[1 + number] * 500 for number in range(12)]
            done = [tasks.create_task(client.complete(x, max_tokens=3, seed=1, ignore_eos=True)) for x in prompts]
        homes = [home_of(router, node_id) for node_id in cluster.nodes]
        assert sorted(x.value for x in homes if x is not None) == ["decode", "prefill", "prefill"]
        for prompt, each in zip(prompts, done, strict=True):
            assert list(each.result().token_ids) == expected_tokens(prompt, 1, 3, config.vocab_size)
