"""A router under a schedule of faults: what it says to nodes is late, twice, swapped or cut off; answers are whole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import baton
from baton.client import Options
from baton.faults.config import FaultsConfig
from baton.faults.plan import Plan
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import baseline, quick, router_beside

VOCAB = FakeConfig().vocab_size


def schedule(folder: Path, text: str) -> FaultsConfig:
    file = folder / "faults.toml"
    file.write_text(text)
    return FaultsConfig(file, record=folder / "drawn")


async def ask(router: Router, count: int) -> None:
    """Concurrent requests, whose tokens are those of an undisturbed run."""
    assert router.grpc is not None
    async with baton.AsyncClient(router.grpc) as client, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(client.complete([1, 2, i], Options(request_id=f"r{i}"), max_tokens=12, seed=i))
            for i in range(count)
        ]
    for i, task in enumerate(tasks):
        assert task.result().token_ids == tuple(expected_tokens([1, 2, i], i, 12, VOCAB)), i


@pytest.mark.parametrize("kind", ["run", "reserve"])
@pytest.mark.parametrize(
    ("fault", "more"),
    [("delay", "seconds = 0.05"), ("stall", "seconds = 0.1"), ("duplicate", ""), ("reorder", "seconds = 0.05"),
     ("disconnect", "")],
)  # fmt: skip
async def test_answers_are_whole_whatever_a_message_meets(tmp_path: Path, kind: str, fault: str, more: str) -> None:
    text = (
        f'[[fault]]\nlayer = "session"\nkind = "{kind}"\nrequest = "r[13]/0/0"\nnode = "router"\nnth = 1\n'
        f'fault = "{fault}"\n{more}\n'
    )
    faults = schedule(tmp_path, text)
    async with (
        FakeCluster(prefill=1, decode=1) as cluster,
        router_beside(cluster, timing=quick, faults=faults, router_id="router") as router,
    ):
        await ask(router, 5)
        await baseline(cluster)
    drawn = Plan.load(tmp_path / "drawn").rules
    assert {rule.kind for rule in drawn} == {kind}
    # A session that is cut takes others with it, maybe before their message was to be sent.
    expected = [["r1/0/0", "r3/0/0"], ["r1/0/0"], ["r3/0/0"]][: 1 if fault != "disconnect" else 3]
    assert sorted(rule.request for rule in drawn) in expected


async def test_no_schedule_no_line() -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster) as router:
        await ask(router, 1)
        assert [link._line for link in router.dispatcher.nodes.links.values()] == [None]


def test_only_a_file_at_the_start_turns_faults_on() -> None:
    """No message of any service has a field or a call for it."""
    from baton.v1 import node_pb2, router_pb2, transfer_pb2

    names = {
        name.lower()
        for module in (node_pb2, router_pb2, transfer_pb2)
        for name in (*module.DESCRIPTOR.message_types_by_name, *module.DESCRIPTOR.services_by_name)
    }
    calls = {
        method.name.lower()
        for module in (node_pb2, router_pb2, transfer_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert calls
    assert not [name for name in names | calls if "fault" in name or "chaos" in name]
