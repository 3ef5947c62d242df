"""Metrics as text, at two times, and the distributions between."""

from __future__ import annotations

import pytest

from baton.errors import Unavailable
from baton.metrics import Metrics, exposition
from planner.advise.samples import Distribution, Samples, Window

TEXT = """\
# TYPE process_start_time_seconds gauge
process_start_time_seconds{node="a"} 100.5
# TYPE baton_tbt_seconds histogram
baton_tbt_seconds_bucket{le="0.01",node="a"} 4
baton_tbt_seconds_bucket{le="0.02",node="a"} 10
baton_tbt_seconds_bucket{le="+Inf",node="a"} 12
baton_tbt_seconds_sum{node="a"} 0.3
baton_tbt_seconds_count{node="a"} 12
# TYPE baton_requests_total counter
baton_requests_total{outcome="finished",code=""} 7
baton_requests_total{outcome="failed",code="x"} 2
# TYPE baton_sequences gauge
baton_sequences{phase="decoding"} 3
"""


def test_series_are_found_by_name_and_labels() -> None:
    samples = Samples.parse(TEXT, "a")
    assert samples.total("baton_requests_total") == 9
    assert samples.total("baton_requests_total", outcome="failed") == 2
    assert samples.total("baton_requests_total", outcome="none") is None
    assert samples.total("baton_requests") is None


def test_a_window_is_what_came_between() -> None:
    after = (
        TEXT.replace('="finished",code=""} 7', '="finished",code=""} 17')
        .replace("} 3\n", "} 1\n")
        .replace("} 4\n", "} 5\n").replace("} 10\n", "} 13\n").replace("} 12\n", "} 17\n").replace("} 0.3", "} 0.4")
    )  # fmt: skip
    found = Window(Samples.parse(TEXT, "a"), Samples.parse(after, "a"))
    assert (found.grown("baton_requests_total"), found.grown("baton_sequences")) == (10, -2)
    assert found.gauge("baton_sequences", phase="decoding") == 1
    assert found.grown("nothing") == 0
    gaps = found.histogram("baton_tbt_seconds")
    assert (gaps.bounds, gaps.counts) == ((0.01, 0.02), (1, 2, 2))
    assert gaps.mean == pytest.approx(0.1 / 5)
    assert found.histogram("nothing").count == 0
    assert found.histogram("nothing").quantile(0.5) is None
    assert found.histogram("nothing").mean is None


def test_a_process_that_was_started_anew_is_no_window() -> None:
    restarted = Samples.parse(TEXT.replace("100.5", "200.5"), "a")
    with pytest.raises(Unavailable, match="a was started anew while it was watched"):
        Window(Samples.parse(TEXT, "a"), restarted)


def test_what_is_no_text_of_metrics_is_refused() -> None:
    with pytest.raises(Unavailable, match=r"the metrics of a cannot be read .* expected the text format of Prometheus"):
        Samples.parse("<html>no\n", "a")


def test_quantiles_lie_on_a_line_within_their_bucket() -> None:
    seen = Distribution.of([(0.5, 1), (1.5, 2), (1.5, 1), (9.0, 4)], (1.0, 2.0, 4.0))
    assert (seen.counts, seen.count, seen.mean) == ((1, 3, 0, 4), 8, pytest.approx(41 / 8))
    assert [seen.quantile(share) for share in (0.125, 0.25, 0.5, 1.0)] == [1.0, pytest.approx(4 / 3), 2.0, 4.0]
    assert list(seen.ranges()) == [(0.0, 1.0, 1), (1.0, 2.0, 3), (4.0, 6.0, 4)]


def test_processes_add_up_if_their_bounds_are_the_same() -> None:
    one, two = (Distribution.of([(value, 2)], (1.0, 2.0)) for value in (0.5, 1.5))
    assert Distribution.together([one, Distribution(), two]) == Distribution((1.0, 2.0), (2, 2, 0), 4.0)
    assert Distribution.together([]).count == 0
    with pytest.raises(Unavailable, match="different bounds, expected routers of one version"):
        Distribution.together([one, Distribution.of([], (1.0,))])


def test_what_our_processes_export_is_read() -> None:
    metrics = Metrics({"node": "n"})
    child = metrics.histogram("baton_x_seconds", "h", (1.0, 2.0), phase="decode")
    before = Samples.parse(exposition(metrics).decode(), "n")
    child.observe(1.5, 3)
    found = Window(before, Samples.parse(exposition(metrics).decode(), "n"))
    assert found.histogram("baton_x_seconds", phase="decode") == Distribution((1.0, 2.0), (0, 3, 0), 4.5)
