"""A prediction beside a run: figures, errors and the verdict of each, and of all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.types import Role, TransferReport
from loadgen.load import Load, Request, poisson, same_size
from loadgen.run import Outcome
from planner.observed import Observed
from planner.results import RoleChange, Run
from planner.sim.config import SimulationConfig
from planner.sim.run import simulate
from planner.times import LinearTimes
from planner.validation import Limits, Report, Row, Verdict, compared, workload_of
from tests.support.replayed import replayed
from tests.support.simulated import ALWAYS, LINE, MODEL, design

LIMITS = Limits(0.10, 0.20)
SENT = poisson("p", [*same_size(20, 300, 12), *same_size(4, 900, 3)], 4.0, 60.0, "1")
CONFIG = SimulationConfig(policy=ALWAYS, max_output_tokens=1)


def run_of(load: Load = SENT) -> Run:
    return simulate(workload_of(Outcome(load, (), 0.0)), design(), MODEL, {"m": LinearTimes(LINE)}, CONFIG)


def report_of(run: Run, outcome: Outcome, limits: Limits = LIMITS, **counted: float) -> Report:
    observed = Observed(transfers=tuple(replace(each, exposed_s=2 * each.exposed_s) for each in run.transfers))
    return compared("c", run, outcome, observed, counted, limits)


def test_the_same_requests_arrive_when_they_were_sent() -> None:
    outcome = replayed(SENT, run_of(), late_s=0.01)
    work = workload_of(replace(outcome, answers=outcome.answers[:-1]))
    # The last one was cut off: it was due.
    sent_s = [*(each.due_s + 0.01 for each in SENT.requests[:-1]), SENT.requests[-1].due_s]
    sizes = [(each.prompt_tokens, each.output_tokens) for each in SENT.requests]
    assert [
        (each.number, each.arrival_s, each.num_prompt_tokens, each.num_output_tokens) for each in work.requests
    ] == [(number, at_s, *size) for number, (at_s, size) in enumerate(zip(sent_s, sizes, strict=True))]
    # The second was sent before the first.
    first, second, *rest = outcome.answers
    swapped = (replace(first, sent_s=9.0), second, *rest)
    numbers = [each.number for each in workload_of(replace(outcome, answers=swapped)).requests]
    assert sorted(numbers) == list(range(24))
    assert numbers[0] == 1
    report = report_of(run_of(), outcome)
    assert [pair.request.number for pair in report.pairs] == list(range(24))


def test_a_run_like_the_prediction_has_no_error() -> None:
    run = run_of()
    report = report_of(run, replayed(SENT, run))
    assert report.is_met
    assert report.mean_error == pytest.approx(0, abs=1e-9)
    names = [f"{figure} p{share}" for figure in ("TTFT", "TBT", "E2E") for share in (50, 90, 99)]
    judged = [row.name for row in report.rows if row.limit is not None]
    assert judged == ["requests answered", *names, "throughput", "throughput"]
    assert [row.limit for row in report.rows if row.name in names] == [0.10, 0.20, 0.20] * 3
    # Shown, not judged.
    assert [row.name for row in report.having(Verdict.SHOWN)] == [
        "transfer p50", "transfer p90", "transfer p99", "transfers", "role changes",
    ]  # fmt: skip
    assert [row.error for row in report.rows if row.name == "transfer p50"] == [pytest.approx(-0.5)]


@pytest.mark.parametrize(("factor", "missed"), [(1.08, 0), (1.12, 3), (1.3, 9), (0.95, 0), (0.7, 9)])
def test_errors_beyond_the_limits_are_missed(factor: float, missed: int) -> None:
    """p50 by a tenth, p90 and p99 by a fifth; a predicted time is compared with the measured one."""
    run = run_of()
    report = report_of(run, replayed(SENT, run, factor))
    times = [row for row in report.rows if row.name[:4] in ("TTFT", "TBT ", "E2E ")]
    assert [row.error for row in times] == [pytest.approx(1 / factor - 1, rel=1e-6)] * 9
    assert sum(row.verdict is Verdict.MISSED for row in times) == missed
    assert report.is_met is (missed == 0)


def test_what_only_one_of_the_two_has_is_missed_and_what_neither_has_is_named() -> None:
    assert Row("x", "s", 1.0, None, 0.1).verdict is Verdict.MISSED
    assert Row("x", "s", None, 1.0, 0.1).verdict is Verdict.MISSED
    assert Row("x", "s", None, None, 0.1).verdict is Verdict.NOT_MEASURED
    assert Row("x", "", 0, 0, 0.1).verdict is Verdict.MET
    assert Row("x", "", 1, 0, 0.1).verdict is Verdict.MISSED
    single = poisson("p", same_size(5, 300, 1), 4.0, 60.0, "1")
    run = run_of(single)
    report = report_of(run, replayed(single, run))
    assert {row.name for row in report.having(Verdict.NOT_MEASURED)} >= {"TBT p50", "TBT p90", "TBT p99"}


def test_requests_that_were_not_answered_do_not_count_and_are_told() -> None:
    run = run_of()
    outcome = replayed(SENT, run)
    lost = (replace(outcome.answers[0], error="HTTP 500: broken", stamps_s=()), *outcome.answers[1:20])
    report = report_of(run, replace(outcome, answers=lost))
    (row,) = (row for row in report.rows if row.name == "requests answered")
    assert (row.predicted, row.measured, row.verdict) == (24, 19, Verdict.MISSED)
    assert sum(pair.measured is None for pair in report.pairs) == 5
    assert report.warnings[-2:] == ("1 requests failed: HTTP 500: broken", "4 requests were cut off")
    # Of those that both have.
    assert [row.error for row in report.rows if row.name == "TTFT p50"] == [pytest.approx(0)]


def test_role_changes_and_a_late_generator_are_told() -> None:
    run = replace(run_of(), role_changes=(RoleChange(1.0, "m", Role.MIXED, "borrowed"),) * 3)
    report = report_of(run, replayed(SENT, run, late_s=0.3), **{
        "baton_role_changes_total{reason=borrowed}": 1, "baton_role_changes_total{reason=asked}": 1, "other_total": 9,
    })  # fmt: skip
    # It is no time of the cluster.
    assert [row.error for row in report.rows if row.name == "TTFT p50"] == [pytest.approx(0)]
    (row,) = (row for row in report.rows if row.name == "role changes")
    assert (row.predicted, row.measured, row.error) == (3, 2, pytest.approx(0.5))
    assert report.warnings == ("requests were sent up to 0.30 s after they were due: the load was not as asked for",)


def test_the_record_has_every_request_in_both() -> None:
    run = run_of()
    found = report_of(run, replayed(SENT, run)).as_json()
    assert len(found["requests"]) == 24
    assert found["requests"][0]["predicted"]["ttft_s"] == pytest.approx(found["requests"][0]["measured"]["ttft_s"])
    assert {"name", "unit", "predicted", "measured", "limit", "error", "verdict"} == set(found["rows"][0])
    assert "requests" not in report_of(run, replayed(SENT, run)).as_json(has_requests=False)


def test_transfers_without_a_run_that_has_any_are_not_measured() -> None:
    load = Load("one", (Request(40, 2),), rate=1.0)
    run = replace(run_of(load), transfers=())
    report = compared("c", run, replayed(load, run), Observed(), {}, LIMITS)
    assert [row.verdict for row in report.rows if row.name.startswith("transfer p")] == [Verdict.NOT_MEASURED] * 3
    other = compared(
        "c", run, replayed(load, run), Observed(transfers=(TransferReport("shm", False, 1, 1, 1, 1),)), {}, LIMITS
    )
    assert [row.error for row in other.rows if row.name.startswith("transfer p")] == [None] * 3


def test_a_time_of_which_the_clock_shows_nothing_is_not_judged() -> None:
    assert Row("TBT p50", "s", 0.001, 0.0, limit=0.1).verdict is Verdict.NOT_MEASURED
    assert Row("TBT p50", "s", 0.001, 0.002, limit=0.1).verdict is Verdict.MISSED
    assert Row("transfers", "", 1.0, 0.0, limit=0.1).verdict is Verdict.MISSED
