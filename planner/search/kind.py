"""The best of all designs of one kind, with few of them tried.

It rests on two rules: a design that misses the objectives at a rate misses them at higher rates, and with fewer
machines in either pool. They only leave designs out: what is reported was run itself. Percentiles of short workloads
can break the rules, and then a design that was left out could have met the objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import floor
from typing import NamedTuple

from planner.design import Design
from planner.search.question import Column, Goal, Kind, Question
from planner.search.trial import Trial, Trier, highest

# At these shares of the best rate the cheapest designs are searched for the fronts, and the best design is measured.
_FRONT_SHARES = (0.25, 0.5, 0.75, 1.0)
_LATENCY_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)
# Where the search for a rate begins, in requests a second for each machine: the paper's designs reach 1 to 3.
_GUESS = 1.5

_Key = tuple[float, float, int, int]


class Tried(NamedTuple):
    """Machines of both pools, and whether they met the objectives at the rate."""

    prompt: int
    token: int
    rate: float
    is_met: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """``best``: None if no design meets the objectives. ``is_bounded``: it met them at the highest rate that was asked
    for. Of the rest only what was asked for is there."""

    kind: Kind
    best: Trial | None
    is_bounded: bool
    grid: int
    # In order.
    tried: tuple[Tried, ...]
    # The cheapest designs and those of least power, by rising rate; the best design at several rates.
    by_cost: tuple[Trial, ...] = ()
    by_power: tuple[Trial, ...] = ()
    latencies: tuple[Trial, ...] = ()


def _by_cost(design: Design, prompt: int) -> _Key:
    return (design.dollars_per_hour, design.power_units, design.num_machines, prompt)


def _by_power(design: Design, prompt: int) -> _Key:
    return (design.power_units, design.dollars_per_hour, design.num_machines, prompt)


class KindSearch:
    """``tick`` is given parts of ``num_parts`` as they are done, for a progress bar."""

    def __init__(
        self, question: Question, kind: Kind, trier: Trier, tick: Callable[[int], None] = lambda parts: None
    ) -> None:
        self._question, self._kind, self._trier, self._tick = question, kind, trier, tick
        self._columns = tuple(kind.columns(question.limits))
        # None: it missed the objectives.
        self._done: dict[tuple[int, int, float], Trial | None] = {}
        self._max_steps = floor(question.max_rate / question.rate_step + 1e-9)
        # Columns to look through: once for the least, once for the highest rate, and for the fronts.
        passes = 1 + (question.rate is None) + (2 * len(_FRONT_SHARES) if question.has_fronts else 0)
        self.num_parts = passes * len(self._columns)
        self._num_parts_done = 0

    def answer(self) -> Answer:
        question = self._question
        is_bounded = False
        if question.rate is not None:
            rate = question.rate
            best = self.least(rate, _by_power if question.goal is Goal.POWER else _by_cost)
        else:
            steps = self.highest_rate()
            is_bounded = steps == self._max_steps
            rate = steps * question.rate_step
            best = self.least(rate, _by_cost) if steps else None
        by_cost, by_power, latencies = self._fronts(best) if best and question.has_fronts else ((), (), ())
        self._done_with(self.num_parts - self._num_parts_done)
        grid = sum(column.high - column.low + 1 for column in self._columns)
        tried = tuple(Tried(*place, trial is not None) for place, trial in self._done.items())
        return Answer(self._kind, best, is_bounded, grid, tried, by_cost, by_power, latencies)

    def highest_rate(self) -> int:
        """In steps; 0: no design meets the objectives at the first. A design is first tried just above the best so far,
        and dropped if it misses there."""
        best = 0
        for column in _halves_first(_largest(self._columns)):
            num_machines = self._kind.design(column.prompt, column.high).num_machines
            guess = best + 1 if best else round(_GUESS * num_machines / self._question.rate_step)
            meets = partial(self._meets_steps, column.prompt, column.high)
            best = highest(meets, self._max_steps, low=best, guess=guess)
            self._done_with(1)
        return best

    def least(self, rate: float, key: Callable[[Design, int], _Key]) -> Trial | None:
        """The design with the least key that meets the objectives at a rate: of the columns that could have a better
        one than the best so far, always the middle one is looked through."""

        def key_of(column: Column, token: int) -> _Key:
            return key(self._kind.design(column.prompt, token), column.prompt)

        found = [trial for (_, _, r), trial in self._done.items() if trial is not None and r == rate]
        best = min(found, key=lambda trial: key(trial.design, self._prompt_of(trial)), default=None)
        left = list(self._columns)
        while left:
            num_left = len(left)
            bound = None if best is None else key(best.design, self._prompt_of(best))
            left = [each for each in self._open(left, rate) if bound is None or key_of(each, each.low) < bound]
            if left:
                column = left.pop(len(left) // 2)
                high = column.high
                while bound is not None and key_of(column, high) >= bound:
                    high -= 1
                best = self._fewest_tokens(column, high, rate) or best
            self._done_with(num_left - len(left))
        return best

    def _prompt_of(self, trial: Trial) -> int:
        return trial.design.groups[0].count if self._kind.token else 0

    def _open(self, columns: Iterable[Column], rate: float) -> list[Column]:
        """Without the designs that, by those that were run, miss the objectives at the rate."""
        missed = [(p, t) for (p, t, r), trial in self._done.items() if trial is None and r <= rate]
        rest = []
        for column in columns:
            low = max((t + 1 for p, t in missed if p >= column.prompt), default=0)
            if low <= column.high:
                rest.append(Column(column.prompt, max(column.low, low), column.high))
        return rest

    def _fewest_tokens(self, column: Column, high: int, rate: float) -> Trial | None:
        """Of a column up to ``high``, by halving; None: none meets the objectives."""
        found, low = self._met(column.prompt, high, rate), column.low - 1
        while found is not None and high - low > 1:
            middle = (low + high) // 2
            if (trial := self._met(column.prompt, middle, rate)) is None:
                low = middle
            else:
                found, high = trial, middle
        return found

    def _fronts(self, best: Trial) -> tuple[tuple[Trial, ...], tuple[Trial, ...], tuple[Trial, ...]]:
        """The cheapest designs and those of least power at lower rates; the best design at several."""
        step = self._question.rate_step
        rates, asked = (
            sorted({max(1, round(share * best.rate / step)) * step for share in shares} | {best.rate})
            for shares in (_FRONT_SHARES, _LATENCY_SHARES)
        )
        by_cost, by_power = (
            tuple(found for rate in rates if (found := self.least(rate, key))) for key in (_by_cost, _by_power)
        )
        return by_cost, by_power, tuple(self._trier.run(best.design, rate) for rate in asked)

    def _meets_steps(self, prompt: int, token: int, steps: int) -> bool:
        return self._met(prompt, token, steps * self._question.rate_step) is not None

    def _met(self, prompt: int, token: int, rate: float) -> Trial | None:
        """Without a run if it was run before, or if it is left out."""
        place = (prompt, token, rate)
        if place not in self._done:
            if any(
                trial is None and p >= prompt and t >= token and r <= rate for (p, t, r), trial in self._done.items()
            ):
                return None
            self._done[place] = self._trier.met(self._kind.design(prompt, token), rate)
        return self._done[place]

    def _done_with(self, parts: int) -> None:
        self._num_parts_done += parts
        self._tick(parts)


def _largest(columns: Iterable[Column]) -> Iterable[Column]:
    """Without those whose largest design another's exceeds in both pools."""
    most = -1
    for column in sorted(columns, key=lambda each: -each.prompt):
        if column.high > most:
            most = column.high
            yield column


def _halves_first(columns: Iterable[Column]) -> list[Column]:
    """The middle one, then those at a quarter and three quarters, and so on: the sooner a good one is found, the more
    are left out."""
    listed = sorted(columns, key=lambda each: each.prompt)
    return [listed[place - 1] for place in sorted(range(1, len(listed) + 1), key=lambda place: -(place & -place))]
