"""Profiles for tests, and the absurd one of a cluster that is ten times as fast."""

from __future__ import annotations

from dataclasses import replace

from baton.types import KvLayout
from engine.step import StepShape
from planner.fitted import NO_PACE, Line, Point, RequestTimes, Transfers
from planner.measured import Measured
from planner.overhead import NO_OVERHEAD

LINE = Line(0.01, 1e-4, 0.0, 1e-3, 1e-6)
MEASURED = Measured(
    model="m", device="cpu", software_version="1", kv_layout=KvLayout(4, 500, 2, 16, 64, "float32"), line=LINE,
    points=tuple(
        Point(shape, LINE.step_s(shape))
        for shape in (StepShape().with_prompt(0, 100), StepShape(0, 0, 1, 100), StepShape(0, 0, 4, 900))
    ),
    transfers=Transfers(0.001, 1e9), requests=RequestTimes(0.01, 0.001),
)  # fmt: skip
_TIMES_AS_FAST = 10


def too_fast(measured: Measured) -> Measured:
    line = Line(*(getattr(measured.line, name) / _TIMES_AS_FAST for name in Line.__slots__))
    requests, moved = measured.requests, measured.transfers
    return replace(
        measured,
        line=line,
        pace=NO_PACE,
        points=tuple(replace(point, seconds=point.seconds / _TIMES_AS_FAST) for point in measured.points),
        requests=RequestTimes(requests.fixed_s / _TIMES_AS_FAST, requests.message_s / _TIMES_AS_FAST),
        overhead=NO_OVERHEAD,
        transfers=None if moved is None else Transfers(moved.latency_s / _TIMES_AS_FAST, moved.bytes_s),
    )
