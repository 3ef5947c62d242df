"""Summaries, slowdowns and the nine objectives of a run."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from engine.step import StepShape
from planner import machines, models, picture, workload
from planner.compat.run import simulate
from planner.design import parse
from planner.results import Ending, Profile, Run, Served
from planner.summary import COLUMNS, Figures, as_json, summarize, write
from planner.table import TokenTimes
from planner.uncontended import Ideal, StepUncontended, TableUncontended, judge, measured, slowdowns
from planner.workload import Request, Workload

KNOWN = machines.catalogue()
A100 = TokenTimes("bloom-176b", KNOWN["a100-80gb"], 8)
ALONE = TableUncontended(A100)


def one_run(rate: float = 2.0) -> Run:
    work = workload.like_trace("conv", rate=rate, seconds=20, seed=3)
    return simulate(work, parse(KNOWN, mixed=["a100-80gb:2"]), models.BUILT_IN["bloom-176b"])


def served(profile_s: tuple[float, float, float], num_output: int = 11) -> Served:
    first, decode, end = profile_s
    return Served(
        Request(0, 1.0, 100, num_output), first_token_s=first, prompt_end_s=first - 0.25, decode_start_s=decode,
        ended_s=end, ending=Ending.WHOLE, num_tokens=num_output,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 7, 100, 101])
def test_percentiles_are_numpys(count: int) -> None:
    values = list(np.random.default_rng(count).exponential(size=count))
    figures = Figures.of([*values, None])
    assert [figures.p50, figures.p90, figures.p99] == pytest.approx(list(np.percentile(values, [50, 90, 99])))
    assert figures.mean == pytest.approx(np.mean(values))
    assert Figures.of([None]) == Figures(None, None, None, None)


def test_the_time_between_tokens_is_over_the_gaps_but_in_compat_over_the_tokens() -> None:
    one = served((2.0, 2.5, 13.0))
    # The gap before decoding is over what happens at the machines.
    assert measured(one, Profile.HONEST) == (1.0, 1.1, 12.0, 0.75)
    assert measured(one, Profile.COMPAT) == (1.0, 1.0, 12.0, 0.75)
    assert measured(served((2.0, 2.5, 13.0), 1), Profile.HONEST).tbt_s is None


def test_a_request_alone_is_not_slower_than_alone() -> None:
    work = Workload("one", (Request(0, 0.0, 1024, 11),))
    found = simulate(work, parse(KNOWN, mixed=["a100-80gb:1"]), models.BUILT_IN["bloom-176b"])
    (slowdown,) = slowdowns(found, ALONE)
    assert slowdown.ttft == pytest.approx(1)
    assert all(verdict.is_met for verdict in judge([slowdown]))


def test_an_uncontended_run_of_steps_is_one_prompt_and_decodes_of_one() -> None:
    class Times:
        source, warnings = "test", ()

        def step_s(self, shape: StepShape) -> float:
            return shape.num_prompt_pairs * 1e-3 + shape.num_decoding + shape.num_kv_tokens * 1e-2

    assert StepUncontended(Times()).of(Request(0, 0.0, 3, 5)) == Ideal(6e-3, 1.05, 6e-3 + 4 * 1.05)


def test_the_files_have_the_names_of_the_reference_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        found = one_run()
        write(tmp_path / folder, found, summarize(found, ALONE))
    for name in ("summary.json", "requests.csv", "run.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["profile"] == "compat"
    figures = ("TTFT_s", "TBT_s", "E2E_s", "second_token_gap_s", "TTFT_slowdown", "TBT_slowdown", "E2E_slowdown")
    assert {f"{figure}_{part}" for figure in figures for part in ("mean", "p50", "p90", "p99")} < set(summary)
    assert {"requests", "completed", "sim_end_s", "kv_transfers", "oom_events", "all_9_SLOs_met"} < set(summary)
    assert summary["dollars_per_million_tokens"] > 0
    assert summary["joules_per_request"] is None, "the profile compat simulates no energy"
    with (tmp_path / "a" / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [float(row["ttft_s"]) for row in rows] == [measured(s, found.profile).ttft_s for s in found.served]


def test_the_picture_has_requests_and_machines_and_of_no_request_says_so() -> None:
    run = one_run()
    drawn = picture.draw(run)
    ElementTree.fromstring(drawn)
    assert all(f"{name} of requests" in drawn for name in ("TTFT", "TBT", "E2E"))
    assert "busy mixed machines" in drawn
    empty = replace(run, served=(), ended_s=0.0)
    assert picture.draw(empty).count("nothing was measured") == 4


def test_the_nine_are_missed_under_load_and_by_a_run_that_leaves_requests_out() -> None:
    assert summarize(one_run(), ALONE).meets_all_nine
    overloaded = one_run(rate=20.0)
    summary = summarize(overloaded, ALONE)
    assert not summary.meets_all_nine
    missed = as_json(overloaded, summary)["missed_SLOs"]
    assert isinstance(missed, list)
    assert any(line.startswith("ttft p50 slowdown") and line.endswith("limit 2") for line in missed)
    left_out = simulate(
        Workload("big", (Request(0, 0.0, 10**6, 10),)),
        parse(KNOWN, mixed=["a100-80gb:1"]),
        models.BUILT_IN["bloom-176b"],
    )
    assert not summarize(left_out, ALONE).meets_all_nine
