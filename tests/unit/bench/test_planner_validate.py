"""The runs of ``python -m bench.planner validate``, and the rows of its table."""

from __future__ import annotations

from bench.planner.validate import row, turns
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
