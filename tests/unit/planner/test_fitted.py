"""Lines through measured steps, what other nodes of a host add, and transfers."""

from __future__ import annotations

from random import Random

import pytest

from baton.errors import BadConfig
from engine.step import StepShape
from planner.fitted import FittedTimes, Line, Point, Sharing, Transfers, fitted, fitted_transfers

LINE = Line(0.01, 1e-4, 2e-8, 1e-3, 1e-6)
SHAPES = (
    *(StepShape().with_prompt(0, tokens) for tokens in (1, 63, 512, 2048)),
    *(StepShape(num_decoding=n, num_kv_tokens=n * kv) for n in (1, 4, 16) for kv in (100, 1000)),
)


def _points(noise: float = 0.0) -> tuple[Point, ...]:
    rng = Random(1)
    return tuple(Point(shape, LINE.step_s(shape) * (1 + rng.uniform(-noise, noise))) for shape in SHAPES)


def test_the_line_that_steps_were_made_of_is_found() -> None:
    found = fitted(_points())
    for name in LINE.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(LINE, name), rel=1e-3)


def test_with_noise_no_coefficient_is_negative() -> None:
    points = _points(0.05)
    line = fitted(points)
    assert max(abs(line.error(point)) for point in points) < 0.15
    assert min(getattr(line, name) for name in LINE.__slots__) >= 0
    falling = [Point(StepShape(num_decoding=n, num_kv_tokens=100), 1 / n) for n in (1, 2, 4)]
    assert fitted(falling).sequence_s == 0


def test_a_step_that_was_interrupted_is_left_out() -> None:
    points = _points()
    interrupted = Point(points[1].shape, 20 * points[1].seconds)
    assert fitted((*points, interrupted)).base_s == pytest.approx(LINE.base_s, rel=1e-3)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(BadConfig, match="2 measured steps, expected at least 3"):
        fitted(_points()[:2])
    with pytest.raises(BadConfig, match="each with a time above 0"):
        fitted([Point(shape, 0.0) for shape in SHAPES])


def test_transfers_are_a_latency_and_a_rate() -> None:
    found = fitted_transfers([(size, 1e-3 + size / 1e9) for size in (1e5, 1e6, 1e7)])
    assert found is not None
    assert found.latency_s == pytest.approx(1e-3, rel=1e-3)
    assert found.bytes_s == pytest.approx(1e9, rel=1e-3)
    assert fitted_transfers([(1e6, 1e-3), (1e6, 1e-3)]) == Transfers(0.0, pytest.approx(1e9))
    assert fitted_transfers([]) is None


def test_steps_beyond_the_measured_ones_are_told() -> None:
    points = _points()
    times = FittedTimes("m", fitted(points), points)
    assert times.source == "profile of m, 10 steps within 0.0% (median)"
    assert times.step_s(StepShape()) == 0
    times.step_s(SHAPES[0])
    assert times.warnings == ()
    times.step_s(StepShape(num_decoding=32, num_kv_tokens=100))
    assert times.warnings == ("the profile of m is extrapolated: sequences of a step up to 32, measured are 16",)


def test_what_others_add_is_between_what_was_measured_and_no_more_than_beside_the_most() -> None:
    sharing = Sharing(prompt=(1.2, 1.6), decode=(1.5,))
    prompt, decode = StepShape().with_prompt(0, 10), StepShape(num_decoding=1, num_kv_tokens=10)
    assert [sharing.factor(prompt, beside) for beside in (0, 0.5, 1, 1.5, 2, 9)] == pytest.approx(
        [1.0, 1.1, 1.2, 1.4, 1.6, 1.6]
    )
    assert sharing.factor(decode, 2) == 1.5
    # A step of both is one of a prompt.
    assert sharing.factor(prompt._replace(num_decoding=1), 1) == 1.2
    assert sharing
    assert not Sharing()
    assert not Sharing(prompt=(1.0,))
