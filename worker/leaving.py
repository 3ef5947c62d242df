"""Drives `worker.departure`: signals and requests in, the time to leave out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

from baton.clock import Clock
from baton.driver import Driver
from baton.machine import Tick
from worker import departure


class Leaving:
    """``on_refuse_new`` is called at most once; ``closing`` ends when it is time to go."""

    def __init__(self, config: departure.DrainConfig, clock: Clock) -> None:
        self._machine = departure.Departure(config)
        self._clock = clock
        self._closed: asyncio.Future[departure.Close] = asyncio.get_running_loop().create_future()
        self._driver: Driver[departure.Event, departure.Action] = Driver(self._machine, self._perform, clock, tick=Tick)
        self.feed = self._driver.feed
        self.on_refuse_new: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.feed, departure.Signalled())
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
            self._driver.close()

    async def on_event(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.feed(departure.Signalled())

    @property
    def is_draining(self) -> bool:
        return self._machine.phase not in (departure.Phase.LOADING, departure.Phase.SERVING)

    def ask(self, grace_s: float) -> float:
        self.feed(departure.DrainAsked(grace_s))
        return self._machine.grace_left_s(self._clock.now())

    async def closing(self) -> departure.Close:
        """Returns when the worker is to go."""
        return await asyncio.shield(self._closed)

    def _perform(self, action: departure.Action) -> None:
        match action:
            case departure.RefuseNew():
                self.on_refuse_new()
            case departure.Close():
                self._closed.set_result(action)
