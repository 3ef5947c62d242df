"""Profiles: lines through measured steps, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from baton.errors import BadConfig
from engine.step import StepShape
from planner.fitted import FittedTimes, Line, Measured, Point, Transfers, fitted, fitted_transfers, read, write

LINE = Line(0.01, 1e-4, 2e-8, 1e-3, 1e-6)
SHAPES = (
    *(StepShape().with_prompt(0, tokens) for tokens in (1, 63, 512, 2048)),
    *(StepShape(num_decoding=n, num_kv_tokens=n * kv) for n in (1, 4, 16) for kv in (100, 1000)),
)


def _points(noise: float = 0.0) -> tuple[Point, ...]:
    rng = Random(1)
    return tuple(Point(shape, LINE.step_s(shape) * (1 + rng.uniform(-noise, noise))) for shape in SHAPES)


def _measured(noise: float = 0.0) -> Measured:
    points = _points(noise)
    return Measured("m", "cpu", "1.0", fitted(points), points, Transfers(1e-3, 1e9))


def test_the_line_that_steps_were_made_of_is_found() -> None:
    found = fitted(_points())
    for name in LINE.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(LINE, name), rel=1e-3)
    assert _measured().median_error < 1e-4


def test_with_noise_the_errors_are_told_and_no_coefficient_is_negative() -> None:
    measured = _measured(0.05)
    assert 0 < measured.median_error < 0.05
    assert measured.median_error <= abs(measured.worst_error) < 0.15
    assert min(getattr(measured.line, name) for name in LINE.__slots__) >= 0
    falling = [Point(StepShape(num_decoding=n, num_kv_tokens=100), 1 / n) for n in (1, 2, 4)]
    assert fitted(falling).sequence_s == 0


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
    times = FittedTimes(_measured())
    assert times.step_s(StepShape()) == 0
    times.step_s(SHAPES[0])
    assert times.warnings == ()
    times.step_s(StepShape(num_decoding=32, num_kv_tokens=100))
    assert times.warnings == ("the profile of m is extrapolated: sequences of a step up to 32, measured are 16",)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    measured = _measured(0.05)
    write(tmp_path / "p.json", measured)
    assert read(tmp_path / "p.json") == measured
    with pytest.raises(BadConfig, match="cannot be written"):
        write(tmp_path / "nowhere" / "p.json", measured)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "no profile of format 1"),
        ({"points": []}, "damaged: 'no points'"),
        ({"points": None}, "damaged"),
        ({"line": {"base_s": 1}}, "damaged"),
        ({"line": {**dict.fromkeys(LINE.__slots__, 1), "base_s": -1}}, "-1 is no number from 0 on"),
        ({"transfers": {"latency_s": 0, "bytes_s": 0}}, "0 is no number"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(change: dict[str, object], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write(path, _measured())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadConfig, match=complaint):
        read(path)
    path.write_text("[")
    with pytest.raises(BadConfig, match="cannot be read"):
        read(path)
