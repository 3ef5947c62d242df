"""`baton profile` beside fake nodes, and what it makes of their records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from baton import codec
from baton.client import AsyncClient
from baton.errors import BadConfig, Unavailable
from baton.v1 import router_pb2
from cli.observe import live
from cli.profile import Shapes, measure
from engine.step import StepShape
from planner.measured import read, write
from router.cluster.config import PolicyConfig
from tests.support.descriptions import NODE as DESCRIBED
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside

# Of the prompts that are sent.
NODE = FakeConfig(transfer_s=0.002, vocab_size=2048, step_s=0.001, prefill_token_s=1e-5)
SMALL = Shapes(
    prompts=(4, 16, 64, 100_000), batches=((1, 4), (3, 32), (2, 100_000)), in_a_row=(3, 16, 3), num_output_tokens=8,
    repeats=2,
)  # fmt: skip
ALWAYS: dict[str, Any] = {"policy": PolicyConfig(disaggregation="always")}


async def test_a_cluster_is_measured_and_its_profile_predicts(tmp_path: Path) -> None:
    async with (
        FakeCluster(NODE, prefill=1, decode=1) as cluster,
        router_beside(cluster, **ALWAYS) as router,
        AsyncClient(router.grpc or "") as client,
    ):
        node = cluster["prefill-0"].description
        measured = await measure(await live(client, router.grpc or ""), {}, SMALL, Console(quiet=True))
    # What the context does not hold is not asked for.
    prompts = [point.shape for point in measured.points if point.shape.num_prompt_tokens]
    assert {StepShape().with_prompt(0, tokens) for tokens in (4, 16, 64)} <= set(prompts)
    decodes = {point.shape.num_decoding: point.shape for point in measured.points if point.shape.num_decoding}
    assert 1 in decodes
    # Each sequence with the KV of its own tokens, the one that it computes included.
    assert all(n * 5 <= shape.num_kv_tokens <= n * 68 for n, shape in decodes.items())
    assert measured.transfers is not None
    assert measured.requests.fixed_s > 0
    assert measured.requests.message_s > 0
    # The nodes are of another host.
    assert (measured.overhead.num_cores, measured.overhead.node_cores) == (0, 0)
    assert (measured.kv_layout, measured.device, measured.power) == (node.kv_layout, node.device, None)
    write(tmp_path / "p.json", measured)
    assert read(tmp_path / "p.json") == measured
    assert measured.times().step_s(StepShape().with_prompt(0, 64)) > 0


async def test_steps_alone_take_what_the_runner_takes() -> None:
    async with (
        FakeCluster(NODE, prefill=1, decode=1) as cluster,
        router_beside(cluster, **ALWAYS) as router,
        AsyncClient(router.grpc or "") as client,
    ):
        alone = replace(SMALL, batches=(), in_a_row=(1, 4, 1))
        measured = await measure(await live(client, router.grpc or ""), {}, alone, Console(quiet=True))
    assert not measured.sharing
    for point in measured.points:
        paced_s = NODE.step_s if point.shape.num_decoding else NODE.prefill_token_s * point.shape.num_prompt_tokens
        assert point.seconds + measured.wake.of(point.shape) >= paced_s


class _Told(AsyncClient):
    """Of a router that says this."""

    def __init__(self, *nodes: tuple[str, str], num_running: int = 0, http_port: int = 80) -> None:
        self._told = router_pb2.StatusResponse(num_running=num_running, http_port=http_port)
        for state, device in nodes:
            told = self._told.nodes.add(state=state)
            told.node.CopyFrom(codec.node_to_pb(replace(DESCRIBED, device=device)))
            told.status.role = told.node.role

    async def status(self, timeout_s: float = 5.0) -> router_pb2.StatusResponse:
        return self._told


async def test_a_cluster_that_cannot_be_measured_is_refused() -> None:
    for told, error, text in (
        (_Told(("lost: gone", "cpu")), Unavailable, "no node of the cluster is ready"),
        (_Told(("ready", "cpu"), num_running=2), Unavailable, "has 2 requests, expected none"),
        (_Told(("ready", "cuda"), ("ready", "cpu")), BadConfig, "the cluster has nodes with cpu, .*cuda"),
        (_Told(("ready", "cpu"), http_port=0), BadConfig, "the router has no HTTP API"),
    ):
        with pytest.raises(error, match=text):
            await live(told, "127.0.0.1:50051")
    found = await live(_Told(("ready", "cpu"), ("lost", "cuda")), "[::1]:50051")
    assert [node.device for node in found.nodes] == ["cpu"]
    assert (found.server.host, found.server.port) == ("::1", 80)
