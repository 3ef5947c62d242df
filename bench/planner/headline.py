"""The Splitwise paper's headline comparison: the highest rate of each kind of design for the power and for the cost of
40 DGX H100, and the least power and cost that carry the rate of these as mixed machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner import machines, models
from planner.results import Profile
from planner.search.kind import Answer
from planner.search.plan import search
from planner.search.question import Goal, Kind, Limits, Question, Range
from planner.search.source import Redrawn
from planner.workload import named

_MODEL = models.BUILT_IN["bloom-176b"]
_TENSOR_PARALLEL = 8
# By trace: prompt and token machines of the paper for the same power and for the same cost.
_PAPER = {
    "conv": {
        "AA": ("45, 25", "51, 35"), "HH": ("25, 15", "25, 15"),
        "HA": ("25, 26", "30, 21"), "HHcap": ("25, 21", "30, 10"),
    },
    "code": {
        "AA": ("55, 15", "66, 20"), "HH": ("35, 5", "35, 5"),
        "HA": ("35, 8", "35, 10"), "HHcap": ("35, 7", "35, 7"),
    },
}  # fmt: skip
_BASELINES = {"A100": "Baseline-A100", "H100": "Baseline-H100"}

# What is asked for each trace: the highest rates for the power and for the cost of so many H100, and the least power
# and cost for the rate of these as mixed machines.
SAME, LEAST = ("same power", "same cost"), ("least power", "least cost")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """Of a comparison; the paper's, if nothing else is said."""

    num_h100: int = 40
    traces: tuple[str, ...] = ("conv", "code")
    # Of the drawn trace.
    seconds: float = 60.0
    rate_step: float = 1.0
    # Every so many prompt machines are tried.
    prompt_step: int = 1
    compared: tuple[str, ...] = (*SAME, *LEAST)


def kinds() -> dict[str, Kind]:
    known = machines.catalogue()
    a100, h100, capped = known["a100-80gb"], known["h100-80gb"], known["h100-80gb-pcap"]
    return {
        "Baseline-A100": Kind(a100, None), "Baseline-H100": Kind(h100, None), "AA": Kind(a100, a100),
        "HH": Kind(h100, h100), "HA": Kind(h100, a100), "HHcap": Kind(h100, capped),
    }  # fmt: skip


def table(profile: Profile, scale: Scale, workers: int) -> Iterator[list[Row]]:
    """The rows of one question after another."""
    h100 = machines.catalogue()["h100-80gb"]
    num_h100, step = scale.num_h100, scale.prompt_step
    budgets = {
        "same power": Limits(power_units=num_h100 * h100.power_units, prompt_step=step),
        "same cost": Limits(dollars_per_hour=num_h100 * h100.machine_dollars_per_hour, prompt_step=step),
    }
    # For the same rate of the weakest machines.
    enough = Limits(machines=Range(1, 5 * num_h100), prompt_step=step)
    for trace in scale.traces:
        baseline: Answer | None = None
        for compared in (each for each in SAME if each in scale.compared):
            found = _answers(_question(profile, trace, scale, budgets[compared]), workers)
            baseline = found[_BASELINES["H100"]]
            yield _rows(profile, trace, compared, found)
        goals = [Goal(compared.removeprefix("least ")) for compared in LEAST if compared in scale.compared]
        if goals and baseline is None:
            # Nothing else was asked for: these machines alone.
            alone = replace(_question(profile, trace, scale, budgets[SAME[0]]), kinds=(kinds()[_BASELINES["H100"]],))
            (baseline,) = search(alone).answers
        rate = None if baseline is None or baseline.best is None else baseline.best.rate
        for goal in () if rate is None else goals:
            found = _answers(_question(profile, trace, scale, enough, goal, rate), workers)
            yield _rows(profile, trace, f"least {goal.value}", found)


def _question(
    profile: Profile, trace: str, scale: Scale, limits: Limits, goal: Goal = Goal.THROUGHPUT, rate: float | None = None
) -> Question:
    source = Redrawn(named(trace), scale.seconds, seed=0)
    return Question(
        source, profile, _MODEL, _TENSOR_PARALLEL, machines.catalogue(), tuple(kinds().values()), goal, rate, limits,
        rate_step=scale.rate_step,
    )  # fmt: skip


def _answers(question: Question, workers: int) -> dict[str, Answer]:
    return dict(zip(kinds(), search(question, workers).answers, strict=True))


def _rows(profile: Profile, trace: str, compared: str, answers: Mapping[str, Answer]) -> list[Row]:
    return [_row(profile, trace, compared, name, answers) for name in answers]


def _row(profile: Profile, trace: str, compared: str, name: str, answers: Mapping[str, Answer]) -> Row:
    answer = answers[name]
    best = answer.best
    row: Row = {"profile": profile.value, "trace": trace, "compared": compared, "design": name}
    if name in _PAPER[trace] and compared.startswith("same"):
        row["paper"] = _PAPER[trace][name][compared == "same cost"]
    if best is not None:
        row |= {
            "machines": ", ".join(str(group.count) for group in best.design), "rate": best.rate,
            "dollars_per_hour": best.design.dollars_per_hour, "power_units": best.design.power_units,
            "joules_per_request": best.bill.joules_per_request,
        }  # fmt: skip
        for baseline, of in _BASELINES.items():
            if (theirs := answers[of].best) is not None:
                row[f"rate_over_{baseline}"] = best.rate / theirs.rate
                row[f"cost_over_{baseline}"] = best.design.dollars_per_hour / theirs.design.dollars_per_hour
                row[f"power_over_{baseline}"] = best.design.power_units / theirs.design.power_units
    return row | {"runs": len(answer.tried), "designs": answer.grid}


def documented(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The profiles beside each other: for the same budgets, and for the same rate."""
    profiles = dict.fromkeys(row["profile"] for row in rows)
    places = dict.fromkeys((row["trace"], row["compared"], row["design"]) for row in rows)
    by_place = {(row["trace"], row["compared"], row["design"], row["profile"]): row for row in rows}
    budgets: list[Row] = []
    rates: list[Row] = []
    for trace, compared, design in places:
        is_budget = compared.startswith("same")
        shown: Row = {"trace": trace, "compared": compared, "design": design}
        if is_budget:
            shown["paper: P, T"] = _PAPER[trace].get(design, "--")[compared == "same cost"]
        for profile in profiles:
            row = by_place.get((trace, compared, design, profile), {})
            shown |= {f"{profile}: {name}": text for name, text in _cells(row, is_budget=is_budget).items()}
        (budgets if is_budget else rates).append(shown)
    return budgets, rates


def _cells(row: Row, *, is_budget: bool) -> dict[str, str]:
    cells = {"P, T": str(row.get("machines", "-"))}
    if is_budget:
        cells["requests/s"] = _figures(row, "rate", digits=0)
        cells["over A100, H100"] = _figures(row, "rate_over_A100", "rate_over_H100")
        cells["$/h, power"] = _figures(row, "dollars_per_hour", "power_units", digits=0)
    else:
        cells["cost, power over H100"] = _figures(row, "cost_over_H100", "power_over_H100")
    return cells


def _figures(row: Row, *keys: str, digits: int = 2) -> str:
    return ", ".join(f"{row[key]:,.{digits}f}" if key in row else "-" for key in keys)
