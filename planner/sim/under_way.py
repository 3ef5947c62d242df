"""Steps of a simulated engine that are under way: many plain ones at once, or one."""

from __future__ import annotations

from typing import NamedTuple

from engine.step import StepPlan, StepShape


class Bulk(NamedTuple):
    """Plain steps under way; each takes ``growth_s`` longer than the one before."""

    began_s: float
    first_s: float
    growth_s: float
    num_steps: int
    shape: StepShape

    def end_s(self, num_steps: int) -> float:
        return self.began_s + num_steps * self.first_s + self.growth_s * (num_steps * (num_steps - 1) / 2)

    def num_over(self, now: float) -> int:
        """Steps that have ended."""
        count = min(self.num_steps, int((now - self.began_s) / self.first_s))
        while count and self.end_s(count) > now:
            count -= 1
        while count < self.num_steps and self.end_s(count + 1) <= now:
            count += 1
        return count


class Running(NamedTuple):
    """A step that takes ``factor`` times as long as it would alone, as things are."""

    plan: StepPlan
    began_s: float
    end_s: float
    factor: float
