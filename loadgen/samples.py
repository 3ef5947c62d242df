"""Repeated measurements of one figure, and their percentiles."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Samples:
    """Repeated measurements of one figure."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Samples:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def percentile(self, share: float) -> float:
        """The percentile by the nearest-rank method."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def spread(self) -> float:
        """(largest - smallest) / median, a measure of the noise."""
        return (max(self.values) - min(self.values)) / self.median


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The figures that are told of a distribution, in the unit of its values; all None without values."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        samples = Samples.of(values)
        if not samples.values:
            return cls()
        p50, p90, p99 = (samples.percentile(share) for share in (0.5, 0.9, 0.99))
        return cls(p50, p90, p99, max(samples.values))
