"""One design at one rate, and the highest rate of one design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from planner.design import Design
from planner.energy import Bill, bill
from planner.profiles import simulated, uncontended
from planner.results import Told, tell_nobody
from planner.search.question import Question
from planner.search.slos import Missed, Watch, missed
from planner.summary import Summary, summarize
from planner.workload import Workload


@dataclass(frozen=True, slots=True)
class Trial:
    """``missed``: what of the objectives is not met."""

    design: Design
    rate: float
    summary: Summary
    bill: Bill
    missed: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def is_met(self) -> bool:
        return not self.missed


class Trier(Protocol):
    def run(self, design: Design, rate: float) -> Trial: ...

    def met(self, design: Design, rate: float) -> Trial | None:
        """None: it misses an objective. Then the run may have ended early."""


class Simulations:
    """Runs what a question is about."""

    def __init__(self, question: Question) -> None:
        self._question = question
        # Many designs follow each other at one rate.
        self._workload: tuple[float, Workload] | None = None

    def _at(self, rate: float) -> Workload:
        if self._workload is None or self._workload[0] != rate:
            self._workload = rate, self._question.source.at(rate)
        return self._workload[1]

    def run(self, design: Design, rate: float) -> Trial:
        return self._run(self._at(rate), design, rate, tell_nobody)

    def met(self, design: Design, rate: float) -> Trial | None:
        question, work = self._question, self._at(rate)
        alone = uncontended(question.profile, question.model, question.tensor_parallel, question.known)
        try:
            trial = self._run(work, design, rate, Watch(work, question.slos, question.profile, alone))
        except Missed:
            return None
        return trial if trial.is_met else None

    def _run(self, work: Workload, design: Design, rate: float, told: Told) -> Trial:
        asked = self._question
        run, alone = simulated(asked.profile, work, design, asked.model, asked.tensor_parallel, asked.known, told)
        summary = summarize(run, alone)
        return Trial(design, rate, summary, bill(run), missed(summary, asked.slos), run.warnings)


def highest(meets: Callable[[int], bool], most: int, *, low: int = 0, guess: int = 1) -> int:
    """The largest of ``low``..``most`` that meets, by growing strides from ``guess``, then by halving. ``low`` is taken
    to meet. What meets need not be all below one number: what is found meets, and the next one does not."""
    high = most + 1
    stride = max(1, guess - low)
    ask = min(low + stride, most)
    while high - low > 1:
        if meets(ask):
            low = ask
        else:
            high = ask
        if high > most:
            ask = min(low + stride, most)
            stride *= 2
        else:
            ask = (low + high) // 2
    return low
