"""Same host, device to device: the receiver passes a handle of its KV allocation over an abstract unix socket, the
sender's device copies into it.

One-sided like shm, with one difference: the end of a dead process's socket does not say that its device has stopped.
A writer is gone when it has said so on the socket, or when its process has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import BatonError, TransferFailed
from baton.patience import patient_timeout
from baton.types import NodeDescription
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.devices.interface import HANDLE_BYTES, Device
from kvtransfer.hashing import cut
from kvtransfer.plan import ByteRange
from kvtransfer.protocol.messages import WrittenRange
from kvtransfer.transports.interface import Dial, PlaneEvents, PlaneSite
from kvtransfer.transports.local_plane import LocalPlane
from kvtransfer.transports.local_wire import HINT, LocalWire, dialed
from kvtransfer.writing import Lanes, Unit

# Handle and size of the receiver's allocation.
_OFFER = struct.Struct(f"={HANDLE_BYTES}sQ")
# "My device will write no more": an epoch that is never granted, and no range.
_LET_GO_EPOCH = 0
_LET_GO = HINT.pack(_LET_GO_EPOCH, 0, 0, 0, 0, 0)
_CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Writer:
    """A process that has the handle. ``pidfd`` is readable once it has ended, its files closed, the driver's too."""

    pidfd: int
    has_let_go: bool = False


class CudaIpc:
    name = "cuda_ipc"
    is_one_sided = True
    layerwise_from_bytes = 1 << 20

    def takes(self, *, on_device: bool) -> bool:
        return on_device

    def reaches(self, mine: NodeDescription, theirs: NodeDescription, *, can_reach_memory: bool) -> bool:
        return mine.host_id != "" and mine.host_id == theirs.host_id and can_reach_memory

    async def connect(self, dial: Dial) -> CudaIpcWire:
        return await CudaIpcWire.connect(dial)

    def plane(self, site: PlaneSite) -> CudaIpcPlane:
        assert isinstance(site.memory, DeviceMemory), "offered for a device's memory only"
        return CudaIpcPlane(site.memory, site.events)


class CudaIpcPlane(LocalPlane):
    """Hands out the allocation's handle, and watches the processes that have it."""

    def __init__(self, memory: DeviceMemory, events: PlaneEvents) -> None:
        super().__init__(events)
        self._memory = memory
        self._writers: dict[int, _Writer] = {}

    def _hand_over(self, channel: int, connection: socket.socket) -> None:
        """Raises OSError if the peer's process cannot be watched."""
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, _, _ = struct.unpack("3i", raw)
        if pid <= 0:
            raise ProcessLookupError("the peer lives in another process namespace")
        try:
            handle = self._memory.device.export(self._memory.address)
        except BatonError as error:
            logging.getLogger(__name__).warning("cannot share the KV cache: %s", error.message)
            raise OSError(error.message) from error
        self._writers[channel] = _Writer(os.pidfd_open(pid))
        connection.send(_OFFER.pack(handle, self._memory.num_bytes))

    def _hinted(self, channel: int, epoch: int, attempt: int, ranges: Sequence[WrittenRange]) -> None:
        if epoch == _LET_GO_EPOCH:
            if (writer := self._writers.get(channel)) is not None:
                writer.has_let_go = True
        else:
            super()._hinted(channel, epoch, attempt, ranges)

    def _ended(self, channel: int) -> None:
        writer = self._writers.get(channel)
        if writer is None or writer.has_let_go:
            self._gone(channel)
        else:
            asyncio.get_running_loop().add_reader(writer.pidfd, self._gone, channel)

    def _gone(self, channel: int) -> None:
        writer = self._writers.pop(channel, None)
        if writer is not None:
            self._unwatch(writer)
        super()._ended(channel)

    def _unwatch(self, writer: _Writer) -> None:
        asyncio.get_running_loop().remove_reader(writer.pidfd)
        os.close(writer.pidfd)

    async def close(self) -> None:
        await super().close()
        for writer in self._writers.values():
            self._unwatch(writer)
        self._writers.clear()


class CudaIpcWire(LocalWire):
    """A receiver's opened allocation."""

    max_unit_bytes = 16 << 20

    def __init__(
        self, connection: socket.socket, lanes: Lanes, num_lanes: int, source: DeviceMemory, target: int
    ) -> None:
        super().__init__(connection, lanes, num_lanes)
        self._source = source
        self._device = source.device
        self._target = target

    @classmethod
    async def connect(cls, dial: Dial) -> CudaIpcWire:
        """Raises TransferFailed if the peer does not hand over an allocation as large as its layout that opens here."""
        assert dial.lanes is not None, "the sender was not started"
        assert isinstance(dial.memory, DeviceMemory), "offered for a device's memory only"
        device = dial.memory.device
        async with dialed(dial.endpoint, dial.token, "device memory") as connection:
            handle, num_bytes = _OFFER.unpack(await _receive_exactly(connection, _OFFER.size))
            if num_bytes < dial.num_target_bytes:
                raise TransferFailed(f"peer's KV cache has {num_bytes} bytes, its layout needs {dial.num_target_bytes}")
        # It cannot be stopped: what it opens has to be closed before the receiver hears that we have let go.
        opening = asyncio.get_running_loop().run_in_executor(None, device.open, handle, num_bytes)
        try:
            target = await asyncio.shield(opening)
        except BaseException:
            opening.add_done_callback(lambda done: _abandon(done, device, connection))
            raise
        wire = cls(connection, dial.lanes, dial.num_lanes, dial.memory, target)
        wire.watch(dial.on_lost, "the receiver closed its device memory socket")
        return wire

    def _copy(self, unit: Unit) -> None:
        """The device copies while this thread hashes; staging is given back when the device is through with both."""
        job, area = unit.job, unit.area
        fences = [fence for layer in area.layers if (fence := job.fence(layer)) is not None]
        with self._source.staging() as staging:
            for fence in fences:
                staging.stream.wait_for(fence)
            for layer in area.layers:
                for src, dst, size in job.copies(layer, area.first, area.num_blocks):
                    ((address, _),) = self._source.runs([ByteRange(src, size)])
                    staging.stream.copy(self._target + dst, address, size)
            if not job.has_digest:
                return
            for fence in fences:  # The digest reads through another stream.
                fence.wait()
            for layer in area.layers:
                for first, count in cut(area.first, area.num_blocks, job.step_blocks):
                    job.hash(layer, first, count)

    async def _let_go(self) -> None:
        try:
            await asyncio.to_thread(self._device.close, self._target)
        except BatonError as error:
            # Nothing is queued any more, so that what follows is true all the same.
            logging.getLogger(__name__).warning("cannot close the receiver's memory: %s", error.message)
        try:
            async with patient_timeout(_CLOSE_TIMEOUT_S):
                # Hints may fill the buffer; without this word the receiver waits for the end of our process.
                await asyncio.get_running_loop().sock_sendall(self._connection, _LET_GO)
        except (OSError, TimeoutError):
            logging.getLogger(__name__).info("the receiver did not hear that its memory was let go")


async def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < num_bytes:
        part = await loop.sock_recv(connection, num_bytes - len(data))
        if not part:
            raise TransferFailed("the peer refused to share its memory: token unknown or used, or it cannot be shared")
        data += part
    return data


def _say_let_go(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.send(_LET_GO, socket.MSG_DONTWAIT)


def _abandon(opening: asyncio.Future[int], device: Device, connection: socket.socket) -> None:
    """The connection is not needed any more."""
    try:
        if not opening.cancelled() and opening.exception() is None:
            device.close(opening.result())
        _say_let_go(connection)
    finally:
        connection.close()
