"""Latencies of the last minutes in bounded memory, in slices of a few seconds. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

# Buckets grow by a fifth, from 10 us up: a quantile is off by at most 10 %.
_GROWTH = 1.2
_FLOOR_S = 1e-5
_NUM_BUCKETS = 110


class Histogram:
    """Counts by the logarithm of a duration; durations above 1.5 hours share a bucket."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        # Bucket number to count; most buckets stay empty.
        self._counts: dict[int, int] = {}
        self._total = 0

    def add(self, value_s: float, count: int = 1) -> None:
        bucket = 0
        if value_s > _FLOOR_S:
            bucket = min(1 + int(math.log(value_s / _FLOOR_S, _GROWTH)), _NUM_BUCKETS - 1)
        self._counts[bucket] = self._counts.get(bucket, 0) + count
        self._total += count

    def quantile(self, share: float) -> float | None:
        """The middle of the bucket that contains this share of all values; None without values."""
        if not self._total:
            return None
        rank = share * self._total
        for bucket in sorted(self._counts):
            rank -= self._counts[bucket]
            if rank <= 0:
                return _FLOOR_S * _GROWTH ** (bucket - 0.5) if bucket else _FLOOR_S
        return None


class Slice:
    """The sequences that ended in one slice of time."""

    __slots__ = ("num_cached_tokens", "num_prompt_tokens", "num_requests", "num_tokens", "number", "tbt", "ttft")

    def __init__(self, number: int) -> None:
        self.number = number
        self.num_requests = 0
        self.num_tokens = 0
        # Of the sequences that got a token.
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.ttft = Histogram()
        self.tbt = Histogram()

    @property
    def cached_share(self) -> float | None:
        """Of prompt tokens; None without any."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else None


class Window:
    """``num_slices`` whole slices of ``slice_s`` seconds."""

    def __init__(self, slice_s: float = 3.0, num_slices: int = 100) -> None:
        self.slice_s = slice_s
        self._num_slices = num_slices
        # Slices without values are left out.
        self._slices: deque[Slice] = deque(maxlen=num_slices + 1)

    def current(self, now: float) -> Slice:
        """The slice that counts values now."""
        number = int(now // self.slice_s)
        if not self._slices or self._slices[-1].number < number:
            self._slices.append(Slice(number))
        return self._slices[-1]

    def slices(self, now: float) -> Sequence[Slice | None]:
        """Oldest first, None for slices without values; without the current one, which is incomplete and would look
        like a dip."""
        last = int(now // self.slice_s) - 1
        by_number = {x.number: x for x in self._slices}
        return [by_number.get(number) for number in range(last - self._num_slices + 1, last + 1)]
