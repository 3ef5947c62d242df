"""A plan as JSON and as rows of a table. No time of this machine is in it: the same question gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterable

from planner.search.kind import Answer
from planner.search.plan import Plan
from planner.search.trial import Trial


def as_json(plan: Plan) -> dict[str, object]:
    question, best = plan.question, plan.best
    limits = question.limits
    pools = {"machines": limits.machines, "prompt": limits.prompt, "token": limits.token}
    return {
        "profile": question.profile.value,
        "workload": question.source.name,
        "model": question.model.name,
        "tensor_parallel": question.tensor_parallel,
        "goal": question.goal.value,
        "rate": question.rate,
        "rate_step": question.rate_step,
        "limits": {
            "dollars_per_hour": limits.dollars_per_hour,
            "power_units": limits.power_units,
            **{name: [pool.low, pool.high] for name, pool in pools.items()},
            "prompt_step": limits.prompt_step,
        },
        "slos": [each.name for each in question.slos],
        "best": None if best is None else best.kind.name,
        "verdict": plan.verdict,
        "answers": [_answer(answer) for answer in plan.answers],
        "warnings": warnings(plan),
    }


def warnings(plan: Plan) -> list[str]:
    """Of the best of each kind: of warnings with the same beginning, which differ in figures, the first; and rates that
    were not searched beyond."""
    found: dict[str, str] = {}
    for answer in plan.answers:
        for warning in answer.best.warnings if answer.best else ():
            found.setdefault(warning.partition(":")[0], warning)
    bounded = (
        f"{answer.kind.name} meets the objectives at {plan.question.max_rate:g} a second, the highest rate that was "
        "tried: expected a higher one, or smaller budgets"
        for answer in plan.answers
        if answer.is_bounded
    )
    return [*found.values(), *bounded]


def _answer(answer: Answer) -> dict[str, object]:
    return {
        "kind": answer.kind.name,
        "is_mixed": answer.kind.token is None,
        "designs_in_grid": answer.grid,
        "runs": len(answer.tried),
        "best": None if answer.best is None else _trial(answer.best),
        "by_cost": _trials(answer.by_cost),
        "by_power": _trials(answer.by_power),
        "latencies": _trials(answer.latencies),
    }


def _trials(trials: Iterable[Trial]) -> list[dict[str, object]]:
    return [_trial(trial) for trial in trials]


def _trial(trial: Trial) -> dict[str, object]:
    design = trial.design
    flat: dict[str, object] = {
        "design": design.name,
        "groups": [[group.role.value, group.machine.name, group.count] for group in design],
        "machines": design.num_machines,
        "rate": trial.rate,
        "dollars_per_hour": design.dollars_per_hour,
        "power_units": design.power_units,
        **trial.bill.as_json(),
        "requests": trial.summary.num_requests,
        "missed": list(trial.missed),
    }
    for name, figures in trial.summary.metrics.items():
        flat |= {f"{name}_{part}": getattr(figures, part) for part in ("p50", "p90", "p99")}
    return flat


COLUMNS = (
    "kind", "best design", "requests/s", "$/hour", "power units", "$/M tokens", "J/request", "TTFT p90 s", "TBT p90 ms",
    "runs", "designs",
)  # fmt: skip


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """One for each kind, in the order of COLUMNS."""
    return [_row(answer) for answer in plan.answers]


def _row(answer: Answer) -> tuple[str, ...]:
    runs, best = (str(len(answer.tried)), str(answer.grid)), answer.best
    if best is None:
        return (answer.kind.name, "none meets the objectives", *("-" for _ in COLUMNS[4:]), *runs)
    metrics, energy = best.summary.metrics, best.bill
    return (
        answer.kind.name,
        best.design.name,
        f"{best.rate:g}",
        f"{best.design.dollars_per_hour:,.2f}",
        f"{best.design.power_units:,.1f}",
        f"{energy.dollars_per_million_tokens:.3f}",
        f"{energy.joules_per_request:,.0f}" if energy.total_j else "-",
        _figure(metrics["TTFT_s"].p90, 1),
        _figure(metrics["TBT_s"].p90, 1e3),
        *runs,
    )


def _figure(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value * unit:.3g}"
