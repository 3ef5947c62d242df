"""Watches the registry and reports the listed nodes: at every change, and at intervals in case a notification was lost.

Owns the connection to Redis and the age of the last answer. While Redis is gone it reports nothing, so the last known
view stays: an unreachable registry never removes a node.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing

from baton.clock import Clock
from baton.defects import Defects
from baton.errors import BadConfig, Unavailable
from baton.registry import NodeRecord, Registry
from router.config import WatchConfig

_log = logging.getLogger("baton.router.registry")


class RegistryWatch:
    """``on_listing`` is called on the event loop with all registered nodes."""

    def __init__(
        self,
        registry: Registry,
        on_listing: Callable[[Sequence[NodeRecord]], None],
        config: WatchConfig,
        clock: Clock,
        defects: Defects | None = None,
    ) -> None:
        self._defects = defects or Defects(_log, clock)
        self._registry = registry
        self._on_listing = on_listing
        self._config = config
        self._clock = clock
        self._changed = asyncio.Event()
        self._silent_since_s: float | None = None
        self._told_problems: list[str] = []
        self._is_closing = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Returns after the first attempt, successful or not. Raises BadConfig if Redis denies access."""
        await self._ask()
        self._tasks = [
            asyncio.create_task(self._poll(), name="registry poll"),
            asyncio.create_task(self._listen(), name="registry changes"),
        ]

    async def close(self) -> None:
        # Both: redis-py (8.1) can lose a cancellation when its connection breaks.
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._registry.close()

    async def _poll(self) -> None:
        while not self._is_closing:
            try:
                async with asyncio.timeout(self._config.poll_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self._ask()
            except BadConfig as error:
                # Access was granted before: probably a change of credentials in progress.
                self._note_silence(error.message)
            except Exception as error:
                self._note_silence(self._defects.caught("registry", error).message)

    async def _ask(self) -> None:
        try:
            records, problems = await self._registry.nodes()
        except Unavailable as error:
            self._note_silence(error.message)
            return
        if self._silent_since_s is not None:
            _log.info("the registry answers again after %.1f s", self._clock.now() - self._silent_since_s)
            self._silent_since_s = None
        if problems != self._told_problems:
            self._told_problems = problems
            for problem in problems:
                _log.error("registry: %s", problem)
        self._on_listing(records)

    def _note_silence(self, reason: str) -> None:
        if self._silent_since_s is None:
            self._silent_since_s = self._clock.now()
            _log.warning("%s; the last known nodes stay", reason)

    async def _listen(self) -> None:
        while not self._is_closing:
            try:
                async with aclosing(self._registry.changes(self._config.poll_s)) as changes:
                    async for has_changed in changes:
                        if has_changed:
                            self._changed.set()
                        if self._is_closing:
                            return
            except (Unavailable, BadConfig):
                # Polling meets the same error and logs it.
                await asyncio.sleep(self._config.poll_s)
            except Exception as error:
                self._defects.caught("registry", error)
                await asyncio.sleep(self._config.poll_s)
