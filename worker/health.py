"""gRPC health of a worker: not serving while its engine makes no progress, or while it drains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.defects import Defects
from baton.server import GrpcServer
from engine.replica import Replica


class Health:
    """Health is about oneself: red while the engine is wedged; a draining worker is well, but not ready."""

    def __init__(
        self,
        server: GrpcServer,
        replica: Replica,
        is_draining: Callable[[], bool],
        stall_limit_s: float,
        defects: Defects,
    ) -> None:
        self._server = server
        self._replica = replica
        self._is_draining = is_draining
        self._stall_limit_s = stall_limit_s
        self._defects = defects
        self._is_well = True

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._stall_limit_s / 4))
            with self._defects.contained("health"):
                await self._tell()

    async def _tell(self) -> None:
        is_well = self._replica.stalled_s < self._stall_limit_s
        if is_well != self._is_well:
            await self._server.set_live(is_well)
            await self._server.set_serving(is_well and not self._is_draining())
            self._is_well = is_well
