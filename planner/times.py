"""How long a step of a machine takes: the interface of all performance models. Pure."""

from __future__ import annotations

from typing import Protocol

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
