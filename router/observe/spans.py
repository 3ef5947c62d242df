"""Makes OpenTelemetry spans from the lifelines of ended sequences. Off by default; extra `otel`.

Names and attributes follow the semantic conventions for generative AI (in development), with `baton.` for others. The
OTEL_* variables of the SDK decide where spans go. Prompts and answers are not included.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

from baton.clock import MonotonicClock
from baton.errors import BadConfig
from router.dispatch.records import Ended, Origin
from router.flow.messages import OutcomeKind
from router.observe.history import stages

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

_CLOSE_TIMEOUT_S = 2.0


class Spans:
    """Receives ended sequences and makes spans. ``provider`` exports them; by default over OTLP/HTTP as OTEL_* say."""

    def __init__(self, router_id: str, provider: TracerProvider | None = None) -> None:
        try:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            self._provider = provider or _otlp(router_id)
        except ImportError as error:
            raise _not_installed(error) from error
        self._tracer = self._provider.get_tracer("baton.router")
        self._propagator = TraceContextTextMapPropagator()

    def on_ended(self, ended: Ended) -> None:
        """The wall clock is read once; all other times are relative to it, from the lifeline."""
        from opentelemetry import trace

        relay, origin = ended.relay, ended.origin
        arrived_ns = time.time_ns() - _ns(relay.e2e_s)
        span = self._tracer.start_span(
            f"{_operation(origin)} {origin.model}".rstrip(),
            context=self._parent(origin),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(ended),
            start_time=arrived_ns,
        )
        if span.is_recording():
            self._add_details(span, ended, arrived_ns)
        span.end(end_time=arrived_ns + _ns(relay.e2e_s))

    def _add_details(self, span: Span, ended: Ended, arrived_ns: int) -> None:
        from opentelemetry import trace

        relay, error = ended.relay, ended.outcome.error
        if error is not None and ended.outcome.kind is not OutcomeKind.CANCELLED:
            span.set_status(trace.Status(trace.StatusCode.ERROR, error.message))
        for name, at_s in relay.stamps:
            span.add_event(name, timestamp=arrived_ns + _ns(at_s))
        here = trace.set_span_in_context(span)
        for name, start_s, length_s in stages(relay):
            child = self._tracer.start_span(name, context=here, start_time=arrived_ns + _ns(start_s))
            if name == "transfer" and relay.transfer is not None:
                report = relay.transfer
                child.set_attributes({
                    "baton.transfer.transport": report.transport,
                    "baton.transfer.layerwise": report.layerwise,
                    "baton.transfer.bytes": report.num_bytes,
                    "baton.transfer.total_s": report.total_s,
                    "baton.transfer.exposed_s": report.exposed_s,
                    "baton.transfer.retransmits": report.retransmits,
                })  # fmt: skip
            child.end(end_time=arrived_ns + _ns(start_s + length_s))

    def _parent(self, origin: Origin) -> Context:
        """The caller's span, if the request has a valid W3C Trace Context; else a new trace begins."""
        from opentelemetry.context import Context

        carrier = {"traceparent": origin.traceparent, "tracestate": origin.tracestate}
        return self._propagator.extract({k: v for k, v in carrier.items() if v}, context=Context())

    async def close(self) -> None:
        """Export the remaining spans, within a bounded time."""
        await asyncio.to_thread(self._provider.force_flush, int(_CLOSE_TIMEOUT_S * 1000))
        await asyncio.to_thread(self._provider.shutdown)


def check_installed() -> None:
    """Raises BadConfig if the extra is missing, as creating Spans would."""
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk  # noqa: F401 - whether they can be is the question
    except ImportError as error:
        raise _not_installed(error) from error


def _not_installed(error: ImportError) -> BadConfig:
    packages = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
    return BadConfig(f"--otel needs OpenTelemetry ({error}): pip install {packages}", param="otel")


def _otlp(router_id: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from router.observe.span_export import ReportingExporter

    # Resource.create adds OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME; the latter names the service.
    attributes = {"service.instance.id": router_id}
    if "OTEL_SERVICE_NAME" not in os.environ:
        attributes["service.name"] = "baton-router"
    provider = TracerProvider(resource=Resource.create(attributes))
    # Bounded: spans beyond its queue are dropped, so the router never waits.
    provider.add_span_processor(BatchSpanProcessor(ReportingExporter(OTLPSpanExporter(), MonotonicClock())))
    return provider


def _operation(origin: Origin) -> str:
    return "chat" if origin.is_chat else "text_completion"


def _attributes(ended: Ended) -> dict[str, AttributeValue]:
    relay, sampling, origin = ended.relay, ended.sampling, ended.origin
    found: dict[str, AttributeValue] = {
        "gen_ai.operation.name": _operation(origin),
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": origin.model,
        "gen_ai.response.model": origin.model,
        "gen_ai.response.id": ended.request_id,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.usage.input_tokens": ended.num_prompt_tokens,
        "gen_ai.usage.output_tokens": relay.num_tokens,
        "gen_ai.usage.cache_read.input_tokens": relay.num_cached_tokens,
        "baton.choice": ended.choice,
        "baton.outcome": ended.outcome.kind.value,
        "baton.attempts": relay.attempts,
        "baton.prefill_node": relay.prefill_node_id,
        "baton.decode_node": relay.decode_node_id,
        "baton.placement": relay.placement_reason,
    }
    if sampling.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = sampling.max_tokens
    if sampling.top_k:
        found["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None and sampling.seed < 1 << 63:
        found["gen_ai.request.seed"] = sampling.seed
    if objectives := relay.objectives:
        found["baton.slo_met"] = all(objectives.values())
    if relay.num_tokens:
        found["gen_ai.response.time_to_first_chunk"] = relay.ttft_s
    if ended.outcome.finish_reason is not None:
        found["gen_ai.response.finish_reasons"] = [ended.outcome.finish_reason.value]
    if ended.outcome.error is not None:
        found["error.type"] = ended.outcome.error.code
    return found


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
