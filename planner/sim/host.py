"""A host whose processors several engines share: what they compute at the same time takes longer."""

from __future__ import annotations

from typing import Protocol

from engine.step import StepShape
from planner.fitted import Sharing


class Tenant(Protocol):
    def disturbed(self) -> None:
        """Others have begun or ended."""


class Host:
    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        # Those that compute, in the order they began, for the order of events.
        self._busy: dict[Tenant, None] = {}

    def factor(self, tenant: Tenant, shape: StepShape) -> float:
        """How many times as long a step of it takes now."""
        return self._sharing.factor(shape, len(self._busy) - (tenant in self._busy))

    def changed(self, tenant: Tenant, *, is_busy: bool) -> None:
        if (tenant in self._busy) is is_busy:
            return
        if is_busy:
            self._busy[tenant] = None
        else:
            del self._busy[tenant]
        for other in list(self._busy):
            if other is not tenant:
                other.disturbed()
