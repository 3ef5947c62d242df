"""Drives `worker.departure`: signals and requests in, the time to leave out. Decides nothing itself."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

from baton.clock import Clock
from worker import departure


class Leaving:
    """``on_refuse_new`` is called at most once; ``closing`` ends when it is time to go."""

    def __init__(self, config: departure.DrainConfig, clock: Clock) -> None:
        self._machine = departure.Departure(config)
        self._clock = clock
        self._changed = asyncio.Event()
        self._closed: departure.Close | None = None
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

    async def on_event(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.feed(departure.Signalled())

    def feed(self, event: departure.Event) -> None:
        for action in self._machine.handle(event, self._clock.now()):
            match action:
                case departure.RefuseNew():
                    self.on_refuse_new()
                case departure.Close():
                    self._closed = action
        self._changed.set()

    @property
    def is_draining(self) -> bool:
        return self._machine.phase not in (departure.Phase.LOADING, departure.Phase.SERVING)

    def ask(self, grace_s: float) -> float:
        self.feed(departure.DrainAsked(grace_s))
        return self._machine.grace_left_s(self._clock.now())

    async def closing(self) -> departure.Close:
        """Returns when the worker is to go."""
        while self._closed is None:
            self._changed.clear()
            due_at_s = self._machine.due_at_s
            try:
                async with asyncio.timeout(None if due_at_s is None else max(0.0, due_at_s - self._clock.now())):
                    await self._changed.wait()
            except TimeoutError:
                self.feed(departure.Tick())
        return self._closed
