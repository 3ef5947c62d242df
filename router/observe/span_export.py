"""Exports spans to a collector and logs, at a limited rate, whether they arrive. Needs the extra `otel`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from baton.clock import Clock
from baton.errors import shortened

_log = logging.getLogger("baton.router.spans")
# Interval of the log line about an unreachable collector.
REMIND_S = 600.0
_MAX_REASON_CHARS = 300
# These loggers report every attempt, and every span that finds the queue full.
_CHATTY = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")


class ReportingExporter(SpanExporter):
    """Forwards to ``inner`` and logs its state: the first failure, a reminder at intervals, and the recovery.

    It is called by one thread at a time. Messages of the SDK's own loggers become the reason in these lines.
    """

    def __init__(self, inner: SpanExporter, clock: Clock, remind_s: float = REMIND_S) -> None:
        self._inner = inner
        self._clock = clock
        self._remind_s = remind_s
        self._num_lost = 0
        self._failing_since_s = 0.0
        self._told_s: float | None = None
        self._reason = ""
        for name in _CHATTY:
            logging.getLogger(name).addFilter(self._keep_reason)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._reason = ""
        result = self._inner.export(spans)
        now = self._clock.now()
        if result is SpanExportResult.SUCCESS:
            self._arrived(now)
        else:
            self._failed(len(spans), now)
        return result

    def _arrived(self, now: float) -> None:
        if self._told_s is not None:
            away_s = now - self._failing_since_s
            _log.info("spans reach the collector again after %.0f s; %d were lost", away_s, self._num_lost)
        self._num_lost, self._told_s = 0, None

    def _failed(self, num_spans: int, now: float) -> None:
        if not self._num_lost:
            self._failing_since_s = now
        self._num_lost += num_spans
        if self._told_s is None or now - self._told_s >= self._remind_s:
            self._told_s = now
            _log.warning(
                "spans do not reach the collector, %d are lost so far (%s); requests go on without. Is a collector at "
                "OTEL_EXPORTER_OTLP_ENDPOINT?",
                self._num_lost,
                self._reason or "it gives no reason",
            )

    def _keep_reason(self, record: logging.LogRecord) -> bool:
        # The first attempt's message is more precise than the summary after the last one.
        self._reason = self._reason or shortened(record.getMessage(), _MAX_REASON_CHARS)
        return False

    def shutdown(self) -> None:
        self._inner.shutdown()
        for name in _CHATTY:
            logging.getLogger(name).removeFilter(self._keep_reason)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)
