"""The pictures of a plan as SVG: which designs meet the objectives, the fronts, latency against rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from loadgen import chart
from loadgen.chart import Line, Panel, Point
from loadgen.objectives import NINE
from planner.search.kind import Answer, Tried
from planner.search.plan import Plan
from planner.search.question import Column
from planner.search.trial import Trial

_FIGURES = (("TTFT", "TTFT_s", 1.0, "s"), ("TBT", "TBT_s", 1e3, "ms"), ("E2E", "E2E_s", 1.0, "s"))


def write(folder: Path, plan: Plan) -> tuple[Path, ...]:
    """Those that there is something to show of."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{plan.question.source.name} · {plan.question.model.name} · profile {plan.question.profile.value}"
    found = {"region.svg": region(plan, title), "front.svg": front(plan, title), "latency.svg": latency(plan, title)}
    paths = []
    for name, picture in found.items():
        path = folder / name
        path.write_text(picture, encoding="utf-8")
        paths.append(path)
    return tuple(paths)


def region(plan: Plan, title: str) -> str:
    """For each kind of split designs: those that were run at the best rate of the kind, and the edge of the budget. A
    design that met the objectives at a higher rate meets them here; one that missed at a lower one misses here."""
    panels = [_region(plan, answer, answer.best) for answer in plan.answers if answer.best and answer.kind.token]
    return chart.draw(f"designs that meet the objectives · {title}", panels)


def _region(plan: Plan, answer: Answer, best: Trial) -> Panel:
    met = [each for each in answer.tried if each.is_met and each.rate >= best.rate]
    missed = [each for each in answer.tried if not each.is_met and each.rate <= best.rate]
    prompt, token = (group.count for group in best.design)
    return Panel(
        f"{answer.kind.name} at {best.rate:g}/s: token machines",
        "prompt machines",
        "count",
        (
            Line("largest within the limits", _edge(answer.kind.columns(plan.question.limits))),
            Line("misses some", _places(missed), is_joined=False),
            Line("meets the objectives", _places(met), is_joined=False),
            Line("best", (Point(prompt, token, f"{best.rate:g}/s"),), is_joined=False),
        ),
    )


def _edge(columns: Iterable[Column]) -> tuple[Point, ...]:
    return tuple(Point(column.prompt, column.high) for column in columns)


def _places(tried: Iterable[Tried]) -> tuple[Point, ...]:
    return tuple(Point(*place) for place in sorted({(each.prompt, each.token) for each in tried}))


def front(plan: Plan, title: str) -> str:
    """The rate that money and power buy, by kind."""
    panels = [
        Panel("highest rate over cost", "$ an hour", "requests/s", _fronts(plan, lambda a: a.by_cost, _dollars)),
        Panel("highest rate over power", "power units", "requests/s", _fronts(plan, lambda a: a.by_power, _power)),
    ]
    return chart.draw(f"fronts · {title}", panels)


def _dollars(trial: Trial) -> float:
    return trial.design.dollars_per_hour


def _power(trial: Trial) -> float:
    return trial.design.power_units


def _fronts(
    plan: Plan, trials: Callable[[Answer], Iterable[Trial]], price: Callable[[Trial], float]
) -> tuple[Line, ...]:
    lines = []
    for answer in plan.answers:
        points = tuple(Point(price(trial), trial.rate) for trial in trials(answer))
        if points:
            lines.append(Line(answer.kind.name, points))
    return tuple(lines)


def latency(plan: Plan, title: str) -> str:
    """Of the best design of each kind; a panel for each figure of the nine objectives."""
    panels = []
    for name, metric, unit, said in _FIGURES:
        for share in sorted({share for figure, share, _ in NINE if figure == name.lower()}):
            part = f"p{share * 100:.0f}"
            lines = tuple(_latency(answer, metric, part, unit) for answer in plan.answers if answer.latencies)
            panels.append(Panel(f"{name} {part}", "requests/s", said, lines, is_log=True))
    return chart.draw(f"latency of the best designs · {title}", panels, columns=3)


def _latency(answer: Answer, metric: str, part: str, unit: float) -> Line:
    found = ((trial.rate, getattr(trial.summary.metrics[metric], part)) for trial in answer.latencies)
    return Line(answer.kind.name, tuple(Point(rate, value * unit) for rate, value in found if value is not None))
