"""The Splitwise paper's headline comparison: the highest rate of each kind of design for the power and for the cost of
40 DGX H100, and the least power and cost that carry the rate of these as mixed machines."""

from __future__ import annotations

from typing import Any

from planner import machines, models
from planner.results import Profile
from planner.search.plan import Plan, search
from planner.search.question import Goal, Kind, Limits, Question, Range
from planner.search.source import Redrawn
from planner.search.trial import Trial
from planner.workload import named

_MODEL = models.BUILT_IN["bloom-176b"]
_TENSOR_PARALLEL = 8
_NUM_H100 = 40
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
_BUDGETS = ("power", "cost")


def _kinds() -> dict[str, Kind]:
    known = machines.catalogue()
    a100, h100, capped = known["a100-80gb"], known["h100-80gb"], known["h100-80gb-pcap"]
    return {
        "Baseline-A100": Kind(a100, None), "Baseline-H100": Kind(h100, None), "AA": Kind(a100, a100),
        "HH": Kind(h100, h100), "HA": Kind(h100, a100), "HHcap": Kind(h100, capped),
    }  # fmt: skip


def table(profile: Profile, quick: bool, workers: int) -> list[dict[str, Any]]:
    """``quick``: a tenth of the machines, and less of the trace."""
    num_h100, seconds = (_NUM_H100 // 10, 10.0) if quick else (_NUM_H100, 60.0)
    h100 = machines.catalogue()["h100-80gb"]
    budgets = {
        "power": Limits(power_units=num_h100 * h100.power_units),
        "cost": Limits(dollars_per_hour=num_h100 * h100.machine_dollars_per_hour),
    }
    # For the same rate of the weakest machines.
    enough = Limits(machines=Range(1, 5 * num_h100))
    rows = []
    for trace in _PAPER:
        for budget, limits in budgets.items():
            plan = search(_question(profile, trace, seconds, limits), workers)
            rows += _same_budget(plan, trace, budget)
        baseline = next(answer.best for answer in plan.answers if answer.kind == _kinds()["Baseline-H100"])
        if baseline is not None:
            for goal in (Goal.POWER, Goal.COST):
                asked = _question(profile, trace, seconds, enough, goal, baseline.rate)
                rows += _same_rate(search(asked, workers), trace, baseline)
    return rows


def _question(
    profile: Profile,
    trace: str,
    seconds: float,
    limits: Limits,
    goal: Goal = Goal.THROUGHPUT,
    rate: float | None = None,
) -> Question:
    source = Redrawn(named(trace), seconds, seed=0)
    known = machines.catalogue()
    return Question(source, profile, _MODEL, _TENSOR_PARALLEL, known, tuple(_kinds().values()), goal, rate, limits)


def _same_budget(plan: Plan, trace: str, budget: str) -> list[dict[str, Any]]:
    answers = dict(zip(_kinds(), plan.answers, strict=True))
    rows = []
    for name, answer in answers.items():
        row = _row(plan, trace, f"same {budget}", name, answer.best)
        paper = _PAPER[trace].get(name)
        row["paper's P, T"] = "-" if paper is None else paper[_BUDGETS.index(budget)]
        for baseline in ("Baseline-A100", "Baseline-H100"):
            theirs = answers[baseline].best
            row[f"rate over {baseline}"] = f"{answer.best.rate / theirs.rate:.2f}" if answer.best and theirs else "-"
        row["runs"], row["designs"] = len(answer.tried), answer.grid
        rows.append(row)
    return rows


def _same_rate(plan: Plan, trace: str, baseline: Trial) -> list[dict[str, Any]]:
    """Cost and power beside those of mixed H100 that carry it."""
    assert plan.question.rate is not None
    rows = []
    for name, answer in zip(_kinds(), plan.answers, strict=True):
        row = _row(plan, trace, f"least {plan.question.goal.value} at {plan.question.rate:g}/s", name, answer.best)
        row["runs"], row["designs"] = len(answer.tried), answer.grid
        if answer.best is not None:
            design, theirs = answer.best.design, baseline.design
            row["cost over Baseline-H100"] = f"{design.dollars_per_hour / theirs.dollars_per_hour:.2f}"
            row["power over Baseline-H100"] = f"{design.power_units / theirs.power_units:.2f}"
        rows.append(row)
    return rows


def _row(plan: Plan, trace: str, compared: str, name: str, best: Trial | None) -> dict[str, Any]:
    return {
        "profile": plan.question.profile.value,
        "trace": trace,
        "compared": compared,
        "design": name,
        "P, T": "-" if best is None else ", ".join(str(group.count) for group in best.design),
        "requests/s": "none" if best is None else f"{best.rate:g}",
        "$/hour": "-" if best is None else f"{best.design.dollars_per_hour:,.0f}",
        "power units": "-" if best is None else f"{best.design.power_units:,.0f}",
    }
