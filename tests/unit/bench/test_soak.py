"""The soak's own parts: the line through what processes hold, and its requests."""

from __future__ import annotations

import math
import random

import pytest

from bench.soak import jobs, slope_of


def test_a_line_is_found_with_its_error() -> None:
    x = [float(i) for i in range(50)]
    assert slope_of(x, [3.0 + 2.0 * a for a in x]) == pytest.approx((2.0, 0.0), abs=1e-9)
    rng = random.Random(1)
    slope, error = slope_of(x, [5.0 + rng.gauss(0.0, 1.0) for _ in x])
    assert error > 0
    assert abs(slope) < 3 * error
    assert all(math.isnan(part) for part in slope_of([1.0, 2.0], [1.0, 2.0]))


def test_requests_are_the_same_in_every_run_and_half_are_sampled() -> None:
    made = jobs(40, seed=1)
    assert made == jobs(40, seed=1)
    assert sum(job.settings["temperature"] > 0 for job in made) == 20
    assert all(1 <= job.settings["max_tokens"] <= 8 for job in made)
