"""What a Driver does around any machine: order, errors, one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from baton.clock import MonotonicClock
from baton.driver import Driver
from baton.machine import Tick


class Scripted:
    """Answers each event with the actions that the test planned for it."""

    def __init__(self, plan: dict[str, list[str]]) -> None:
        self.plan = plan
        self.heard: list[str | Tick] = []
        self.wake_at_s: float | None = None
        self.on_tick: Callable[[], None] = lambda: None

    def handle(self, event: str | Tick, now: float) -> list[str]:
        self.heard.append(event)
        if isinstance(event, Tick):
            self.on_tick()
            return ["ticked"]
        if event == "bad":
            raise RuntimeError("bad event")
        return self.plan.get(event, [])


def driver(machine: Scripted, perform: Callable[[str], None], errors: list[str]) -> Driver[str | Tick, str]:
    def on_error(about: str | Tick, error: Exception) -> None:
        errors.append(f"{about}: {error}")
        if about == "escapes":
            raise error

    return Driver(machine, perform, MonotonicClock(), on_error=on_error, tick=Tick)


async def test_actions_come_in_order_and_what_they_feed_is_handled_at_once() -> None:
    machine, done = Scripted({"a": ["1", "again", "2"], "b": ["3"]}), list[str]()

    def perform(action: str) -> None:
        done.append(action)
        if action == "again":
            driven.feed("b")

    driven = driver(machine, perform, [])
    driven.feed("a")
    driven.feed("c")
    assert done == ["1", "again", "3", "2"]
    assert machine.heard == ["a", "b", "c"]


async def test_an_error_costs_its_event_or_action_and_nothing_else() -> None:
    machine, done, errors = Scripted({"a": ["1", "raises", "2"], "b": ["escapes", "3"]}), list[str](), list[str]()

    def perform(action: str) -> None:
        if action in ("raises", "escapes"):
            raise ValueError(action)
        done.append(action)

    driven = driver(machine, perform, errors)
    driven.feed("bad")
    driven.feed("a")
    assert done == ["1", "2"]
    with pytest.raises(ValueError, match="escapes"):
        driven.feed("b")
    assert done == ["1", "2"], "what follows an error that reaches the feeder is not performed"
    assert errors == ["bad: bad event", "raises: raises", "escapes: escapes"]


async def test_one_timer_follows_the_machine_and_ends_with_the_driver() -> None:
    clock, machine, ticked = MonotonicClock(), Scripted({}), asyncio.Event()
    driven = driver(machine, lambda action: ticked.set(), [])
    machine.on_tick = lambda: setattr(machine, "wake_at_s", None)
    machine.wake_at_s = clock.now() + 1000.0
    driven.feed("far")
    machine.wake_at_s = due_s = clock.now() + 0.02
    driven.feed("bad")  # an error does not cost the timer
    async with asyncio.timeout(10.0):
        await ticked.wait()
    assert clock.now() >= due_s - 0.005
    (tick,) = [event for event in machine.heard if isinstance(event, Tick)]
    assert 0.0 <= tick.late_s < 10.0
    machine.wake_at_s = clock.now()
    driven.feed("due now")
    driven.close()
    await asyncio.sleep(0.02)
    assert sum(isinstance(event, Tick) for event in machine.heard) == 1
