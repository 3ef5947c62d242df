"""Roles of nodes through a router: set by hand and by a scheduler, shown and counted, and no request fails by it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import baton
from baton import errors
from baton.client import Completion
from baton.types import Role
from baton.v1 import common_pb2
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.node import session, spec
from tests.support.router import router_beside, until
from worker.roles import RolesConfig

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
SLOW = FakeConfig(step_s=0.005, roles=RolesConfig(dwell_s=0.2))


def client_of(router: Router) -> baton.AsyncClient:
    assert router.grpc is not None
    return baton.AsyncClient(router.grpc)


def snapshot(router: Router) -> dict[str, Any]:
    return router.status.snapshot(router.dispatcher.clock.now())


def roles_of(router: Router) -> dict[str, tuple[str, str]]:
    return {node["id"]: (node["home"], node["role"]) for node in snapshot(router)["nodes"]}


async def metrics_of(router: Router, name: str) -> dict[str, float]:
    """By pool; of nodes those that are ready."""
    async with httpx.AsyncClient(base_url=router.http or "") as client:
        text = (await client.get("/metrics")).text
    found = (s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name)
    return {s.labels["pool"]: s.value for s in found if s.labels.get("state", "ready") == "ready"}


async def test_a_node_changes_its_pool_and_all_who_look_see_it() -> None:
    async with (
        FakeCluster(SLOW, prefill=1, decode=2) as cluster,
        router_beside(cluster) as router,
        router_beside(cluster) as other,
        client_of(router) as client,
    ):
        answer = await client.set_role("decode-1", P)
        assert answer.address == cluster["decode-1"].address
        assert answer.role.previous_role == common_pb2.ROLE_DECODE
        assert answer.role.home_role == answer.role.role == common_pb2.ROLE_PREFILL
        # By address as well, and the other router hears of it from the node.
        again = await client.set_role(answer.address, P)
        assert again.role.previous_role == again.role.home_role == common_pb2.ROLE_PREFILL
        for each in (router, other):
            await until(lambda r=each: roles_of(r)["decode-1"] == ("prefill", "prefill"))
            found = snapshot(each)
            assert [(pool["role"], pool["num_ready"]) for pool in found["pools"]] == [("prefill", 2), ("decode", 1)]
            assert [n["id"] for n in found["nodes"] if n["is_pinned"]] == ["decode-1"]
            assert await metrics_of(each, "baton_nodes") == {"prefill": 2, "decode": 1, "mixed": 0}
            assert await metrics_of(each, "baton_node_moves_total") == {"prefill": 0, "decode": 1, "mixed": 0}
        (state,) = (n for n in (await client.status()).nodes if n.node.node_id == "decode-1")
        assert (state.node.home_role, state.status.home_role) == (common_pb2.ROLE_DECODE, common_pb2.ROLE_PREFILL)
        # It is in the pool of those who compute prompts, and in no other.
        done = [await client.complete([1, i], max_tokens=3, seed=i) for i in range(4)]
        assert {x.relay.decode_node_id for x in done} == {"decode-0"}
        # A node that is lost is one of the pool that it was in.
        await cluster["decode-1"].die()
        await until(lambda: any(n["state"] == "lost" for n in snapshot(router)["nodes"]))
        assert await metrics_of(router, "baton_node_losses_total") == {"prefill": 1, "decode": 0, "mixed": 0}


async def test_a_borrowed_node_stays_in_its_pool_and_shows() -> None:
    async with FakeCluster(SLOW, prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        # As another router does that lends it.
        node = cluster["prefill-0"]
        reserved = await reserve(node.address)
        await until(lambda: roles_of(router)["prefill-0"] == ("prefill", "mixed"))
        prefill, decode = snapshot(router)["pools"]
        assert (prefill["role"], prefill["num_nodes"], prefill["num_borrowed"]) == ("prefill", 1, 1)
        assert (decode["role"], decode["num_nodes"], decode["num_borrowed"]) == ("decode", 1, 0)
        assert await metrics_of(router, "baton_nodes") == {"prefill": 1, "decode": 1, "mixed": 0}
        async with client_of(router) as client:
            relay = (await client.complete([1, 2], max_tokens=3)).relay
        assert (relay.prefill_node_id, relay.decode_node_id) == ("prefill-0", "decode-0")
        reserved.cancel()
        await asyncio.wait([reserved])
        await until(lambda: roles_of(router)["prefill-0"] == ("prefill", "prefill"))
        assert await metrics_of(router, "baton_node_moves_total") == {"prefill": 0, "decode": 0, "mixed": 0}


async def reserve(address: str) -> asyncio.Task[None]:
    """A router that has a lease there until it is cancelled."""
    is_granted = asyncio.Event()

    async def hold() -> None:
        async with session(address) as mine:
            await mine.hello("another")
            await mine.reserve(spec("a"))
            await mine.until("reserved")
            is_granted.set()
            await asyncio.Event().wait()

    holding = asyncio.create_task(hold())
    async with asyncio.timeout(10):
        await is_granted.wait()
    return holding


async def test_what_cannot_be_set_is_refused() -> None:
    async with (
        FakeCluster(prefill=1, decode=1) as cluster,
        router_beside(cluster) as router,
        client_of(router) as client,
    ):
        with pytest.raises(errors.UnknownNode, match="no node 'nobody' is up"):
            await client.set_role("nobody", P)
        await cluster["decode-0"].die()
        await until(lambda: any(n["state"] == "lost" for n in snapshot(router)["nodes"]))
        with pytest.raises(errors.UnknownNode, match="no node 'decode-0' is up"):
            await client.set_role("decode-0", P)


async def test_a_scheduler_hears_from_the_node_why_not() -> None:
    async with FakeCluster(prefill=1, decode=2) as cluster, router_beside(cluster) as router:
        links = router.dispatcher.nodes.links
        link = links[cluster["decode-0"].address]
        assert (await link.set_role(P, expected=D)).home_role == common_pb2.ROLE_PREFILL
        with pytest.raises(errors.Conflict, match="home role is prefill, expected decode"):
            await link.set_role(P, expected=D)
        with pytest.raises(errors.Conflict, match="again in") as refused:
            await link.set_role(D, expected=P)
        assert 0 < (refused.value.retry_after_s or 0) <= 30
        assert not (await link.set_role(None)).is_pinned
        await link.set_role(M)
        with pytest.raises(errors.Conflict, match="operator"):
            await link.set_role(P, expected=M)


async def test_roles_change_under_load_and_no_request_fails() -> None:
    async with (
        FakeCluster(SLOW, prefill=2, decode=2) as cluster,
        router_beside(cluster) as router,
        client_of(router) as client,
    ):
        is_over = asyncio.Event()
        done: list[Completion] = []

        async def ask(first: int) -> None:
            number = first
            while not is_over.is_set():
                prompt = [1 + number % 100] * 20
                done.append(await client.complete(prompt, max_tokens=30, seed=number, ignore_eos=True))
                expected = expected_tokens(prompt, number, 30, cluster.config.vocab_size)
                assert list(done[-1].token_ids) == expected
                number += 8

        async with asyncio.TaskGroup() as tasks:
            for first in range(8):
                tasks.create_task(ask(first))
            for _ in range(3):
                for node_id in cluster.nodes:
                    for role in (P, D, M, None):
                        await client.set_role(node_id, role)
                        await asyncio.sleep(0.05)
            is_over.set()
        assert len(done) > 8
        assert all(x.relay.attempts == 1 for x in done), "no request ran again for a change of roles"
        await until(lambda: cluster.used_blocks == 0)
        await until(lambda: all(home == role for home, role in roles_of(router).values()))
