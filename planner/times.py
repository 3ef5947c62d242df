"""How long a step of a machine takes: the interface of all performance models. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from baton.types import StepTimes
from engine.step import StepShape


class Times(Protocol):
    """Of one model on one machine. Equal shapes take equal times."""

    @property
    def source(self) -> str:
        """For reports: a table, a data sheet, a profile."""
        ...

    def step_s(self, shape: StepShape) -> float:
        """A step that computes prompt tokens, decodes, or both."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was asked for beyond what was measured, so far."""
        ...


@dataclass(frozen=True, slots=True)
class LinearTimes:
    """A line, as nodes tell of themselves."""

    line: StepTimes
    source: str = "a line"
    warnings: tuple[str, ...] = ()

    def step_s(self, shape: StepShape) -> float:
        return self.line.step_s(shape.num_prompt_tokens, shape.num_decoding, shape.num_kv_tokens)
