"""One end of a control channel: messages that wait to be written, the carrying of both directions, and the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Messages waiting for a slow peer; with more the channel is given up.
_MAX_WAITING = 4096


class Outbox(Generic[T]):
    """``lost``: why the channel is given up, once it is."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[T | None] = asyncio.Queue(_MAX_WAITING)
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def put(self, message: T) -> None:
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self.lose(f"{_MAX_WAITING} messages were not taken")

    def lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)

    async def carry(
        self,
        read: Coroutine[Any, Any, None],
        write: Callable[[T], Coroutine[Any, Any, None]],
        *,
        last_write_timeout_s: float,
    ) -> list[BaseException | None]:
        """Read and write until one of both ends or the channel is lost; how reading and writing ended. A write under
        way is waited for so long before it is cancelled."""
        loop = asyncio.get_running_loop()
        reading, writing = loop.create_task(read), loop.create_task(self._write(write))
        try:
            waited_for: set[asyncio.Future[Any]] = {reading, writing, self.lost}
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.QueueFull):
                self._queue.put_nowait(None)
            try:
                await asyncio.wait({writing}, timeout=last_write_timeout_s)
            finally:
                # A cancellation may come here as well: neither task outlives it, and no exception is left unread.
                writing.cancel()
                results = await asyncio.gather(reading, writing, return_exceptions=True)
        return list(results)

    async def _write(self, write: Callable[[T], Coroutine[Any, Any, None]]) -> None:
        while (message := await self._queue.get()) is not None:
            await write(message)
