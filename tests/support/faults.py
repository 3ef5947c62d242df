"""Schedules of faults for tests, and a clock that a test moves."""

from __future__ import annotations

from baton.faults.faults import Elapsed, Faults
from baton.faults.injector import Strike
from baton.faults.plan import Plan


class HandClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def now(self) -> float:
        return self.now_s


class Striking(Faults):
    """Of one node, by the text of a schedule; keeps what struck."""

    def __init__(self, text: str, node: str = "n0", role: str = "mixed", clock: HandClock | None = None) -> None:
        self.strikes: list[Strike] = []
        # Signals that the process would have got.
        self.signals: list[int] = []
        clock = clock or HandClock()
        super().__init__(
            Plan.parse(text, "test"), node, role, clock, elapsed=Elapsed(clock, None),
            kill=lambda _, number: self.signals.append(number), sleep=lambda _: None,
        )  # fmt: skip

    def at(self, *address: object, **more: object) -> Strike | None:
        strike = super().at(*address, **more)  # type: ignore[arg-type]
        if strike is not None:
            self.strikes.append(strike)
        return strike
