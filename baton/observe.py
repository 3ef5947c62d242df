"""One mechanism for observability: the stamps of a request's lifeline feed its relay, its log line and the metrics.

It owns no clock and writes nowhere by itself; prometheus-client is needed only where `RequestMetrics` is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.types import TransferReport

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# Upper bounds in seconds: fine where people wait for a first token, coarse where requests end.
_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Relay:
    """How a request ran. Durations in seconds, each measured by one clock; attempts counts the first run too."""

    prefill_node_id: str
    decode_node_id: str
    router_queue_s: float
    prefill_queue_s: float
    prefill_s: float
    ttft_s: float
    e2e_s: float
    tbt_mean_s: float
    tbt_max_s: float
    attempts: int
    num_tokens: int = 0
    num_cached_tokens: int = 0
    transfer: TransferReport | None = None

    def line(self) -> str:
        """One line for people and logs."""
        nodes = self.prefill_node_id
        if self.decode_node_id != self.prefill_node_id:
            nodes += f" -> {self.decode_node_id}"
        parts = [
            nodes or "no node",
            f"queue {_ms(self.router_queue_s + self.prefill_queue_s)}",
            f"prefill {_ms(self.prefill_s)}",
        ]
        if self.transfer is not None:
            moved = (
                f"transfer {_ms(self.transfer.exposed_s)} ({_size(self.transfer.num_bytes)} {self.transfer.transport}"
            )
            parts.append(moved + (", layer-wise)" if self.transfer.layerwise else ")"))
        parts += [
            f"TTFT {_ms(self.ttft_s)}",
            f"TBT {_ms(self.tbt_mean_s)} (max {_ms(self.tbt_max_s)})",
            f"E2E {_ms(self.e2e_s)}",
            f"{self.num_tokens} tokens",
        ]
        if self.attempts > 1:
            parts.append(f"{self.attempts} attempts")
        return " | ".join(parts)


class Lifeline:
    """The time stamps of one sequence, all by one clock. Written by its owner as things happen."""

    __slots__ = ("_cached_tokens", "_decode_id", "_ended_s", "_first_token_s", "_last_token_s", "_num_tokens",
                 "_prefill_id", "_prefill_queue_s", "_prefill_s", "_sent_s", "_tbt_max_s", "_transfer", "arrived_s",
                 "attempts")  # fmt: skip

    def __init__(self, arrived_s: float) -> None:
        self.arrived_s = arrived_s
        self.attempts = 1
        self._prefill_id = ""
        self._decode_id = ""
        self._sent_s: float | None = None
        self._first_token_s: float | None = None
        self._last_token_s = arrived_s
        self._ended_s: float | None = None
        self._num_tokens = 0
        self._tbt_max_s = 0.0
        self._prefill_queue_s = 0.0
        self._prefill_s = 0.0
        self._cached_tokens: int | None = None
        self._transfer: TransferReport | None = None

    def placed(self, prefill_id: str, decode_id: str) -> None:
        self._prefill_id, self._decode_id = prefill_id, decode_id

    def sent(self, now: float) -> None:
        """The prompt is on its way to a node; the first time counts."""
        if self._sent_s is None:
            self._sent_s = now

    def prefilled(self, queue_s: float, compute_s: float, num_cached_tokens: int) -> None:
        """What the prefill node says of the prompt phase. A rerun's cached tokens are not the client's."""
        self._prefill_queue_s, self._prefill_s = queue_s, compute_s
        if self._cached_tokens is None:
            self._cached_tokens = num_cached_tokens

    def transferred(self, report: TransferReport) -> None:
        self._transfer = report

    @property
    def is_transfer_known(self) -> bool:
        return self._transfer is not None

    def tokens(self, num_tokens: int, now: float) -> None:
        if self._first_token_s is None:
            self._first_token_s = now
        elif now - self._last_token_s > self._tbt_max_s:
            self._tbt_max_s = now - self._last_token_s
        self._last_token_s = now
        self._num_tokens += num_tokens

    def failed(self) -> None:
        self.attempts += 1
        self._transfer = None

    def ended(self, now: float) -> None:
        self._ended_s = now

    def relay(self) -> Relay:
        first = self._first_token_s
        ended = self._last_token_s if self._ended_s is None else self._ended_s
        intervals = self._num_tokens - 1
        return Relay(
            prefill_node_id=self._prefill_id,
            decode_node_id=self._decode_id,
            router_queue_s=(ended if self._sent_s is None else self._sent_s) - self.arrived_s,
            prefill_queue_s=self._prefill_queue_s,
            prefill_s=self._prefill_s,
            ttft_s=0.0 if first is None else first - self.arrived_s,
            e2e_s=ended - self.arrived_s,
            tbt_mean_s=(self._last_token_s - first) / intervals if first is not None and intervals > 0 else 0.0,
            tbt_max_s=self._tbt_max_s,
            attempts=self.attempts,
            num_tokens=self._num_tokens,
            num_cached_tokens=self._cached_tokens or 0,
            transfer=self._transfer,
        )


class RequestMetrics:
    """Counters and histograms over finished lifelines, on a registry of the caller's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Histogram

        def seconds(name: str, help_text: str) -> Histogram:
            return Histogram(f"baton_{name}_seconds", help_text, registry=registry, buckets=_LATENCY_BUCKETS_S)

        def total(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"baton_{name}", help_text, labels, registry=registry)

        self._outcomes = total("requests", "Sequences by terminal outcome and error code", "outcome", "code")
        self._prompt_tokens = total("prompt_tokens", "Prompt tokens of finished sequences")
        self._cached_tokens = total("cached_prompt_tokens", "Prompt tokens found in a prefix cache")
        self._generated_tokens = total("generated_tokens", "Tokens generated")
        self._reruns = total("reruns", "Attempts after the first, that is after a failure")
        self._transfer_bytes = total("transfer_bytes", "KV bytes handed over", "transport")
        self._queue = seconds("router_queue", "Arrival to the prompt's dispatch")
        self._prefill_queue = seconds("prefill_queue", "Wait in the prefill node's queue")
        self._prefill = seconds("prefill", "Prompt computation")
        self._exposed = seconds("transfer_exposed", "Transfer time after the end of the prompt computation")
        self._ttft = seconds("time_to_first_token", "Arrival to first token")
        self._tbt = seconds("time_between_tokens", "Mean time between tokens of a sequence")
        self._e2e = seconds("request_duration", "Arrival to the terminal outcome")

    def observe(self, outcome: str, code: str, relay: Relay, num_prompt_tokens: int) -> None:
        self._outcomes.labels(outcome, code).inc()
        self._generated_tokens.inc(relay.num_tokens)
        self._reruns.inc(relay.attempts - 1)
        self._e2e.observe(relay.e2e_s)
        if relay.transfer is not None:
            self._transfer_bytes.labels(relay.transfer.transport).inc(relay.transfer.num_bytes)
            self._exposed.observe(relay.transfer.exposed_s)
        if relay.num_tokens == 0:
            return
        self._prompt_tokens.inc(num_prompt_tokens)
        self._cached_tokens.inc(relay.num_cached_tokens)
        self._queue.observe(relay.router_queue_s)
        self._prefill_queue.observe(relay.prefill_queue_s)
        self._prefill.observe(relay.prefill_s)
        self._ttft.observe(relay.ttft_s)
        if relay.num_tokens > 1:
            self._tbt.observe(relay.tbt_mean_s)

    @staticmethod
    def gauge(registry: CollectorRegistry, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A gauge whose value is asked for at scrape time."""
        from prometheus_client import Gauge

        Gauge(f"baton_{name}", help_text, registry=registry).set_function(read)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _size(num_bytes: int) -> str:
    if num_bytes < 1 << 20:
        return f"{num_bytes / 1024:.0f} KiB"
    return f"{num_bytes / (1 << 20):.1f} MiB"
