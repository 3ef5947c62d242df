"""How often which time passed between two tokens: in steps of one per cent, whatever the number of tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

_GROWTH = math.log(1.01)


class Gaps:
    def __init__(self) -> None:
        # By power of 1.01.
        self.counts: Counter[int] = Counter()

    def add(self, seconds: float, count: int) -> None:
        if seconds > 0:
            self.counts[round(math.log(seconds) / _GROWTH)] += count

    @staticmethod
    def total(parts: Iterable[Gaps]) -> tuple[tuple[float, int], ...]:
        """The shortest first."""
        counts: Counter[int] = Counter()
        for part in parts:
            counts.update(part.counts)
        return tuple((math.exp(place * _GROWTH), counts[place]) for place in sorted(counts))
