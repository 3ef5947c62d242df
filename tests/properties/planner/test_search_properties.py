"""A run that ends early has the verdict that it would have had at its end; no answer exceeds a budget."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import Role
from planner.design import Design
from planner.machines import catalogue
from planner.models import BUILT_IN
from planner.profiles import simulated, uncontended
from planner.results import Ending, Profile, Run, Served
from planner.search import report
from planner.search.kind import KindSearch
from planner.search.plan import Plan
from planner.search.question import Goal, Kind, Limits, Question, Range
from planner.search.slos import NINE_SLOS, Missed, Slo, Watch, missed
from planner.search.source import Redrawn
from planner.search.trial import Simulations
from planner.summary import summarize
from planner.uncontended import Ideal, measured, slowdown
from planner.workload import Request, Workload
from tests.support.designs import LENGTHS, Known

KNOWN = catalogue()
A, H = KNOWN["a100-80gb"], KNOWN["h100-80gb"]
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
METRICS = ("TTFT_s", "TBT_s", "E2E_s", "TTFT_slowdown", "TBT_slowdown", "E2E_slowdown")


class TwoSeconds:
    """For a first token and between tokens."""

    def of(self, request: Request) -> Ideal:
        return Ideal(2.0, 2.0, 2.0 * request.num_output_tokens)


def values(run: Run, metric: str) -> list[float]:
    whole = [(each, measured(each, run.profile)) for each in run.served]
    figures = {
        "s": [(real.ttft_s, real.tbt_s, real.e2e_s) for _, real in whole],
        "slowdown": [
            (slower.ttft, slower.tbt, slower.e2e)
            for slower in (slowdown(real, TwoSeconds().of(each.request)) for each, real in whole)
        ],
    }
    name, unit = metric.split("_")
    place = ("TTFT", "TBT", "E2E").index(name)
    return sorted(value for each in figures[unit] if (value := each[place]) is not None)


drawn_slos = st.lists(
    st.builds(Slo, st.sampled_from(METRICS), st.sampled_from(("mean", *SHARES)), st.integers(1, 9).map(float)),
    min_size=1,
    max_size=3,
)
# To the first token, from it to the end, and tokens: few values, so that many equal a limit.
drawn_times = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 30), st.integers(1, 4)), min_size=1, max_size=40)


@given(drawn_times, drawn_slos, st.sampled_from(Profile), st.randoms(use_true_random=False))
def test_only_what_is_missed_at_the_end_ends_a_run_and_it_does_so_once_it_is_certain(
    times: list[tuple[int, int, int]], slos: list[Slo], profile: Profile, rng: Random
) -> None:
    work = Workload("drawn", tuple(Request(i, 0.5 * i, 10, tokens) for i, (_, _, tokens) in enumerate(times)))
    served = [Served(request) for request in work.requests]
    watch, is_missed = Watch(work, slos, profile, TwoSeconds()), False
    # Twice each: its first token, and its end.
    events = [*served, *served]
    rng.shuffle(events)
    for each in events:
        first_s, rest_s, _ = times[each.request.number]
        if each.first_token_s is None:
            each.first_token_s = each.request.arrival_s + first_s
        else:
            each.ended_s, each.ending = each.first_token_s + rest_s, Ending.WHOLE
            each.num_tokens = each.request.num_output_tokens
        if not is_missed:
            try:
                watch(each)
            except Missed:
                is_missed = True
    run = Run(profile, work, Design(()), tuple(served), (), 0.0)
    said = missed(summarize(run, TwoSeconds()), slos)
    certain = {
        slo.name
        for slo in slos
        if slo.part in SHARES
        and (ordered := values(run, slo.metric))
        and ordered[int((len(ordered) - 1) * SHARES[slo.part])] > slo.limit
    }
    assert is_missed == bool(certain)
    assert certain <= set(said)


def test_a_request_that_is_not_served_ends_a_run() -> None:
    work = Workload("one", (Request(0, 0.0, 10, 5),))
    watch = Watch(work, (), Profile.HONEST, TwoSeconds())
    with pytest.raises(Missed):
        watch(Served(work.requests[0], ended_s=3.0, ending=Ending.FAILED))


traces = st.lists(st.tuples(st.integers(50, 4000), st.integers(1, 60)), min_size=3, max_size=12).map(
    lambda sizes: Workload("sizes", tuple(Request(i, float(i), *each) for i, each in enumerate(sizes)))
)
kinds = st.sampled_from((Kind(H, A), Kind(H, H), Kind(H, None), Kind(A, None)))


@settings(max_examples=25)
@given(traces, st.sampled_from(Profile), kinds, st.integers(1, 3), st.floats(0.2, 12), st.integers(0, 3))
def test_a_trial_that_may_end_early_has_the_verdict_of_the_whole_run(
    trace: Workload, profile: Profile, kind: Kind, count: int, rate: float, seed: int
) -> None:
    """Limits of the nine, and of one metric about as it comes out."""
    asked = Question(Redrawn(trace, 4.0 + 16 / rate, seed), profile, BUILT_IN["llama2-70b"], 8, KNOWN, (kind,))
    design = kind.design(count, 2)
    whole = Simulations(asked).run(design, rate)
    own = [
        replace(slo, limit=found)
        for slo in NINE_SLOS
        if (found := getattr(whole.summary.metrics[slo.metric], slo.part)) is not None
    ]
    for slos in (NINE_SLOS, own, [replace(each, limit=0.999 * each.limit) for each in own]):
        question = replace(asked, slos=tuple(slos))
        trial, full = Simulations(question).met(design, rate), Simulations(question).run(design, rate)
        assert (trial is None) == bool(full.missed)
        assert trial is None or trial == full


def test_an_overloaded_run_ends_early() -> None:
    """Else the property above would hold of runs that never do."""
    trace = Workload("sizes", (Request(0, 1.0, 1500, 40),))
    told: list[float] = []

    class Counting(Watch):
        def __call__(self, served: Served) -> None:
            told.append(served.ended_s or served.first_token_s or 0.0)
            super().__call__(served)

    for profile in Profile:
        work = trace.redrawn(rate=60.0, seconds=10.0, seed=0)
        model, design = BUILT_IN["llama2-70b"], Kind(H, H).design(1, 1)
        alone = uncontended(profile, model, 8, KNOWN)
        told.clear()
        with pytest.raises(Missed):
            simulated(profile, work, design, model, 8, KNOWN, Counting(work, NINE_SLOS, profile, alone))
        assert len(told) < len(work.requests) / 4


ranges = st.tuples(st.integers(1, 6), st.integers(0, 9)).map(lambda each: Range(each[0], sum(each)))
budgets = st.builds(Limits, st.none() | st.floats(10, 700), st.none() | st.floats(20, 800), ranges, ranges, ranges)


@settings(max_examples=60)
@given(
    budgets, st.lists(kinds, min_size=1, max_size=3, unique=True), st.sampled_from(Goal), st.floats(0.5, 9),
    st.floats(0.5, 9),
)  # fmt: skip
def test_28_no_design_of_a_plan_exceeds_a_budget_or_a_number_of_machines(
    limits: Limits, asked_kinds: list[Kind], goal: Goal, prompt_rate: float, token_rate: float
) -> None:
    """Whatever is in `plan.json`: answers, fronts, and the designs whose latencies are shown."""

    def highest_rate(prompt: int, token: int) -> float:
        return min(prompt * prompt_rate, token * token_rate) if token else prompt * min(prompt_rate, token_rate)

    rate = None if goal is Goal.THROUGHPUT else 4.0
    question = Question(
        Redrawn(LENGTHS, 10.0, 1), Profile.COMPAT, BUILT_IN["bloom-176b"], 8, KNOWN, tuple(asked_kinds), goal, rate,
        limits, max_rate=50.0, has_fronts=True,
    )  # fmt: skip
    plan = Plan(
        question, tuple(KindSearch(question, kind, Known(highest_rate)).answer() for kind in question.kinds)
    )  # fmt: skip
    for answer in plan.answers:
        best = () if answer.best is None else (answer.best,)
        for trial in (*best, *answer.by_cost, *answer.by_power, *answer.latencies):
            counts = {role: trial.design.count(role) for role in Role}
            assert limits.machines.low <= trial.design.num_machines <= limits.machines.high
            if not counts[Role.MIXED]:
                assert limits.prompt.low <= counts[Role.PREFILL] <= limits.prompt.high
                assert limits.token.low <= counts[Role.DECODE] <= limits.token.high
    told = report.as_json(plan)["answers"]
    assert isinstance(told, list)
    for each in (x for of in told for x in (of["best"], *of["by_cost"], *of["by_power"], *of["latencies"]) if x):
        assert limits.dollars_per_hour is None or each["dollars_per_hour"] <= limits.dollars_per_hour * (1 + 1e-9)
        assert limits.power_units is None or each["power_units"] <= limits.power_units * (1 + 1e-9)
