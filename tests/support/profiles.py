"""Profiles for tests, and the absurd one of a cluster that is ten times as fast."""

from __future__ import annotations

from dataclasses import replace

from planner.fitted import Line, RequestTimes, Transfers
from planner.measured import Measured

_TIMES_AS_FAST = 10


def too_fast(measured: Measured) -> Measured:
    line = Line(*(getattr(measured.line, name) / _TIMES_AS_FAST for name in Line.__slots__))
    requests, moved = measured.requests, measured.transfers
    return replace(
        measured,
        line=line,
        points=tuple(replace(point, seconds=point.seconds / _TIMES_AS_FAST) for point in measured.points),
        requests=RequestTimes(requests.fixed_s / _TIMES_AS_FAST, requests.message_s / _TIMES_AS_FAST),
        transfers=None if moved is None else Transfers(moved.latency_s / _TIMES_AS_FAST, moved.bytes_s),
    )
