"""One design at one rate, and the highest rate of one design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.design import Design
from planner.energy import Bill, bill
from planner.profiles import simulated
from planner.search.question import Question, missed
from planner.summary import Summary, summarize


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


Trier = Callable[[Design, float], Trial]


def trier(question: Question) -> Trier:
    """By simulation."""

    def run_one(design: Design, rate: float) -> Trial:
        work = question.source.at(rate)
        run, alone = simulated(question.profile, work, design, question.model, question.tensor_parallel, question.known)
        summary = summarize(run, alone)
        return Trial(design, rate, summary, bill(run), missed(summary, question.slos), run.warnings)

    return run_one


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
