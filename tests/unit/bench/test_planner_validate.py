"""The runs of ``python -m bench.planner validate``, and the rows of its table."""

from __future__ import annotations

import time

from rich.console import Console

from bench.planner.__main__ import DOCUMENT, accuracy_text, written
from bench.planner.validate import Record, Time, row, run, summary, turns
from cli.planned import planned
from planner.validation import Report, Row
from tests.support.profiles import MEASURED


def test_every_model_cluster_and_trace_has_three_rates() -> None:
    found = list(turns(()))
    assert len({turn.name for turn in found}) == len(found) == 2 * 4 * 2
    for turn in found:
        loads = turn.plan(20.0).loads()
        assert [load.rate for load in loads] == list(turn.subject.rates[turn.trace])
        longest = max(request.prompt_tokens + request.output_tokens for load in loads for request in load.requests)
        assert longest <= 2048, "the demo model's context"
        # What `baton up` refuses is refused here.
        planned(turn.shape.options, MEASURED)


def test_parts_are_chosen_by_words() -> None:
    assert [turn.name for turn in turns(["demo 1+1"])] == ["demo 1+1 code", "demo 1+1 conv"]
    assert len(list(turns(["demo 1+1", "bench aggregated code"]))) == 3
    assert {turn.subject.name for turn in turns(["bench"])} == {"bench"}


async def test_what_would_end_too_late_is_left_out_and_nothing_is_started() -> None:
    record = Record(Console(quiet=True))
    async for _ in run(["demo 1+1", "bench conv"], Time(20.0, time.monotonic() + 60.0), record):
        raise AssertionError("60 s of loads alone, and the cluster's start")
    assert record.left_out == ["demo 1+1 code", "demo 1+1 conv", *(
        f"bench {cluster} conv" for cluster in ("2+1", "1+1", "1+2", "aggregated"))]  # fmt: skip
    assert record.as_json() == {
        "profiles": {}, "left out": record.left_out, "summary": [], "table": [], "reports": [],
    }  # fmt: skip


def test_the_bench_model_has_fewer_requests_and_longer_loads() -> None:
    demo, bench = (next(turns([name])) for name in ("demo", "bench"))
    assert bench.lasts_s(20.0) - demo.lasts_s(20.0) == 3 * 20
    assert all(len(load.requests) >= 8 for load in bench.plan(20.0).loads())


def test_errors_are_summed_up_by_model_and_figure() -> None:
    reports = [
        (next(turns([name])), Report("c", "l", (Row("TBT p50", "s", predicted, 1.0, 0.1),), (), ()))
        for name, predicted in (("demo", 1.05), ("demo", 0.8), ("demo", 1.11), ("bench", 1.0))
    ]
    assert list(summary(reports)) == [
        {"model": "demo", "figure": "TBT p50", "loads": 3, "within": 1, "median error": "11%", "worst error": "-20%"},
        {"model": "bench", "figure": "TBT p50", "loads": 1, "within": 1, "median error": "0%", "worst error": "+0%"},
    ]


def test_the_document_has_what_was_measured_and_when() -> None:
    results = {
        "profiles": {"demo": {"other_cores": 0.031}}, "left out": ["bench 2+1 code"],
        "summary": [{"model": "demo", "figure": "TBT p50", "within": 3}], "table": [{"model": "demo", "load": "x"}],
    }  # fmt: skip
    record = {"date": "2026-01-02", "machine": {"num_cpus": 2}, "seconds": 20.0, "note": "quiet", "results": results}
    text = accuracy_text(record)
    assert text.startswith(
        "2026-01-02; 2 processors; 20 s a load; other work took 0.03 of them while demo was profiled; left out: bench "
        "2+1 code; quiet.\n\n| model | figure | within |\n"
    )
    assert text.endswith("| model | load |\n|---|---|\n| demo | x |\n")
    assert text in written(DOCUMENT.read_text(encoding="utf-8"), "accuracy", text)


def test_a_row_has_both_and_the_error() -> None:
    shares = [(figure, share) for figure in ("TTFT", "TBT", "E2E") for share in (50, 90, 99)]
    rows = [Row(f"{figure} p{share}", "s", 0.011, 0.010, 0.1) for figure, share in shares]
    rows[3] = Row("TBT p50", "s", None, None, 0.1)
    rows += [Row("throughput", "requests/s", 2, 2, 0.1), Row("throughput", "tokens/s", 30, 31, 0.1)]
    turn = next(turns(["demo 1+1 code"]))
    made = row(turn, Report("1+1", "code 5/s", tuple(rows), (), ()))
    assert made == {
        "model": "demo", "cluster": "1+1", "load": "code 5/s", "TTFT p50 ms": "11.0 / 10.0 +10%",
        "TTFT p99 ms": "11.0 / 10.0 +10%", "TBT p50 ms": "-", "TBT p99 ms": "11.0 / 10.0 +10%",
        "E2E p50 ms": "11.0 / 10.0 +10%", "E2E p99 ms": "11.0 / 10.0 +10%", "tokens/s": "30.0 / 31.0",
        "within limits": "yes",
    }  # fmt: skip
