"""What processes export at GET /metrics, at the two ends of a window, and what came in between. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

from baton.errors import Unavailable, quoted

_START = "process_start_time_seconds"
Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Samples:
    """Of one process at one time, by name and labels; histograms by the names of their series."""

    source: str
    values: Mapping[Key, float]

    @classmethod
    def parse(cls, text: str, source: str) -> Samples:
        """Raises Unavailable: it is not the text format of Prometheus."""
        try:
            families = list(text_string_to_metric_families(text))
        except ValueError as error:
            raise Unavailable(
                f"the metrics of {source} cannot be read ({quoted(str(error))}); expected the text format of Prometheus"
            ) from error
        return cls(
            source,
            {(s.name, tuple(sorted(s.labels.items()))): float(s.value) for family in families for s in family.samples},
        )

    def found(self, name: str, labels: Mapping[str, str]) -> Iterator[tuple[Mapping[str, str], float]]:
        """All series of a name that have these labels, and others."""
        wanted = labels.items()
        for (its_name, pairs), value in self.values.items():
            if its_name == name and wanted <= dict(pairs).items():
                yield dict(pairs), value

    def total(self, name: str, **labels: str) -> float | None:
        """None: there is no such series."""
        values = [value for _, value in self.found(name, labels)]
        return sum(values) if values else None


@dataclass(frozen=True, slots=True)
class Window:
    """One process at both ends."""

    before: Samples
    after: Samples

    def __post_init__(self) -> None:
        if self.before.total(_START) != self.after.total(_START):
            raise Unavailable(
                f"{self.after.source} was started anew while it was watched: its counters say nothing of the time "
                "between; ask again"
            )

    def gauge(self, name: str, **labels: str) -> float | None:
        """At the end."""
        return self.after.total(name, **labels)

    def grown(self, name: str, **labels: str) -> float:
        """Of a counter, or of a gauge, which may fall. A series that is not there is 0."""
        return (self.after.total(name, **labels) or 0.0) - (self.before.total(name, **labels) or 0.0)

    def histogram(self, name: str, **labels: str) -> Distribution:
        return Distribution.exported(self, name, labels)


@dataclass(frozen=True, slots=True)
class Distribution:
    """How often which sizes were seen: counts between bounds; the last is of what is above all of them."""

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = (0.0,)
    total: float = 0.0

    @classmethod
    def exported(cls, window: Window, name: str, labels: Mapping[str, str]) -> Distribution:
        """What a histogram counted in the window."""
        upto: defaultdict[float, float] = defaultdict(float)
        for sign, samples in ((1, window.after), (-1, window.before)):
            for pairs, value in samples.found(f"{name}_bucket", labels):
                upto[float(pairs["le"])] += sign * value
        if not upto:
            return cls()
        bounds = sorted(bound for bound in upto if not math.isinf(bound))
        cumulative = [0.0, *(upto[bound] for bound in bounds), upto[math.inf]]
        counts = tuple(max(0.0, above - below) for below, above in pairwise(cumulative))
        return cls(tuple(bounds), counts, window.grown(f"{name}_sum", **labels))

    @classmethod
    def of(cls, values: Iterable[tuple[float, int]], bounds: Sequence[float]) -> Distribution:
        """Of values and how often each was seen, counted between these bounds: as a histogram would show them."""
        counts, total = [0.0] * (len(bounds) + 1), 0.0
        for value, count in values:
            counts[bisect_left(bounds, value)] += count
            total += value * count
        return cls(tuple(bounds), tuple(counts), total)

    @classmethod
    def together(cls, parts: Iterable[Distribution]) -> Distribution:
        """Of several processes with the same bounds."""
        found = [part for part in parts if part.bounds]
        if not found:
            return cls()
        if any(part.bounds != found[0].bounds for part in found):
            raise Unavailable("the routers export histograms with different bounds, expected routers of one version")
        counts = tuple(sum(column) for column in zip(*(part.counts for part in found), strict=True))
        return cls(found[0].bounds, counts, sum(part.total for part in found))

    @property
    def count(self) -> float:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """On a straight line within its bucket, as PromQL has it; above all bounds the highest of them."""
        if not self.count:
            return None
        rank, below, low = share * self.count, 0.0, 0.0
        for high, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return low + (high - low) * (rank - below) / count
            below, low = below + count, high
        return low

    def ranges(self) -> Iterator[tuple[float, float, float]]:
        """Of each bucket that has some: its bounds, and how many. What is above all bounds is taken to be up to half as
        large again."""
        top = (self.bounds[-1] if self.bounds else 1.0) * 1.5
        for low, high, count in zip((0.0, *self.bounds), (*self.bounds, top), self.counts, strict=True):
            if count:
                yield low, high, count
