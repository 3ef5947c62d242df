"""Charts: every point is drawn at its place, and what cannot be drawn is said or left out."""

import math
import re
import xml.etree.ElementTree as Xml

import pytest

from loadgen.chart import Line, Panel, Point, draw
from loadgen.client import Answer
from loadgen.compare import Comparison, Measured
from loadgen.load import Load, Request
from loadgen.objectives import Limits
from loadgen.pictures import against_load, frontier
from loadgen.run import Outcome
from loadgen.svg import round_step

CIRCLE = re.compile(r'<circle cx="([\d.]+)" cy="([\d.]+)" [^>]*fill="(#\w+)"><title>([^<]*)')


def circles(picture):
    Xml.fromstring(picture)
    return [(float(x), float(y), colour, title) for x, y, colour, title in CIRCLE.findall(picture)]


def panel(*lines, **more):
    return Panel("t", "rate", "s", lines, **more)


def test_points_are_in_proportion_and_lines_have_colours_of_their_own():
    found = circles(draw("x", [panel(Line("a", (Point(1, 1), Point(2, 2), Point(4, 4))), Line("b", (Point(4, 2),)))]))
    (x1, y1, a, title), (x2, y2, _, _), (x4, y4, _, _), (xb, yb, b, _) = found
    assert title == "a: rate 1, s 1"
    assert a != b
    assert x4 - x2 == pytest.approx(2 * (x2 - x1), abs=0.3)
    assert y2 - y4 == pytest.approx(2 * (y1 - y2), abs=0.3)
    assert (xb, yb) == (x4, y2)


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios_and_no_zero():
    points = (Point(1, 0.0), Point(1, 0.01), Point(2, 0.1), Point(3, 1.0))
    places = [y for _, y, _, _ in circles(draw("x", [panel(Line("a", points), is_log=True)]))]
    assert len(places) == 3
    assert places[0] - places[1] == pytest.approx(places[1] - places[2], abs=0.3)


def test_names_are_escaped_and_an_empty_panel_says_so():
    picture = draw("a & b", [panel(Line("<x>", (Point(1, 1, "1 < 2"),))), panel()])
    circles(picture)
    assert "nothing was measured" in picture


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_single_value_has_an_axis_too(value):
    ((x, y, _, _),) = circles(draw("x", [panel(Line("a", (Point(value, value),)))]))
    assert math.isfinite(x)
    assert math.isfinite(y)


def test_round_steps():
    assert [round_step(length) for length in (10, 12, 60, 100, 0.7)] == [1, 2, 10, 10, pytest.approx(0.1)]
    assert round_step(60, 6) == 10


def measured(target, rate, ttft_s, gap_s, streams=0):
    answer = Answer(0, Request(8, 3), 0.0, 0.0, 9.0, (ttft_s, ttft_s + gap_s, ttft_s + 2 * gap_s), 200)
    name = f"{rate}/s" if rate else f"{streams} streams"
    load = Load(name, (answer.request,), streams=streams, rate=rate)
    return Measured(target, load.name, 0, Outcome(load, (answer,), 10.0), {})


def test_a_comparison_is_drawn_against_the_rate_with_closed_loops_left_out():
    runs = (measured("a", 1.0, 0.5, 0.02), measured("b", 1.0, 1.5, 0.03), measured("a", 2.0, 0.7, 0.05),
            measured("a", 0.0, 9.0, 9.0, streams=4))  # fmt: skip
    comparison = Comparison((), None, Limits(ttft_s=1.0), runs)
    picture = against_load(comparison, "x")
    titles = [title for _, _, _, title in circles(picture)]
    assert "a: requests/s offered 2, s 0.7" in titles
    assert "b: requests/s offered 1, ms 30" in titles
    assert "b: requests/s offered 1, requests/s 0" in titles
    assert not any(" 9" in title for title in titles)
    closed = against_load(Comparison((), None, Limits(), runs[3:]), "x")
    assert "a: requests in flight 4, s 9" in [title for _, _, _, title in circles(closed)]


def test_a_frontier_has_a_point_for_each_server():
    runs = (measured("a", 1.0, 0.5, 0.02), measured("b", 1.0, 1.5, 0.01), measured("a", 2.0, 0.5, 0.02))
    picture = frontier(Comparison((), None, Limits(), runs), "x")
    assert len(circles(picture)) == 3
    assert picture.count(">0</text>") == 3, "tokens/s of each"


def test_a_long_legend_has_rows_and_what_is_below_moves_down():
    short, long = (draw("x", [panel(*(Line("n" * 30 + str(i), (Point(1, 1),)) for i in range(n)))]) for n in (1, 6))
    assert len(set(re.findall(r'<rect x="12.0" y="([\d.]+)"', long))) > 1
    heights = [float(re.search(r'viewBox="0 0 \d+ ([\d.]+)"', p)[1]) for p in (short, long)]
    assert heights[1] > heights[0]
