"""`baton profile` beside fake nodes, and what it makes of answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baton.client import AsyncClient
from baton.errors import BadConfig, Unavailable
from baton.v1 import router_pb2
from cli.profile import Asked, Shapes, _described, decode_points, measure, prompt_points
from engine.step import StepShape
from planner.fitted import FittedTimes, read, write
from router.cluster.config import PolicyConfig
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside

SMALL = Shapes(prompts=(4, 16, 64, 100_000), batches=(1, 3), contexts=(4, 32), num_output_tokens=8, repeats=2)


async def test_a_cluster_is_measured_and_its_profile_predicts(tmp_path: Path) -> None:
    async with (
        FakeCluster(FakeConfig(transfer_s=0.002), prefill=1, decode=1) as cluster,
        router_beside(cluster, policy=PolicyConfig(disaggregation="always")) as router,
        AsyncClient(router.grpc or "") as client,
    ):
        measured = await measure(client, SMALL)
    # What the context does not hold is not asked for; a batch on one node is one point.
    prompts = [point.shape for point in measured.points if point.shape.num_prompt_tokens]
    assert prompts == [StepShape().with_prompt(0, tokens) for tokens in (4, 16, 64)]
    assert {point.shape.num_decoding for point in measured.points} >= {0, 1}
    assert measured.transfers is not None
    write(tmp_path / "p.json", measured)
    times = FittedTimes(read(tmp_path / "p.json"))
    assert times.step_s(prompts[-1]) > 0


async def _asked() -> Asked:
    async with (
        FakeCluster(prefill=1, decode=1) as cluster,
        router_beside(cluster) as router,
        AsyncClient(router.grpc or "") as client,
    ):
        answer = await client.complete([5, 6, 7], max_tokens=4, min_tokens=4)
    return Asked(0.0, 3, answer)


async def test_points_are_what_nodes_did() -> None:
    one = await _asked()

    def at(sent_s: float, node: str, prefill_s: float = 0.1) -> Asked:
        relay = replace(one.answer.relay, decode_node_id=node, prefill_s=prefill_s, ttft_s=1, e2e_s=3, tbt_mean_s=0.5)
        return Asked(sent_s, 100, replace(one.answer, relay=relay))

    assert prompt_points([at(0, "a", s) for s in (0.3, 0.1, 0.2)])[0].seconds == 0.2
    assert prompt_points([at(0, "a", 0)]) == []
    # Four on a at once, two on b of which one begins when the other ends: one at a time.
    points = decode_points([*(at(0, "a") for _ in range(4)), at(0, "b"), at(2, "b")])
    assert [(point.shape.num_decoding, point.seconds) for point in points] == [(4, 0.5), (1, 0.5)]
    assert [point.shape.num_kv_tokens for point in points] == [4 * 102, 102]


def _status(*nodes: tuple[str, str], num_running: int = 0) -> router_pb2.StatusResponse:
    status = router_pb2.StatusResponse(num_running=num_running)
    for state, device in nodes:
        status.nodes.add(state=state).node.device = device
    return status


def test_a_cluster_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(Unavailable, match="no node of the cluster is ready"):
        _described(_status(("lost: gone", "cpu")))
    with pytest.raises(Unavailable, match="has 2 requests, expected none"):
        _described(_status(("ready", "cpu"), num_running=2))
    with pytest.raises(BadConfig, match="the nodes run on cpu, cuda"):
        _described(_status(("ready", "cuda"), ("ready", "cpu")))
    assert _described(_status(("ready", "cpu"), ("lost", "cuda"))).device == "cpu"
