"""Workers that change their pool while they serve: no request fails or runs again, and every token is the same."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from baton.client import AsyncClient
from baton.types import Role
from baton.v1 import common_pb2
from tests.support.cluster import Cluster, StartCluster
from tests.support.load import Answer, Job, mixed_jobs, run_all
from tests.support.recall import ask_all, baton, recall

CONCURRENCY = 12
DECODE, MIXED = common_pb2.ROLE_DECODE, common_pb2.ROLE_MIXED
# Each of the six changes between two roles.
WALK = ("decode", "prefill", "mixed", "decode", "mixed", "prefill", "decode")


def set_role(cluster: Cluster, node_id: str, role: str) -> str:
    return baton("role", node_id, role, "--router", cluster.grpc)


def roles(cluster: Cluster) -> dict[str, tuple[int, int]]:
    """Home and acting role of every node, as the router knows them."""
    return {n.node.node_id: (n.status.home_role, n.status.role) for n in cluster.status().nodes}


async def loop_load(cluster: Cluster, jobs: list[Job], is_over: asyncio.Event) -> list[list[Answer]]:
    rounds = [await run_all(cluster.http, jobs, CONCURRENCY)]
    while not is_over.is_set():
        rounds.append(await run_all(cluster.http, jobs, CONCURRENCY))
    return rounds


async def test_roles_change_in_all_directions_under_load_and_nothing_fails(
    shared_cluster: StartCluster, demo_model: Path
) -> None:
    assert set(itertools.pairwise(WALK)) >= set(itertools.permutations(("prefill", "decode", "mixed"), 2))
    cluster = shared_cluster(demo_model, prefill=2, decode=2, disaggregation="auto")
    at_home = roles(cluster)
    jobs = mixed_jobs(24)
    undisturbed = await run_all(cluster.http, jobs, CONCURRENCY)
    is_over = asyncio.Event()
    running = asyncio.create_task(loop_load(cluster, jobs, is_over))
    try:
        async with AsyncClient(cluster.grpc) as client:
            for role in (*map(Role, WALK), None):
                for node_id in cluster.nodes:
                    await client.set_role(node_id, role)
                    await asyncio.sleep(0.1)
    finally:
        is_over.set()
    for answers in await running:
        assert [a.error for a in answers] == [None] * len(jobs)
        assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]
        assert [a.relay["attempts"] for a in answers] == [1] * len(jobs), "nothing ran again"
    await asyncio.to_thread(cluster.wait_baseline)
    # Home by themselves, and schedulers may move them again.
    await asyncio.to_thread(cluster.wait_until, lambda: roles(cluster) == at_home, "nodes at home", 20.0)
    assert not any(n.status.is_pinned for n in cluster.status().nodes)


def keep_asking(cluster: Cluster, is_over: Event) -> None:
    """Wrong answers raise."""
    for seed in itertools.count(33):
        ask_all(cluster, recall(seed, 12))
        if is_over.is_set():
            return


def test_a_decode_node_that_gets_prompts_acts_as_mixed_and_goes_home(
    shared_cluster: StartCluster, demo_model: Path
) -> None:
    cluster = shared_cluster(demo_model, prefill=2, decode=2, disaggregation="auto")
    at_home = roles(cluster)
    try:
        for node_id in ("prefill-0", "prefill-1"):
            said = set_role(cluster, node_id, "decode")
            assert said.startswith(f"{node_id} was in the pool prefill and is in decode now")
            assert "schedulers leave it there" in said
        assert "decode!" in baton("status", "--router", cluster.grpc)
        # No node is left whose work prompts are.
        is_over = Event()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(keep_asking, cluster, is_over)
            try:
                cluster.wait_until(lambda: MIXED in {role for _, role in roles(cluster).values()}, "loan", 30.0)
                assert {home for home, _ in roles(cluster).values()} == {DECODE}
                assert "decode*" in baton("status", "--router", cluster.grpc)
                assert ", acts as mixed)" in baton("status", "--ledger", "--router", cluster.grpc)
            finally:
                is_over.set()
            asking.result()
        cluster.wait_until(lambda: set(roles(cluster).values()) == {(DECODE, DECODE)}, "nodes at home", 20.0)
    finally:
        for node_id in ("prefill-0", "prefill-1"):
            set_role(cluster, node_id, "auto")
    cluster.wait_until(lambda: roles(cluster) == at_home, "nodes where they started", 20.0)
    cluster.wait_baseline()
