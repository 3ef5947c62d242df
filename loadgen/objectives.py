"""Service level objectives: the nine of Splitwise, which bound slowdowns, and absolute ones, which bound seconds.

A slowdown is a request's time over what a request of its size takes on an idle server. Splitwise asks that nine
percentiles of slowdowns stay within limits, all of them (ISCA 2024, section V).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loadgen.client import Answer
from loadgen.samples import Samples

# (figure, percentile, largest slowdown). TBT is a request's mean time between two tokens.
NINE = (
    ("ttft", 0.50, 2.0), ("ttft", 0.90, 3.0), ("ttft", 0.99, 6.0),
    ("tbt", 0.50, 1.25), ("tbt", 0.90, 1.5), ("tbt", 0.99, 5.0),
    ("e2e", 0.50, 1.25), ("e2e", 0.90, 1.5), ("e2e", 0.99, 5.0),
)  # fmt: skip


_LARGEST = {figure: limit for figure, share, limit in NINE if share == 0.99}


@dataclass(frozen=True, slots=True)
class Point:
    """What one request of that many prompt tokens takes on an idle server."""

    prompt_tokens: int
    ttft_s: float
    tbt_s: float


@dataclass(frozen=True, slots=True)
class Uncontended:
    """Times of single requests by prompt length, ascending; between two points they are interpolated."""

    points: tuple[Point, ...]

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> Uncontended:
        """From answers to single requests: the median of those of a length."""
        by_length: dict[int, list[Answer]] = {}
        for answer in answers:
            by_length.setdefault(answer.request.prompt_tokens, []).append(answer)
        points = []
        for length, found in sorted(by_length.items()):
            tbt = [answer.tbt_s for answer in found if answer.tbt_s is not None]
            if tbt:
                points.append(Point(length, Samples.of(a.ttft_s for a in found).median, Samples.of(tbt).median))
        return cls(tuple(points))

    def ttft_s(self, prompt_tokens: int) -> float:
        return self._at(prompt_tokens, lambda point: point.ttft_s)

    def tbt_s(self, prompt_tokens: int) -> float:
        return self._at(prompt_tokens, lambda point: point.tbt_s)

    def _at(self, tokens: int, value: Callable[[Point], float]) -> float:
        """Beyond the first and the last point: theirs."""
        if tokens <= self.points[0].prompt_tokens:
            return value(self.points[0])
        for left, right in pairwise(self.points):
            if tokens <= right.prompt_tokens:
                share = (tokens - left.prompt_tokens) / (right.prompt_tokens - left.prompt_tokens)
                return value(left) + share * (value(right) - value(left))
        return value(self.points[-1])


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Of one request. ``tbt`` is None for an output of one token."""

    ttft: float
    tbt: float | None
    e2e: float

    @classmethod
    def of(cls, answer: Answer, alone: Uncontended) -> Slowdown:
        ttft_s, tbt_s = (f(answer.request.prompt_tokens) for f in (alone.ttft_s, alone.tbt_s))
        e2e_s = ttft_s + tbt_s * (len(answer.stamps_s) - 1)
        return cls(answer.ttft_s / ttft_s, None if answer.tbt_s is None else answer.tbt_s / tbt_s, answer.e2e_s / e2e_s)

    def value(self, figure: str) -> float | None:
        return {"ttft": self.ttft, "tbt": self.tbt, "e2e": self.e2e}[figure]

    @property
    def is_tolerable(self) -> bool:
        """Within the largest limit of each figure: a request beyond it can meet no percentile."""
        return all((value := self.value(figure)) is None or value <= limit for figure, limit in _LARGEST.items())


@dataclass(frozen=True, slots=True)
class Verdict:
    """One of the nine; ``found`` is None if no request had the figure."""

    figure: str
    percentile: float
    limit: float
    found: float | None

    @property
    def is_met(self) -> bool:
        return self.found is None or self.found <= self.limit


def judge(slowdowns: Sequence[Slowdown]) -> tuple[Verdict, ...]:
    """The nine, for all requests of a run that were answered."""
    verdicts = []
    for figure, share, limit in NINE:
        values = Samples.of(value for each in slowdowns if (value := each.value(figure)) is not None)
        verdicts.append(Verdict(figure, share, limit, values.percentile(share) if values.values else None))
    return tuple(verdicts)


@dataclass(frozen=True, slots=True)
class Limits:
    """Absolute objectives, None where there is none."""

    ttft_s: float | None = None
    tbt_s: float | None = None

    @property
    def is_set(self) -> bool:
        return self.ttft_s is not None or self.tbt_s is not None

    def is_met(self, answer: Answer) -> bool:
        """``tbt_s`` bounds the request's mean, as a request's objective does (TPOT)."""
        in_time = self.ttft_s is None or answer.ttft_s <= self.ttft_s
        return in_time and (self.tbt_s is None or answer.tbt_s is None or answer.tbt_s <= self.tbt_s)
