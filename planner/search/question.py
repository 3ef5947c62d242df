"""What is searched for: the goal, the limits that no design may pass, the kinds of designs. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from baton.errors import BadConfig
from baton.types import Role
from planner.design import Design, Group
from planner.machines import Machine
from planner.models import Model
from planner.results import Profile
from planner.search.slos import NINE_SLOS, Slo
from planner.search.source import Source

# Budgets are often stated as so many machines, and sums of the same prices in another order differ by their rounding.
_ROUNDING = 1e-9


class Goal(Enum):
    """THROUGHPUT: the highest rate within the limits, and of the designs that have it the cheapest. COST and POWER: the
    least of it at a given rate."""

    THROUGHPUT = "throughput"
    COST = "cost"
    POWER = "power"


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers of machines, both ends included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise BadConfig(
                f"from {self.low} to {self.high} machines: expected a minimum of at least 0 and a maximum of at least "
                "the minimum",
                param="machines",
            )


@dataclass(frozen=True, slots=True)
class Limits:
    """No design passes them; None: no limit. ``prompt`` and ``token`` are the pools of a split design; ``machines`` is
    of both together, and of mixed ones."""

    dollars_per_hour: float | None = None
    power_units: float | None = None
    machines: Range = field(default_factory=lambda: Range(1, 200))
    prompt: Range = field(default_factory=lambda: Range(1, 200))
    token: Range = field(default_factory=lambda: Range(1, 200))
    # Numbers of prompt machines are multiples of it: a coarser grid.
    prompt_step: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if self.prompt_step < 1:
            raise BadConfig(f"steps of {self.prompt_step} prompt machines: expected at least 1", param="prompt_step")

    def can_pay(self, design: Design) -> bool:
        """Whether it is within the budgets."""
        pairs = ((design.dollars_per_hour, self.dollars_per_hour), (design.power_units, self.power_units))
        return all(limit is None or value <= limit * (1 + _ROUNDING) for value, limit in pairs)


@dataclass(frozen=True, slots=True)
class Column:
    """Designs with so many prompt machines and from ``low`` to ``high`` token machines; all mixed ones are a
    column, by their number."""

    prompt: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Kind:
    """Designs of the same machine types; without a token machine they are mixed."""

    prompt: Machine
    token: Machine | None

    @property
    def name(self) -> str:
        if self.token is None:
            return f"{self.prompt.name} mixed"
        return f"{self.prompt.name} + {self.token.name}"

    def design(self, prompt: int, token: int) -> Design:
        if self.token is None:
            return Design((Group(Role.MIXED, self.prompt, token),))
        return Design((Group(Role.PREFILL, self.prompt, prompt), Group(Role.DECODE, self.token, token)))

    def columns(self, limits: Limits) -> Iterator[Column]:
        """All designs within the limits, by rising number of prompt machines."""
        is_mixed = self.token is None
        prompts, tokens = (Range(0, 0), limits.machines) if is_mixed else (limits.prompt, limits.token)
        # A pool of a split design has a machine, whatever the minimum is.
        least, step = 0 if is_mixed else max(1, prompts.low), limits.prompt_step
        for prompt in range(-(-least // step) * step, min(prompts.high, limits.machines.high) + 1, step):
            low = max(1, tokens.low, limits.machines.low - prompt)
            counts = range(low, min(tokens.high, limits.machines.high - prompt) + 1)
            num_paid = bisect_left(counts, True, key=partial(self._is_beyond, limits, prompt))
            if num_paid:
                yield Column(prompt, low, low + num_paid - 1)

    def _is_beyond(self, limits: Limits, prompt: int, token: int) -> bool:
        return not limits.can_pay(self.design(prompt, token))


def kinds(machines: Iterable[Machine], pairs: Iterable[tuple[Machine, Machine]]) -> tuple[Kind, ...]:
    """Mixed ones of each machine, so that what does not split is always compared; and ``pairs``, or else all."""
    listed = tuple(machines)
    split = tuple(pairs) or tuple((prompt, token) for prompt in listed for token in listed)
    named = dict.fromkeys((*listed, *(machine for pair in split for machine in pair)))
    return (*(Kind(*pair) for pair in dict.fromkeys(split)), *(Kind(machine, None) for machine in named))


@dataclass(frozen=True, slots=True)
class Question:
    """``rate`` is the goal's if it is COST or POWER. Rates are tried in multiples of ``rate_step``."""

    source: Source
    profile: Profile
    model: Model
    tensor_parallel: int
    known: Mapping[str, Machine]
    kinds: tuple[Kind, ...]
    goal: Goal = Goal.THROUGHPUT
    rate: float | None = None
    limits: Limits = field(default_factory=Limits)
    slos: tuple[Slo, ...] = NINE_SLOS
    rate_step: float = 1.0
    max_rate: float = 10_000.0
    # Whether fronts and latencies are asked for as well: pictures need them.
    has_fronts: bool = False

    def __post_init__(self) -> None:
        if self.goal is Goal.THROUGHPUT and self.rate is not None:
            raise BadConfig(
                f"a rate of {self.rate:g} is given, and the goal throughput searches for the rate: expected none, or "
                "the goal cost or power",
                param="rate",
            )
        if self.goal is not Goal.THROUGHPUT and self.rate is None:
            raise BadConfig(
                f"the goal {self.goal.value} has no rate: expected one, which the design has to carry", param="rate"
            )
        if not 0 < self.rate_step <= self.max_rate < float("inf"):
            raise BadConfig(
                f"rates in steps of {self.rate_step:g} up to {self.max_rate:g}: expected a step above 0 and at most "
                "the highest rate",
                param="rate_step",
            )
