"""A run as a picture: how long requests took, and how busy the machines were."""

from __future__ import annotations

from collections.abc import Iterable

from baton.types import Role
from loadgen import chart
from loadgen.chart import Line, Panel, Point
from planner.results import MachineUse, Run
from planner.uncontended import measured, percentile

# Of each line.
_NUM_POINTS = 50


def draw(run: Run) -> str:
    found = [measured(served, run.profile) for served in run.served if served.is_whole]
    times = {
        "TTFT": [each.ttft_s for each in found],
        "TBT": [each.tbt_s for each in found if each.tbt_s is not None],
        "E2E": [each.e2e_s for each in found],
    }
    panels = [
        Panel(f"{name} of requests: share that took less", "seconds", "%", (_shares(name, values),), is_log_x=True)
        for name, values in times.items()
    ]
    lines = tuple(
        _busy(f"busy {role.value} machines", uses, run.ended_s)
        for role in Role
        if (uses := [use for use in run.machines if use.role is role])
    )
    panels.append(Panel("machines, busiest first: time in steps", "machine", "%", lines))
    title = f"{run.design.name} · {run.workload.name} · profile {run.profile.value}"
    return chart.draw(title, panels)


def _shares(name: str, values: Iterable[float]) -> Line:
    ordered = sorted(values)
    shares = [i / (_NUM_POINTS - 1) for i in range(_NUM_POINTS)] if ordered else []
    return Line(name, tuple(Point(percentile(ordered, share), 100 * share) for share in shares))


def _busy(name: str, uses: Iterable[MachineUse], seconds: float) -> Line:
    shares = sorted((use.prompt_s + use.decode_s + use.mixed_s for use in uses), reverse=True)
    return Line(name, tuple(Point(i, 100 * share / seconds) for i, share in enumerate(shares, start=1) if seconds))
