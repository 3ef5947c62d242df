"""OpenTelemetry spans: one tree per sequence, the caller's trace continued, the names of the GenAI conventions."""

from __future__ import annotations

import asyncio
import gzip
import socket
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import httpx
import pytest
from grpc import aio
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from baton import errors
from baton.v1 import router_pb2, router_pb2_grpc
from router.config import RouterConfig
from router.observe.span_export import ReportingExporter
from router.observe.spans import Spans
from router.serve import Router, running
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import quick, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
BODY = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0.5, "seed": 7, "ignore_eos": True}


class Run:
    """A router beside two fake nodes, and what it exported."""

    def __init__(self, router: Router, exporter: InMemorySpanExporter) -> None:
        self.router = router
        self._exporter = exporter

    async def spans(self) -> tuple[list[ReadableSpan], list[ReadableSpan]]:
        """Those of sequences and those of stages; there is at least one."""
        await until(self._exporter.get_finished_spans)
        found = self._exporter.get_finished_spans()
        return [s for s in found if s.kind is SpanKind.SERVER], [s for s in found if s.kind is not SpanKind.SERVER]

    async def post(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.router.http or "") as client:
            return await client.post("/v1/completions", json=body, headers=headers)


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with FakeCluster(FakeConfig(transfer_s=0.005), prefill=1, decode=1) as cluster:
        config = quick(RouterConfig(nodes=cluster.addresses))
        async with running(config, Spans("test", provider)) as router:
            await until(lambda: all(m.is_up for m in router.dispatcher.nodes.members))
            yield Run(router, exporter)


async def test_a_sequence_is_a_tree_of_its_stages_by_the_conventions(run: Run) -> None:
    assert (await run.post(BODY)).status_code == 200
    (root,), stages = await run.spans()
    assert root.name == "text_completion fake"
    assert root.parent is None
    assert root.attributes is not None
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("length",),
        "baton.prefill_node": "prefill-0",
        "baton.decode_node": "decode-0",
        "baton.placement": "pools",
    }
    assert dict(root.attributes) | expected == dict(root.attributes)
    assert {"tokenize", "placement", "reserve", "transfer", "decode"} <= {s.name for s in stages}
    assert root.context is not None
    assert all(s.parent is not None and s.parent.span_id == root.context.span_id for s in stages)
    ordered = sorted(stages, key=lambda s: s.start_time or 0)
    assert ordered[0].start_time == root.start_time
    assert abs((ordered[-1].end_time or 0) - (root.end_time or 0)) < 1000, "stages fill the span"
    events = [event.name for event in root.events]
    assert events[0] == "arrived"
    assert "first_token" in events


@pytest.mark.parametrize("face", ["http", "grpc"])
async def test_the_callers_trace_goes_on(run: Run, face: str) -> None:
    if face == "http":
        await run.post(BODY, traceparent=TRACEPARENT, tracestate="vendor=1")
    else:
        async with aio.insecure_channel(run.router.grpc or "") as channel:
            request = router_pb2.GenerateRequest(prompt_token_ids=router_pb2.TokenIds(token_ids=[1, 2, 3]))
            metadata = (("traceparent", TRACEPARENT), ("tracestate", "vendor=1"))
            async for _ in router_pb2_grpc.RouterStub(channel).Generate(request, metadata=metadata):
                pass
    (root,), _ = await run.spans()
    assert root.context is not None
    assert root.parent is not None
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.context.trace_state.get("vendor") == "1"


@pytest.mark.parametrize("bad", ["", "00-zz-zz-01", "x" * 5000, f"00-{'0' * 32}-{PARENT}-01"])
async def test_nonsense_begins_a_trace_of_its_own(run: Run, bad: str) -> None:
    assert (await run.post(BODY, traceparent=bad)).status_code == 200
    (root,), _ = await run.spans()
    assert root.parent is None


async def test_a_caller_that_does_not_sample_gets_no_spans(run: Run) -> None:
    await run.post(BODY, traceparent=f"00-{TRACE}-{PARENT}-00")
    await run.post({**BODY, "seed": 8})
    roots, _ = await run.spans()
    assert [r.attributes["gen_ai.request.seed"] for r in roots if r.attributes] == [8]


async def test_every_choice_is_a_span_and_failures_say_why(run: Run) -> None:
    await run.post({**BODY, "n": 2})
    await until(lambda: run.router.dispatcher.scheduler.num_in_flight == 0)
    roots, _ = await run.spans()
    assert sorted(r.attributes["baton.choice"] for r in roots if r.attributes) == [0, 1]
    assert (await run.post({**BODY, "max_tokens": 4000, "timeout": 0.05})).status_code >= 400
    await until(lambda: run.router.dispatcher.scheduler.num_in_flight == 0)
    roots, _ = await run.spans()
    failed = [r for r in roots if r.status.status_code is StatusCode.ERROR]
    assert [r.attributes["error.type"] for r in failed if r.attributes] == ["DeadlineExceeded"]


async def test_without_the_extra_the_start_stops_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(errors.BadConfig, match="pip install opentelemetry-sdk"):
        async with running(RouterConfig(nodes=("127.0.0.1:1",), otel=True)):
            pass


class Collector(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP."""

    taken: ClassVar[list[ExportTraceServiceRequest]] = []

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["content-length"]))
        self.taken.append(ExportTraceServiceRequest.FromString(gzip.decompress(body) if body[:1] == b"\x1f" else body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


async def test_spans_go_out_over_otlp_before_the_router_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        async with (
            FakeCluster(mixed=1) as cluster,
            running(quick(RouterConfig(nodes=cluster.addresses, otel=True, router_id="r-1"))) as router,
        ):
            await until(lambda: router.dispatcher.is_ready)
            async with httpx.AsyncClient(base_url=router.http or "") as client:
                assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        (resource,) = {r.SerializeToString(): r for x in Collector.taken for r in x.resource_spans}.values()
        said = {a.key: a.value.string_value for a in resource.resource.attributes}
        assert (said["service.name"], said["service.instance.id"]) == ("baton-router", "r-1")
        assert "text_completion fake" in [s.name for scope in resource.scope_spans for s in scope.spans]
    finally:
        await asyncio.to_thread(server.shutdown)
        thread.join(5)
        server.server_close()


class Script(SpanExporter):
    """Exports as told."""

    def __init__(self) -> None:
        self.result = SpanExportResult.FAILURE

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self.result

    def shutdown(self) -> None:
        pass


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s


def test_a_collector_that_is_away_is_told_of_once_then_seldom_and_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner, clock = Script(), Hand()
    exporter = ReportingExporter(inner, clock, remind_s=600)
    span = TracerProvider().get_tracer("test").start_span("x")
    assert isinstance(span, ReadableSpan)
    with caplog.at_level("INFO"):
        for _ in range(70):
            exporter.export([span, span])
            clock.now_s += 11
        assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]
        assert "2 are lost so far" in caplog.messages[0]
        inner.result = SpanExportResult.SUCCESS
        exporter.export([span])
        exporter.export([span])
    assert caplog.messages[2:] == ["spans reach the collector again after 770 s; 140 were lost"]
    exporter.shutdown()


def test_what_the_exporter_itself_says_is_the_reason_in_our_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/v1/traces"
    exporter = ReportingExporter(OTLPSpanExporter(address), Hand())
    span = TracerProvider().get_tracer("test").start_span("x")
    assert isinstance(span, ReadableSpan)
    try:
        assert exporter.export([span]) is SpanExportResult.FAILURE
    finally:
        exporter.shutdown()
    (line,) = caplog.records
    assert line.name == "baton.router.spans"
    assert "refused" in line.getMessage()


async def test_a_collector_that_is_gone_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    async with asyncio.timeout(30):
        async with (
            FakeCluster(mixed=1) as cluster,
            running(quick(RouterConfig(nodes=cluster.addresses, otel=True))) as router,
        ):
            await until(lambda: router.dispatcher.is_ready)
            async with httpx.AsyncClient(base_url=router.http or "") as client:
                assert (await client.post("/v1/completions", json=BODY)).status_code == 200
