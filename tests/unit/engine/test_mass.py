"""Probabilities as whole numbers: near enough to the true ones, and the same bits in whatever parts they are taken."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.mass import DRAWN_BITS, LOG2E, REPORTED_BITS, drawn_masses, quantile, reported_mass, share

VALUES = (np.random.default_rng(0).normal(size=50_000) * 4).astype(np.float32)
BEST = VALUES.max()
KNOWN = [68719476736, 41680470016, 25280483328, 48802832, 3, 0, 0, 0]
KNOWN_SUM = 34746683342681


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_masses_are_probabilities(temperature: float) -> None:
    found = drawn_masses(VALUES, BEST, np.float32(LOG2E / temperature))
    exact = np.exp((VALUES.astype(np.float64) - float(BEST)) / temperature) * 2.0**DRAWN_BITS
    assert found.max() == 2**DRAWN_BITS
    # Half a unit by rounding, and float32's share of the distance to the best.
    assert (np.abs(found - exact) <= 0.5 + exact * 4e-6).all()
    assert int(found.sum()) == pytest.approx(exact.sum(), rel=1e-6)
    parts = [drawn_masses(part, BEST, np.float32(LOG2E / temperature)) for part in np.array_split(VALUES, 7)]
    assert (np.concatenate(parts) == found).all()


def test_the_reported_sum_is_exact_to_eleven_digits() -> None:
    exact = math.fsum(np.exp(VALUES.astype(np.float64) - float(BEST)))
    assert reported_mass(VALUES, BEST) / 2**REPORTED_BITS == pytest.approx(exact, rel=1e-11)
    halves = [reported_mass(part, BEST) for part in np.array_split(VALUES, 2)]
    assert sum(halves) == reported_mass(VALUES, BEST)


def test_known_masses() -> None:
    """The numbers themselves: any other would draw other tokens."""
    values = np.array([0.0, -0.5, -1.0, -7.25, -24.0, -26.0, -1e30, -np.inf], dtype=np.float32)
    assert drawn_masses(values, np.float32(0), np.float32(LOG2E)).tolist() == KNOWN
    assert reported_mass(values[:4], np.float32(0)) == KNOWN_SUM


def test_quantiles_and_shares_stay_inside() -> None:
    assert quantile(0.0, 5) == 0
    assert quantile(1 - 2.0**-53, 3) == 2
    assert quantile(1 - 2.0**-53, 2**60 + 1) <= 2**60
    assert (share(1e-9, 7), share(0.5, 7), share(1.0, 7)) == (1, 4, 7)
