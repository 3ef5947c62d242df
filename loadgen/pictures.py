"""The pictures of a comparison: latency against rate, and the frontier of two figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loadgen import chart
from loadgen.chart import Line, Panel, Point
from loadgen.compare import Comparison
from loadgen.figures import Figures
from loadgen.load import Load

_Value = Callable[[Figures], float | None]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


# Title, unit, value, whether the axis is logarithmic.
_PANELS: tuple[tuple[str, str, _Value, bool], ...] = (
    ("TTFT p50", "s", lambda f: f.ttft_s.p50, True),
    ("TTFT p99", "s", lambda f: f.ttft_s.p99, True),
    ("gap between tokens p50", "ms", lambda f: _ms(f.gap_s.p50), True),
    ("gap between tokens p99", "ms", lambda f: _ms(f.gap_s.p99), True),
    ("E2E p90", "s", lambda f: f.e2e_s.p90, True),
    ("goodput", "requests/s", lambda f: _goodput(f), False),
)


def _goodput(figures: Figures) -> float | None:
    return figures.tolerable_requests_s if figures.goodput_requests_s is None else figures.goodput_requests_s


def against_load(comparison: Comparison, title: str) -> str:
    """A line for each server: figures over the rate of open loops, or over the streams of closed ones if there is no
    open one."""
    loads: dict[str, Load] = {run.load: run.outcome.load for run in comparison.runs}
    is_open = any(load.rate for load in loads.values())
    x_label = "requests/s offered" if is_open else "requests in flight"
    places = {name: load.rate if is_open else float(load.streams) for name, load in loads.items()}
    cells = {cell: found for cell, found in comparison.pooled().items() if places[cell[1]]}
    panels = [
        Panel(heading, x_label, unit, _lines(cells, places, value), is_log) for heading, unit, value, is_log in _PANELS
    ]
    return chart.draw(title, panels)


def _lines(cells: Mapping[tuple[str, str], Figures], places: Mapping[str, float], value: _Value) -> tuple[Line, ...]:
    points: dict[str, list[Point]] = {}
    for (target, load), figures in cells.items():
        if (y := value(figures)) is not None:
            points.setdefault(target, []).append(Point(places[load], y))
    return tuple(Line(name, tuple(sorted(found, key=lambda p: p.x))) for name, found in points.items())


def frontier(comparison: Comparison, title: str) -> str:
    """For each load a panel: TTFT p99 over gap p99, a point for each server, its tokens/s beside it."""
    by_load: dict[str, list[Line]] = {}
    for (target, load), figures in comparison.pooled().items():
        gap, ttft = _ms(figures.gap_s.p99), figures.ttft_s.p99
        if gap is not None and ttft is not None:
            point = Point(gap, ttft, f"{figures.tokens_s:.0f}")
            by_load.setdefault(load, []).append(Line(target, (point,)))
    panels = [
        Panel(
            f"{load}: TTFT p99", "gap between tokens p99, ms; beside a point: tokens/s", "s", tuple(lines), True, True
        )
        for load, lines in by_load.items()
    ]
    return chart.draw(title, panels)
