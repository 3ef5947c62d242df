"""Designs whose highest rate is known, and a small workload, for searches."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from baton.types import Role
from planner.design import Design
from planner.energy import Bill
from planner.search.trial import Trial
from planner.summary import Summary
from planner.workload import Request, Workload

LENGTHS = Workload("few", tuple(Request(i, float(i), 400 + 300 * (i % 5), 20 + 30 * (i % 4)) for i in range(20)))
_NO_BILL = Bill(0.0, 0.0, 0.0, 0.0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Raising:
    """A source that raises; None: it kills its process."""

    error: Exception | None
    name: str = "raising"

    def at(self, rate: float) -> Workload:
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise self.error or AssertionError("it was not killed")


class Known:
    """Designs that meet the objectives up to a rate; it counts what is run."""

    def __init__(self, highest_rate: Callable[[int, int], float]) -> None:
        self._highest_rate = highest_rate
        self.designs: list[tuple[Design, float]] = []

    def run(self, design: Design, rate: float) -> Trial:
        self.designs.append((design, rate))
        prompt = design.num_machines - design.count(Role.DECODE)
        missed = () if rate <= self._highest_rate(prompt, design.count(Role.DECODE)) else ("TTFT_s:p50:1",)
        return Trial(design, rate, Summary({}, (), 1, 1), _NO_BILL, missed)

    def met(self, design: Design, rate: float) -> Trial | None:
        trial = self.run(design, rate)
        return trial if trial.is_met else None
