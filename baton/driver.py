"""Runs a pure machine on the event loop: events in, its actions performed in order, one timer for its next deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from baton.clock import Clock
from baton.machine import Machine

Event = TypeVar("Event")
Action = TypeVar("Action")


class Driver(Generic[Event, Action]):
    """Feeds one machine; all calls come from the event loop.

    ``perform`` may feed further events, which are handled at once. ``on_error`` gets the exception and the event or
    action that it is about. What ``on_error`` raises reaches the caller of ``feed``, and the remaining actions are not
    performed; without ``on_error`` every exception does so.
    """

    def __init__(
        self,
        machine: Machine[Event, Action],
        perform: Callable[[Action], None],
        clock: Clock,
        *,
        on_error: Callable[[Event | Action, Exception], None] | None = None,
        tick: Callable[[float], Event] | None = None,
    ) -> None:
        """``tick`` makes the event for a passed deadline from its lateness; a machine without deadlines needs none."""
        self._machine = machine
        self._perform = perform
        self._clock = clock
        self._on_error = on_error or _raise
        self._tick = tick
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for_s: float | None = None

    def feed(self, event: Event) -> None:
        try:
            self._feed(event)
        finally:
            # Whatever was raised: other deadlines of the machine go on.
            if self._tick is not None:
                self._arm()

    def close(self) -> None:
        """No Tick comes any more."""
        self._tick = None
        self._disarm()

    def _feed(self, event: Event) -> None:
        try:
            actions = self._machine.handle(event, self._clock.now())
        except Exception as error:
            self._on_error(event, error)
            return
        for action in actions:
            try:
                self._perform(action)
            except Exception as error:
                self._on_error(action, error)

    def _arm(self) -> None:
        due_s = self._machine.wake_at_s
        if due_s == self._armed_for_s:
            return
        self._disarm()
        if due_s is not None:
            delay_s = max(0.0, due_s - self._clock.now())
            self._armed_for_s = due_s
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_due, due_s)

    def _disarm(self) -> None:
        self._armed_for_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_due(self, due_s: float) -> None:
        self._timer, self._armed_for_s = None, None
        if self._tick is not None:
            self.feed(self._tick(max(0.0, self._clock.now() - due_s)))


def _raise(about: object, error: Exception) -> None:
    raise error
