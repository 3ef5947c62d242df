"""Traces: rings that stay bounded, clocks that are told apart, and a document whose slices say what was measured."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

import baton
from baton import errors
from baton.timeline import Timeline, Transfer, Write
from baton.v1 import router_pb2
from cli.trace import document_of, overlap_shares, write
from router.nodes.sessions import RoundTrip
from router.serve import Router
from tests.support import trace_reader
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside, until

SLOW = FakeConfig(step_s=0.005, prefill_token_s=0.002, transfer_s=0.01)


async def parts_of(router: Router, last_s: float = 0.0) -> list[router_pb2.ClusterTraceResponse]:
    assert router.grpc is not None

    def ask() -> list[router_pb2.ClusterTraceResponse]:
        with baton.Client(router.grpc or "") as client:
            return client.trace(last_s)

    return await asyncio.to_thread(ask)


async def ask(router: Router, count: int) -> None:
    assert router.grpc is not None
    async with baton.AsyncClient(router.grpc) as client:
        await asyncio.gather(*(client.complete([1, 2, i], max_tokens=6, seed=i) for i in range(count)))


def test_rings_are_bounded_and_forget_what_is_old() -> None:
    timeline = Timeline()
    for i in range(100_000):
        timeline.step(i, i + 1, 1, 0, (f"{j}" for j in range(i % 20)))
        timeline.write(Write("s", 0, 0, 1, 1, i, i + 1))
        timeline.joined("s", i)
        timeline.transfer(Transfer("s", "d", "shm", True, 1, i, i, i + 1))
    everything = timeline.since(float("-inf"))
    assert [len(x) for x in everything] == [8192, 2048, 16384, 2048]
    assert max(len(step.prompts) for step in everything.steps) == 8
    assert [step.started_s for step in timeline.since(99_999).steps] == [99_998, 99_999]


@pytest.mark.parametrize(("there_s", "asked_s", "answered_s"), [(0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (907.3, 4.0, 4.5)])
def test_the_error_of_an_offset_is_half_the_round_trip(there_s: float, asked_s: float, answered_s: float) -> None:
    trip = RoundTrip(asked_s, there_s, answered_s)
    # Whenever in between the other clock was read, the true offset is inside the bound.
    for read_s in (asked_s, (asked_s + answered_s) / 2, answered_s):
        assert abs((there_s - read_s) - trip.offset_s) <= trip.error_s + 1e-12


async def test_nodes_with_other_clocks_are_put_on_the_routers() -> None:
    async with FakeCluster() as cluster:
        for name, role, skew_s in (("p", "prefill", 5000.0), ("d", "decode", -700.0)):
            config = FakeConfig(**{f: getattr(SLOW, f) for f in ("step_s", "prefill_token_s", "transfer_s")},
                                clock_skew_s=skew_s)  # fmt: skip
            await cluster.add(name, baton.types.Role(role), config).start()
        async with router_beside(cluster) as router:
            await ask(router, 3)
            parts = await parts_of(router)
    assert [part.WhichOneof("message") for part in parts] == ["router", "node", "node"]
    by_id = {part.node.trace.node_id: part.node for part in parts[1:]}
    for name, skew_s in (("p", 5000.0), ("d", -700.0)):
        assert abs(by_id[name].clock_offset_s - skew_s) <= by_id[name].clock_error_s
    document = document_of(parts)
    assert document["otherData"]["nodes"]["p"]["clock_error_s"] > 0
    seen = trace_reader.read(document)
    assert len(seen.arrows) == 3
    assert all(a.category == "transfer" and b.category in ("decode", "mixed") for a, b in seen.arrows)
    assert seen.overlap() == pytest.approx(overlap_shares(document))
    times = [event["ts"] for event in document["traceEvents"] if "ts" in event]
    assert min(times) == 0
    assert max(times) < 60e6, "thousands of seconds between clocks do not show"
    requests = [event for event in document["traceEvents"] if event.get("cat") == "request"]
    assert len(requests) == 3
    for request in requests:
        stages = [e for e in document["traceEvents"] if e.get("cat") == "stage" and e["tid"] == request["tid"]]
        mine = [e for e in stages if request["ts"] - 1 <= e["ts"] <= request["ts"] + request["dur"]]
        assert sum(e["dur"] for e in mine) == pytest.approx(request["dur"], rel=1e-6)


def test_slices_of_a_row_do_not_overlap_and_the_share_is_the_reports() -> None:
    message = router_pb2.ClusterTraceResponse()
    trace = message.node.trace
    trace.node_id, trace.role = "p", 1
    spans = [(0.0, 0.9, 1.0), (0.5, 0.5, 0.8), (0.7, 1.4, 1.5), (1.0, 1.0, 1.2)]
    for i, (started_s, computed_s, ended_s) in enumerate(spans):
        trace.transfers.add(sequence_id=f"s{i}", started_s=started_s, computed_s=computed_s, ended_s=ended_s)
    document = document_of([message])
    by_row: dict[int, list[tuple[float, float]]] = {}
    for event in document["traceEvents"]:
        if event.get("cat") == "transfer":
            by_row.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(by_row) == 3
    for row in by_row.values():
        row.sort()
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(row))
    shares = overlap_shares(document)
    for i, (started_s, computed_s, ended_s) in enumerate(spans):
        assert shares[f"s{i}"] == pytest.approx(1 - (ended_s - computed_s) / (ended_s - started_s))


async def test_a_node_that_does_not_answer_is_named_and_the_rest_is_written(tmp_path: Path) -> None:
    async with FakeCluster(SLOW, prefill=1, decode=2) as cluster, router_beside(cluster) as router:
        await ask(router, 2)
        await cluster["decode-1"].die()
        await until(lambda: any(m.state.value == "lost" for m in router.dispatcher.nodes.members))
        path, said = tmp_path / "trace.json", Console(record=True, width=200, quiet=True)

        def fetch() -> None:
            assert router.grpc is not None
            with baton.Client(router.grpc) as client:
                write(client, 0.0, path, said)

        await asyncio.to_thread(fetch)
        document = json.loads(path.read_text())
        lost = [name for name, node in document["otherData"]["nodes"].items() if node["unreachable"]]
        assert len(lost) == 1
        assert lost[0] == cluster["decode-1"].address
        assert any(event.get("cat") == "prefill" for event in document["traceEvents"])


@pytest.mark.parametrize("last_s", [-1.0, float("nan"), float("inf")])
async def test_nonsense_is_refused(last_s: float) -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster) as router:
        with pytest.raises(errors.InvalidRequest, match="last_s"):
            await parts_of(router, last_s)
