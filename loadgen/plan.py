"""What `baton bench serve` was asked to send, checked, and the loads that it makes. Pure but for reading a trace."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from baton.errors import BadConfig
from loadgen import traces
from loadgen.load import Load, Request, closed, of_trace, poisson, replayed, same_size

_MAX_REQUESTS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes come from a trace or are all the same; each of ``rates`` and of ``streams`` makes a load."""

    trace: str = ""
    trace_from_s: float = 0.0
    scale: traces.Scale = field(default_factory=traces.Scale)
    prompt_tokens: int = 512
    output_tokens: int = 64
    # Open loops, requests a second.
    rates: tuple[float, ...] = ()
    # Closed loops, requests in flight.
    streams: tuple[int, ...] = ()
    # Arrivals of open loops by a Poisson process, not the trace's own.
    is_poisson: bool = False
    num_requests: int = 100
    # Open loops last that long, whatever their rate; None: they send num_requests.
    seconds: float | None = None
    # From the last request's due time on (a closed loop's beginning) until what is not answered is cut off.
    limit_s: float = 300.0
    seed: str = "0"

    def __post_init__(self) -> None:
        for name, value in (("--rate", self.rates), ("--streams", self.streams)):
            if any(not 0 < one < math.inf for one in value):
                raise BadConfig(f"{name} is {', '.join(map(str, value))}, expected numbers above 0", param=name)
        if not self.rates and not self.streams:
            raise BadConfig("nothing to send: give --rate (an open loop) or --streams (a closed loop), or both")
        if self.seconds is not None and not self.rates:
            raise BadConfig("--seconds is for open loops and needs --rate; --requests limits a closed loop")
        most = max([self.num_requests, *(self._count(rate) for rate in self.rates)])
        if not 1 <= most <= _MAX_REQUESTS:
            raise BadConfig(f"a load would have {most} requests, expected 1 to {_MAX_REQUESTS}")

    def loads(self, number: int = 0) -> tuple[Load, ...]:
        """The loads of one round. Rounds differ in Poisson arrivals alone: a trace has one. Raises BadConfig."""
        rows = traces.read(self.trace) if self.trace else ()
        loads = [self._open(rows, rate, f"{self.seed}/{rate:g}/{number}") for rate in self.rates]
        return (*loads, *(self._closed(rows, streams) for streams in self.streams))

    def _open(self, rows: tuple[traces.Row, ...], rate: float, seed: str) -> Load:
        count, name = self._count(rate), f"{self._sizes} {rate:g}/s"
        if not rows:
            requests = same_size(count, self.prompt_tokens, self.output_tokens)
            return poisson(name, requests, rate, self.limit_s, seed)
        chosen = traces.window(rows, self.trace_from_s, count)
        if self.is_poisson:
            return poisson(f"{name} poisson", of_trace(chosen, self.scale), rate, self.limit_s, seed)
        return replayed(name, chosen, self.scale, rate, self.limit_s)

    def _closed(self, rows: tuple[traces.Row, ...], streams: int) -> Load:
        requests: tuple[Request, ...]
        if rows:
            requests = of_trace(traces.window(rows, self.trace_from_s, self.num_requests), self.scale)
        else:
            requests = same_size(self.num_requests, self.prompt_tokens, self.output_tokens)
        return closed(f"{self._sizes} {streams} streams", requests, streams, self.limit_s)

    def _count(self, rate: float) -> int:
        return self.num_requests if self.seconds is None else max(1, round(rate * self.seconds))

    @property
    def _sizes(self) -> str:
        return self.trace or f"{self.prompt_tokens}+{self.output_tokens}"
