"""An advice as JSON, as rows of tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loadgen import chart
from loadgen.chart import Line, Panel, Point
from planner.advise.advice import Advice, Option
from planner.advise.cluster import PoolUse
from planner.advise.predict import Predicted
from planner.advise.setup import Setup

_PARTS = ("mean", "p50", "p90", "p99")
COLUMNS = (
    "change", "nodes", "TTFT p50 / p99 ms", "TBT p50 / p99 ms", "E2E p50 / p99 ms", "requests/s", "tokens/s", "W",
    "$/hour", "pays",
)  # fmt: skip


def as_json(advice: Advice, pools: Sequence[PoolUse], commands: Sequence[Sequence[str]]) -> dict[str, object]:
    """``commands`` of the options that pay, in their order."""
    load = advice.load
    told = dict(zip((option.about for option in advice.best), map(list, commands), strict=True))
    return {
        "load": {
            "seconds": load.seconds,
            "requests": load.count,
            "rate": load.rate,
            "prompt_tokens_mean": load.prompts.mean,
            "output_tokens_mean": load.outputs.mean,
            "cached_share": load.cached_share,
            "refused": load.num_refused,
            "failed": load.num_failed,
        },
        "setup": _setup(advice.setup),
        "pools": [
            {
                "pool": pool.role.value,
                "nodes": pool.num_nodes,
                "busy_share": pool.busy_share,
                "kv_share": pool.kv_share,
                "steps": {
                    phase: {"count": count, "mean_s": seconds, "mean_sequences": sequences}
                    for phase, (count, seconds, sequences) in pool.steps.items()
                },
            }
            for pool in pools
        ],
        "model_fits": advice.does_fit,
        "fit": [
            {"figure": fit.name, "measured": fit.measured, "predicted": fit.predicted, "error": fit.error,
             "limit": fit.limit}
            for fit in advice.fits
        ],
        "missed_today": list(advice.missed),
        "today": _predicted(advice.today),
        "options": [
            {"change": option.about, "setup": _setup(option.setup), "pays": option.pays, "reason": option.reason,
             "commands": told.get(option.about, []), **_predicted(option.predicted)}
            for option in advice.options
        ],
        "best": [option.about for option in advice.best],
        "warnings": list(advice.warnings),
    }  # fmt: skip


def _setup(setup: Setup) -> dict[str, object]:
    return {name: getattr(setup, name) for name in setup.__slots__}


def _predicted(found: Predicted) -> dict[str, object]:
    figures = {f"{name}_{part}": getattr(of, part) for name, of in found.metrics.items() for part in _PARTS}
    return {
        **figures, "requests_per_s": found.requests_s, "tokens_per_s": found.tokens_s, "left_out": found.num_left_out,
        "watts": found.watts, "joules_per_token": found.joules_per_token, "dollars_per_hour": found.dollars_per_hour,
    }  # fmt: skip


def rows(advice: Advice) -> list[tuple[str, ...]]:
    """Of COLUMNS: today's, then each option's."""
    today = _row("today", advice.setup, advice.today, "")
    return [today, *(_row(o.about, o.setup, o.predicted, _pays(o)) for o in advice.options)]


def _pays(option: Option) -> str:
    return f"yes: {option.reason}" if option.pays else option.reason


def _row(about: str, setup: Setup, found: Predicted, pays: str) -> tuple[str, ...]:
    def both(metric: str) -> str:
        values = (getattr(found.metrics[metric], part) for part in ("p50", "p99"))
        return " / ".join("-" if value is None else f"{1e3 * value:,.4g}" for value in values)

    return (
        about, str(setup.num_nodes), both("TTFT_s"), both("TBT_s"), both("E2E_s"), f"{found.requests_s:.3g}",
        f"{found.tokens_s:,.4g}", "-" if found.watts is None else f"{found.watts:,.0f}",
        f"{found.dollars_per_hour:.2f}" if found.dollars_per_hour else "-", pays,
    )  # fmt: skip


def picture(advice: Advice) -> str:
    """First token against the time between tokens, of today's cluster and of its neighbours."""
    paying = [option for option in advice.options if option.pays]
    others = [option for option in advice.options if not option.pays]
    panels = []
    for part in ("p50", "p99"):
        measured = {fit.name: fit.measured for fit in advice.fits}
        seen = tuple(measured.get(f"{name} {part}") for name in ("TTFT_s", "TBT_s"))
        lines = [
            Line("does not pay", _points(others, part, has_labels=False), is_joined=False),
            Line("pays", _points(paying, part, has_labels=True), is_joined=False),
            Line("today, simulated", tuple(_point(advice.today, part)), is_joined=False),
        ]
        if seen[0] and seen[1]:
            lines.append(Line("today, measured", (Point(1e3 * seen[0], 1e3 * seen[1]),), is_joined=False))
        panels.append(Panel(f"TBT over TTFT, {part}", "TTFT ms", "TBT ms", tuple(lines), is_log=True, is_log_x=True))
    return chart.draw(f"what one change would do · {advice.setup.name}", panels)


def _points(options: Sequence[Option], part: str, *, has_labels: bool) -> tuple[Point, ...]:
    """Changes that do the same share a point."""
    names: dict[Point, list[str]] = {}
    for option in options:
        for point in _point(option.predicted, part):
            names.setdefault(point, []).append(option.about)
    return tuple(Point(at.x, at.y, ", ".join(said) if has_labels else "") for at, said in names.items())


def _point(found: Predicted, part: str) -> Iterator[Point]:
    x, y = (getattr(found.metrics[name], part) for name in ("TTFT_s", "TBT_s"))
    if x is not None and y is not None:
        yield Point(1e3 * x, 1e3 * y)
