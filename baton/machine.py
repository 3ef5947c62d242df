"""What a pure machine is: ``handle(event, now) -> actions`` and a deadline, without I/O, clock or randomness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

_EventIn = TypeVar("_EventIn", contravariant=True)
_ActionOut = TypeVar("_ActionOut", covariant=True)


@dataclass(frozen=True, slots=True)
class Tick:
    """A machine's deadline has passed. For ``late_s`` after it was due, this process may have read nothing."""

    late_s: float = 0.0


class Machine(Protocol[_EventIn, _ActionOut]):
    @property
    def wake_at_s(self) -> float | None:
        """When Tick is due; None if no deadline is pending."""

    def handle(self, event: _EventIn, now: float, /) -> Sequence[_ActionOut]: ...
