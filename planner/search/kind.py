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

from planner.design import Design
from planner.search.question import Column, Goal, Kind, Question
from planner.search.trial import Trial, Trier, highest

# At these shares of the best rate the cheapest designs are searched for the fronts, and the best design is measured.
_FRONT_SHARES = (0.25, 0.5, 0.75, 1.0)
_LATENCY_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)
# Where the search for a rate begins, in requests a second for each machine: the paper's designs reach 1 to 3.
_GUESS = 1.5

_Key = tuple[float, float, int, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """``best``: None if no design meets the objectives. ``is_bounded``: it met them at the highest rate that was asked
    for. Of the rest only what was asked for is there."""

    kind: Kind
    best: Trial | None
    is_bounded: bool
    grid: int
    # All that was run, in order.
    trials: tuple[Trial, ...]
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
        self, question: Question, kind: Kind, run_one: Trier, tick: Callable[[int], None] = lambda parts: None
    ) -> None:
        self._question, self._kind, self._run_one, self._tick = question, kind, run_one, tick
        self._columns = tuple(kind.columns(question.limits))
        self._done: dict[tuple[int, int, float], Trial] = {}
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
        return Answer(self._kind, best, is_bounded, grid, tuple(self._done.values()), by_cost, by_power, latencies)

    def highest_rate(self) -> int:
        """In steps; 0: no design meets the objectives at the first. A design is first tried just above the best so far,
        and dropped if it misses there."""
        best = 0
        for column in _middle_first(_largest(self._columns)):
            num_machines = self._kind.design(column.prompt, column.high).num_machines
            guess = best + 1 if best else round(_GUESS * num_machines / self._question.rate_step)
            meets = partial(self._meets_steps, column.prompt, column.high)
            best = highest(meets, self._max_steps, low=best, guess=guess)
            self._done_with(1)
        return best

    def least(self, rate: float, key: Callable[[Design, int], _Key]) -> Trial | None:
        """The design with the least key that meets the objectives at a rate: for each number of prompt machines the
        fewest token machines, by halving, among those that would be better than the best so far."""
        best: tuple[_Key, Trial] | None = None
        for column in _middle_first(self._columns):
            top = column.high
            while best and top >= column.low and key(self._kind.design(column.prompt, top), column.prompt) >= best[0]:
                top -= 1
            if top >= column.low and self._meets(column.prompt, top, rate):
                low = column.low - 1
                while top - low > 1:
                    middle = (low + top) // 2
                    if self._meets(column.prompt, middle, rate):
                        top = middle
                    else:
                        low = middle
                found = self._done[column.prompt, top, rate]
                best = key(found.design, column.prompt), found
            self._done_with(1)
        return best[1] if best else None

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
        return by_cost, by_power, tuple(self._run_one(best.design, rate) for rate in asked)

    def _meets_steps(self, prompt: int, token: int, steps: int) -> bool:
        return self._meets(prompt, token, steps * self._question.rate_step)

    def _meets(self, prompt: int, token: int, rate: float) -> bool:
        """Without a run if it was run before, or if it is left out."""
        place = (prompt, token, rate)
        if place not in self._done:
            if any(
                not trial.is_met and p >= prompt and t >= token and r <= rate for (p, t, r), trial in self._done.items()
            ):
                return False
            self._done[place] = self._run_one(self._kind.design(prompt, token), rate)
        return self._done[place].is_met

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


def _middle_first(columns: Iterable[Column]) -> list[Column]:
    """The best design is seldom at an end, and the sooner it is found, the more are left out."""
    listed = sorted(columns, key=lambda each: each.prompt)
    middle = (len(listed) - 1) / 2
    return [column for _, column in sorted(enumerate(listed), key=lambda each: (abs(each[0] - middle), each[0]))]
