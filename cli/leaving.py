"""Drives how a worker leaves: signals and requests in, the time of its going out. Decides nothing; see cli/drain."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

from baton.clock import Clock
from cli import drain


class Leaving:
    """``on_refuse_new`` is called at most once; ``closing`` ends when it is time to go."""

    def __init__(self, config: drain.DrainConfig, clock: Clock) -> None:
        self._machine = drain.Departure(config)
        self._clock = clock
        self._changed = asyncio.Event()
        self._closed: drain.Close | None = None
        self.on_refuse_new: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.feed, drain.Signalled())
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def on_event(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.feed(drain.Signalled())

    def feed(self, event: drain.Event) -> None:
        for action in self._machine.handle(event, self._clock.now()):
            match action:
                case drain.RefuseNew():
                    self.on_refuse_new()
                case drain.Close():
                    self._closed = action
        self._changed.set()

    @property
    def is_draining(self) -> bool:
        return self._machine.phase not in (drain.Phase.LOADING, drain.Phase.SERVING)

    def ask(self, grace_s: float) -> float:
        self.feed(drain.DrainAsked(grace_s))
        return self._machine.grace_left_s(self._clock.now())

    async def closing(self) -> drain.Close:
        """Returns when the worker is to go."""
        while self._closed is None:
            self._changed.clear()
            due_at_s = self._machine.due_at_s
            try:
                async with asyncio.timeout(None if due_at_s is None else max(0.0, due_at_s - self._clock.now())):
                    await self._changed.wait()
            except TimeoutError:
                self.feed(drain.Tick())
        return self._closed
