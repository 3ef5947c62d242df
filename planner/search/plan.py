"""The answers for all kinds of designs, and whether splitting pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import BadConfig
from planner.search import processes
from planner.search.kind import Answer, KindSearch
from planner.search.question import Goal, Question
from planner.search.trial import Simulations, Trial

_Key = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """``answers``: one for each kind, in the question's order."""

    question: Question
    answers: tuple[Answer, ...]

    @property
    def best(self) -> Answer | None:
        """None: no design meets the objectives."""
        return self._best(self.answers)

    @property
    def best_mixed(self) -> Answer | None:
        return self._best(tuple(answer for answer in self.answers if answer.kind.token is None))

    @property
    def verdict(self) -> str:
        """Whether splitting prompts and tokens pays, in a sentence."""
        best, mixed = self.best, self.best_mixed
        if best is None or best.best is None:
            return "no design within the limits meets the objectives"
        if best.kind.token is None:
            return "splitting does not pay: mixed machines do as well or better"
        if mixed is None or mixed.best is None:
            return "splitting pays: no mixed design within the limits meets the objectives"
        ours, theirs, goal = best.best, mixed.best, self.question.goal
        gained, least = _merit(goal, ours), _merit(goal, theirs)
        if gained[0] == least[0]:
            return f"splitting does not pay in {goal.value}: mixed machines reach the same, at more cost or power"
        if goal is Goal.THROUGHPUT:
            return f"splitting pays: {ours.rate / theirs.rate:.2f} times the rate of the best mixed design"
        return f"splitting pays: {100 * (1 - gained[0] / least[0]):.0f} % less {goal.value} than the best mixed design"

    def _best(self, answers: tuple[Answer, ...]) -> Answer | None:
        """Of equal ones a mixed design, which is simpler; then the first."""
        found = [(answer.best, answer) for answer in answers if answer.best]
        if not found:
            return None
        return min(found, key=lambda each: (_merit(self.question.goal, each[0]), each[1].kind.token is not None))[1]


def _merit(goal: Goal, trial: Trial) -> _Key:
    """Less is better."""
    dollars, power = trial.design.dollars_per_hour, trial.design.power_units
    return {
        Goal.THROUGHPUT: (-trial.rate, dollars, power),
        Goal.COST: (dollars, power, -trial.rate),
        Goal.POWER: (power, dollars, -trial.rate),
    }[goal]


def num_parts(question: Question) -> int:
    """Of all kinds, for a progress bar. Raises BadConfig if the limits leave no design."""
    parts = sum(KindSearch(question, kind, Simulations(question)).num_parts for kind in question.kinds)
    if not parts:
        raise BadConfig(
            "no design is within the limits: expected higher budgets or maxima, or lower minima", param="limits"
        )
    return parts


def search(question: Question, workers: int = 1, tick: Callable[[int], None] = lambda parts: None) -> Plan:
    """The result does not depend on ``workers``: a kind is searched in one process. Raises BadConfig."""
    num_parts(question)
    if workers == 1 or len(question.kinds) == 1:
        return Plan(question, tuple(processes.answer(question, kind, tick) for kind in question.kinds))
    return Plan(question, processes.answers(question, workers, tick))
