"""Slowdowns, the nine objectives, absolute ones, and the figures of a run."""

import csv
import json
from dataclasses import replace

import pytest

from loadgen.client import Answer
from loadgen.figures import Figures, record_of, write_csv
from loadgen.load import Load, Request
from loadgen.objectives import NINE, Limits, Point, Slowdown, Uncontended, judge
from loadgen.run import Outcome

ALONE = Uncontended((Point(100, 0.1, 0.010), Point(300, 0.5, 0.020)))


def answer(number=0, prompt=100, ttft=0.1, gap=0.01, tokens=11, due=1.0, **more) -> Answer:
    stamps = tuple(due + ttft + i * gap for i in range(tokens))
    ended = stamps[-1] if stamps else due
    return replace(Answer(number, Request(prompt, tokens, due), due, due, ended, stamps, 200), **more)


def test_times_of_single_requests_are_interpolated_between_lengths():
    assert ALONE.ttft_s(200) == pytest.approx(0.3)
    assert ALONE.tbt_s(250) == pytest.approx(0.0175)
    assert (ALONE.ttft_s(1), ALONE.ttft_s(100), ALONE.ttft_s(300), ALONE.ttft_s(9999)) == (0.1, 0.1, 0.5, 0.5)


def test_single_requests_make_a_point_for_each_length_by_their_median():
    found = Uncontended.of(
        [answer(prompt=300, ttft=0.5, gap=0.02), *(answer(ttft=t) for t in (0.3, 0.1, 0.2)), answer(tokens=1)]
    )
    assert [p.prompt_tokens for p in found.points] == [100, 300]
    assert found.points[0].ttft_s == pytest.approx(0.15)
    assert found.points[0].tbt_s == pytest.approx(0.01)


def test_a_slowdown_compares_with_a_single_request_of_the_size():
    slow = Slowdown.of(answer(prompt=300, ttft=1.0, gap=0.03, tokens=6), ALONE)
    assert slow.ttft == pytest.approx(2.0)
    assert slow.tbt == pytest.approx(1.5)
    assert slow.e2e == pytest.approx((1.0 + 5 * 0.03) / (0.5 + 5 * 0.02))
    single = Slowdown.of(answer(prompt=300, ttft=1.0, tokens=1), ALONE)
    assert (single.tbt, single.e2e) == (None, pytest.approx(2.0))


def test_the_nine_are_those_of_splitwise():
    assert [(f, p, limit) for f, p, limit in NINE if f != "e2e"] == [
        ("ttft", 0.5, 2), ("ttft", 0.9, 3), ("ttft", 0.99, 6), ("tbt", 0.5, 1.25), ("tbt", 0.9, 1.5), ("tbt", 0.99, 5),
    ]  # fmt: skip
    assert [(p, limit) for f, p, limit in NINE if f == "e2e"] == [(0.5, 1.25), (0.9, 1.5), (0.99, 5)]


@pytest.mark.parametrize(("figure", "share", "limit"), NINE)
def test_each_of_the_nine_is_missed_by_its_own_percentile_alone(figure, share, limit):
    good = Slowdown(1.0, 1.0, 1.0)
    # So many of a hundred that the percentile, and none below it, is among them.
    num_bad = 100 - round(share * 100)
    for factor, missed in ((0.99, []), (1.01, [(figure, share)])):
        bad = replace(good, **{figure: limit * factor})
        verdicts = judge([good] * (100 - num_bad) + [bad] * num_bad)
        ours = [(v.figure, v.percentile) for v in verdicts if not v.is_met and v.percentile == share]
        assert ours == missed


def test_a_request_is_tolerable_up_to_the_largest_limits():
    assert Slowdown(6.0, 5.0, 5.0).is_tolerable
    assert Slowdown(6.0, None, 5.0).is_tolerable
    for bad in (Slowdown(6.1, 1, 1), Slowdown(1, 5.1, 1), Slowdown(1, 1, 5.1)):
        assert not bad.is_tolerable


def test_absolute_objectives_count_what_is_within_both():
    limits = Limits(ttft_s=0.2, tbt_s=0.02)
    assert limits.is_met(answer(ttft=0.19, gap=0.019))
    assert not limits.is_met(answer(ttft=0.21))
    assert not limits.is_met(answer(gap=0.021))
    assert limits.is_met(answer(tokens=1))
    assert not Limits().is_set


def outcome() -> Outcome:
    answers = (
        answer(0),
        answer(1, ttft=0.4, gap=0.03),
        answer(2, tokens=0, status=429, error="HTTP 429: busy", ended_s=1.05),
        answer(3, tokens=5, error="the server closed the connection"),
    )
    answers = (replace(answers[0], sent_s=1.25), *answers[1:])
    requests = (*(a.request for a in answers), Request(100, 11, 1.0))
    return Outcome(Load("x", requests, rate=1.0), answers, 2.0)


def answer_times(found: Figures) -> tuple[float | None, ...]:
    return found.ttft_s.p50, found.ttft_s.max, found.gap_s.p50, found.gap_s.max


def test_figures_of_a_run():
    found = Figures.of(outcome(), ALONE, Limits(ttft_s=0.2))
    assert (found.requests, found.whole, found.refused, found.errors, found.cut) == (5, 2, 1, 1, 1)
    assert found.first_error == "the server closed the connection"
    assert answer_times(found) == pytest.approx((0.4, 0.4, 0.03, 0.03))
    assert found.tokens_s == pytest.approx(22 / 2)
    assert found.refusal_s.max == pytest.approx(0.05)
    assert found.max_late_s == pytest.approx(0.25)
    assert (found.tolerable_requests_s, found.goodput_requests_s) == (1.0, 0.5)
    assert found.meets_nine is False
    # It is JSON, and says which of the nine are missed.
    record = json.loads(json.dumps(found.as_json()))
    assert record["meets_nine"] is False
    assert [v["is_met"] for v in record["nine"] if v["figure"] == "ttft"] == [False, False, True]


def test_without_single_requests_nothing_is_said_of_the_nine():
    found = Figures.of(outcome())
    assert (found.nine, found.meets_nine, found.tolerable_requests_s, found.goodput_requests_s) == (
        (),
        None,
        None,
        None,
    )


def test_a_request_that_is_missing_means_that_the_nine_are_not_met():
    whole = Outcome(Load("x", (Request(100, 11, 1.0),)), (answer(0),), 1.0)
    assert Figures.of(whole, ALONE).meets_nine is True
    missing = replace(whole, load=Load("x", (Request(100, 11, 1.0),) * 2))
    assert Figures.of(missing, ALONE).meets_nine is False


def test_no_answer_at_all_has_figures_too():
    found = Figures.of(Outcome(Load("x", (Request(1, 1),)), (), 1.0), ALONE, Limits(tbt_s=1.0))
    assert (found.cut, found.ttft_s.p50, found.goodput_requests_s, found.meets_nine) == (1, None, 0.0, None)


def test_every_request_is_recorded(tmp_path):
    run = outcome()
    records = json.loads(json.dumps([record_of(a) for a in run.answers]))
    assert records[0]["gaps_ms"] == [10.0] * 10
    assert records[2]["error"] == "HTTP 429: busy"
    assert "ttft_s" not in records[2]
    write_csv(tmp_path / "x.csv", {"a": run})
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert [row["number"] for row in rows] == ["0", "1", "2", "3"]
    assert float(rows[1]["ttft_s"]) == pytest.approx(0.4)
    assert float(rows[1]["max_gap_s"]) == pytest.approx(0.03)
    assert (rows[2]["ttft_s"], rows[2]["status"]) == ("", "429")
