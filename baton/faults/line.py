"""One direction of one connection, through which messages go in a process that has a schedule of faults."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from baton.faults.faults import Faults
from baton.faults.injector import Strike
from baton.faults.kinds import FaultKind, Layer

T = TypeVar("T")

# Messages that are held back; with more the connection is cut.
_MAX_HELD = 4096


class Line(Generic[T]):
    """What is ``put`` comes out of ``deliver``, unless a fault strikes. All calls on the event loop.

    ``cut``: why the connection is to be cut, once it is; the owner does it. ``corrupt`` damages a message.
    """

    def __init__(
        self,
        faults: Faults,
        layer: Layer,
        peer: str,
        deliver: Callable[[T], None],
        *,
        on_cut: Callable[[str], None] | None = None,
        corrupt: Callable[[T, int], T] | None = None,
    ) -> None:
        self._faults = faults
        self._layer = layer
        self._peer = peer
        self._deliver = deliver
        self._on_cut = on_cut
        self._corrupt = corrupt
        self._loop = asyncio.get_running_loop()
        self.cut: asyncio.Future[str] = self._loop.create_future()
        self._timers: set[asyncio.TimerHandle] = set()
        # To come after the next message.
        self._swapped: deque[T] = deque()
        # While the line stands still, what waits for it, in order.
        self._waiting: deque[T] = deque()
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._is_closed = False

    def put(self, message: T, kind: str, request: str = "") -> None:
        """Raises what ``deliver`` raises, if the message goes through at once."""
        strike = self._faults.at(self._layer, kind, self._peer, request)
        match strike and strike.fault:
            case None:
                self._pass_on(message)
            case FaultKind.DELAY:
                self._after(strike, lambda: self._pass_late(message))
                return
            case FaultKind.REORDER:
                self._swapped.append(message)
                self._after(strike, self._pass_swapped)
                return
            case FaultKind.DISCONNECT:
                self._cut(f"{kind} was to be sent")
                return
            case FaultKind.STALL:
                self._is_open.clear()
                self._after(strike, self._go_on)
                self._pass_on(message)
            case FaultKind.CORRUPT:
                assert strike is not None
                assert self._corrupt is not None, "the layer takes it"
                self._pass_on(self._corrupt(message, strike.position))
            case FaultKind.DUPLICATE:
                self._pass_on(message)
                self._pass_on(message)
            case FaultKind.DROP:
                pass
        self._pass_swapped()

    async def open(self) -> None:
        """For what is sent beside messages: returns when the line does not stand still."""
        await self._is_open.wait()

    def close(self) -> None:
        """The connection is over: nothing comes out any more."""
        self._is_closed = True
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._waiting.clear()
        self._swapped.clear()
        self._is_open.set()

    def _pass_on(self, message: T) -> None:
        if self._is_closed or self.cut.done():
            return
        if self._is_open.is_set():
            self._deliver(message)
        else:
            self._hold(self._waiting, message)

    def _pass_late(self, message: T) -> None:
        """Without a caller who could be told that it cannot be delivered."""
        try:
            self._pass_on(message)
        except Exception as error:
            self._cut(str(error))

    def _pass_swapped(self) -> None:
        while self._swapped:
            self._pass_late(self._swapped.popleft())

    def _go_on(self) -> None:
        self._is_open.set()
        while self._waiting and not self._is_closed:
            self._pass_late(self._waiting.popleft())

    def _hold(self, where: deque[T], message: T) -> None:
        if len(where) >= _MAX_HELD:
            self._cut(f"{_MAX_HELD} messages were held back")
        else:
            where.append(message)

    def _after(self, strike: Strike | None, act: Callable[[], None]) -> None:
        assert strike is not None
        if len(self._timers) >= _MAX_HELD:
            self._cut(f"{_MAX_HELD} messages were held back")
            return

        def on_time() -> None:
            self._timers.discard(timer)
            act()

        timer = self._loop.call_later(strike.seconds, on_time)
        self._timers.add(timer)

    def _cut(self, why: str) -> None:
        if self._is_closed or self.cut.done():
            return
        reason = f"a fault of the schedule cut the connection: {why}"
        self.cut.set_result(reason)
        if self._on_cut is not None:
            self._on_cut(reason)
