"""Time limits that do not count time in which this process itself was stalled and could not read."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType

from baton.clock import MonotonicClock, catch_up_s


class patient_timeout:  # noqa: N801 - used as asyncio.timeout is
    """As asyncio.timeout, but if the event loop was late, pending input is read before the limit applies."""

    __slots__ = ("_delay_s", "_handle", "_limit", "_loop")

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._limit = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._limit.__aenter__()
        self._arm(self._delay_s)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.cancel()
        # Raises TimeoutError if the limit was reached.
        await self._limit.__aexit__(kind, error, trace)

    def _arm(self, delay_s: float) -> None:
        self._handle = self._loop.call_later(delay_s, self._look, self._loop.time() + delay_s)

    def _look(self, due_s: float) -> None:
        now = self._loop.time()
        more_s = catch_up_s(now - due_s)
        if more_s:
            self._arm(more_s)
        else:
            self._limit.reschedule(now)


def patient_wait(event: threading.Event, limit_s: float) -> bool:
    """As ``event.wait``, but a thread that is woken late gives the other threads time to set the event. From any thread
    but the event loop's."""
    clock = MonotonicClock()
    while True:
        due_s = clock.now() + limit_s
        if event.wait(limit_s):
            return True
        limit_s = catch_up_s(clock.now() - due_s)
        if not limit_s:
            return False
