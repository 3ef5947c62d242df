"""The same workload at any rate: at a higher one the same requests come closer together. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite, log
from random import Random
from typing import Protocol

from baton.errors import BadConfig, quoted
from planner.workload import Workload, drawn

_MAX_TOKENS = 10_000_000


class Source(Protocol):
    @property
    def name(self) -> str: ...

    def at(self, rate: float) -> Workload:
        """``rate``: requests a second. Raises BadConfig if none arrives."""


@dataclass(frozen=True, slots=True)
class Stretched:
    """A trace with its own arrivals, bursts included; None: all of it."""

    workload: Workload
    seconds: float | None

    @property
    def name(self) -> str:
        return f"{self.workload.name}, arrivals stretched"

    def at(self, rate: float) -> Workload:
        work = self.workload.at_rate(rate)
        return work if self.seconds is None else work.until(self.seconds)


@dataclass(frozen=True, slots=True)
class Redrawn:
    """Poisson arrivals with the lengths of a trace. One seed draws the same requests at each rate: the intervals
    shrink, and more requests follow at the end."""

    workload: Workload
    seconds: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.workload.name} drawn for {self.seconds:g} s, seed {self.seed}"

    def at(self, rate: float) -> Workload:
        return self.workload.redrawn(rate=rate, seconds=self.seconds, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole numbers of tokens: uniform from ``low`` to ``high``; or log-normal about ``median``, if that is not 0, cut
    to the same limits."""

    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    def __call__(self, rng: Random) -> int:
        if not self.median:
            return rng.randint(self.low, self.high)
        # The logarithm is cut, not the result: a wide one would overflow.
        value = rng.gauss(log(self.median), self.sigma)
        return max(self.low, min(self.high, round(exp(min(value, log(self.high))))))


@dataclass(frozen=True, slots=True)
class Distributed:
    """Poisson arrivals; both lengths are drawn independently."""

    prompt_tokens: Lengths
    output_tokens: Lengths
    seconds: float
    seed: int

    @property
    def name(self) -> str:
        return f"drawn lengths for {self.seconds:g} s, seed {self.seed}"

    def at(self, rate: float) -> Workload:
        return drawn(
            f"{self.name}, at {rate:g}/s", self.prompt_tokens, self.output_tokens,
            rate=rate, seconds=self.seconds, seed=self.seed,
        )  # fmt: skip


def lengths(text: str, option: str) -> Lengths:
    """From 512, 128-2048, or lognormal:MEDIAN:SIGMA. Raises BadConfig."""
    try:
        if text.startswith("lognormal:"):
            median, sigma = map(float, text.removeprefix("lognormal:").split(":"))
            if isfinite(sigma) and sigma >= 0 and 1 <= median <= _MAX_TOKENS:
                return Lengths(1, _MAX_TOKENS, median, sigma)
        else:
            low, _, high = text.partition("-")
            found = Lengths(int(low), int(high or low))
            if 1 <= found.low <= found.high <= _MAX_TOKENS:
                return found
    except ValueError:
        pass  # Not of the form: said below.
    raise BadConfig(
        f"{option} is {quoted(text)}, expected tokens from 1 to {_MAX_TOKENS:,}: 512, 128-2048 (uniform) or "
        "lognormal:MEDIAN:SIGMA, such as lognormal:1000:0.8",
        param=option,
    )
