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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.errors import BatonError, InternalError, TransferFailed
from kvtransfer.devices.interface import HANDLE_BYTES, Device
from kvtransfer.digest import cut
from kvtransfer.memory import DeviceMemory
from kvtransfer.protocol.messages import WrittenRange
from kvtransfer.transports.attachment import HINT, Attachment, dialed
from kvtransfer.transports.shm import ShmReceiver
from kvtransfer.writing import Lanes, Unit

NAME = "cuda_ipc"
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


class CudaIpcReceiver:
    """Gives the handle to senders that present a channel's token. All methods on the event loop."""

    name = NAME
    is_one_sided = True

    def __init__(
        self,
        memory: DeviceMemory,
        on_writer_gone: Callable[[int], None],
        on_written: Callable[[int, int, int, Sequence[WrittenRange]], None],
    ) -> None:
        self._memory = memory
        self._on_writer_gone = on_writer_gone
        self._on_written = on_written
        self._sockets = ShmReceiver(self._hand_over, self._at_end, self._at_hint)
        self._writers: dict[int, _Writer] = {}

    async def start(self) -> None:
        await self._sockets.start()

    def offer(self, channel: int, token: bytes) -> str:
        return self._sockets.offer(channel, token)

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

    def _at_hint(self, channel: int, epoch: int, attempt: int, ranges: Sequence[WrittenRange]) -> None:
        if epoch == _LET_GO_EPOCH:
            if (writer := self._writers.get(channel)) is not None:
                writer.has_let_go = True
        else:
            self._on_written(channel, epoch, attempt, ranges)

    def _at_end(self, channel: int) -> None:
        """The socket has ended, or never was."""
        writer = self._writers.get(channel)
        if writer is None or writer.has_let_go:
            self._gone(channel)
        else:
            asyncio.get_running_loop().add_reader(writer.pidfd, self._gone, channel)

    def _gone(self, channel: int) -> None:
        writer = self._writers.pop(channel, None)
        if writer is not None:
            self._unwatch(writer)
        self._on_writer_gone(channel)

    def _unwatch(self, writer: _Writer) -> None:
        asyncio.get_running_loop().remove_reader(writer.pidfd)
        os.close(writer.pidfd)

    def open_epoch(self, channel: int, epoch: int, block_ids: Sequence[int]) -> None:
        """Nothing to open: the sender writes by itself."""

    def close_epoch(self, channel: int, epoch: int, after_bytes: int) -> bool:
        return True

    def drop(self, channel: int) -> None:
        self._sockets.drop(channel)

    async def close(self) -> None:
        await self._sockets.close()
        for writer in self._writers.values():
            self._unwatch(writer)
        self._writers.clear()


class CudaIpcWire:
    """A receiver's opened allocation. ``write`` runs in lanes; everything else on the event loop."""

    name = NAME
    is_one_sided = True
    max_unit_bytes = 16 << 20

    def __init__(self, connection: socket.socket, device: Device, target: int, lanes: Lanes, num_lanes: int) -> None:
        self.num_lanes = num_lanes
        self._attachment = Attachment(connection)
        self._device = device
        self._target = target
        self._lanes = lanes

    @classmethod
    async def connect(
        cls,
        endpoint: str,
        token: bytes,
        num_target_bytes: int,
        device: Device,
        lanes: Lanes,
        num_lanes: int,
        on_lost: Callable[[str], None],
    ) -> CudaIpcWire:
        """Raises TransferFailed if the peer does not hand over an allocation as large as its layout that opens here."""
        async with dialed(endpoint, token, "device memory") as connection:
            handle, num_bytes = _OFFER.unpack(await _receive_exactly(connection, _OFFER.size))
            if num_bytes < num_target_bytes:
                raise TransferFailed(f"peer's KV cache has {num_bytes} bytes, its layout needs {num_target_bytes}")
        # It cannot be stopped: what it opens has to be closed before the receiver hears that we have let go.
        opening = asyncio.get_running_loop().run_in_executor(None, device.open, handle, num_bytes)
        try:
            target = await asyncio.shield(opening)
        except BaseException:
            opening.add_done_callback(lambda done: _abandon(done, device, connection))
            raise
        wire = cls(connection, device, target, lanes, num_lanes)
        wire._attachment.watch(on_lost, "the receiver closed its device memory socket")
        return wire

    def submit(self, units: Sequence[Unit]) -> None:
        self._lanes.submit(units)

    def write(self, lane: int, unit: Unit) -> int:
        with self._attachment.writing():
            self._copy(unit)
            self._attachment.tell_written(unit)
        return 0

    def _copy(self, unit: Unit) -> None:
        """The device copies while this thread hashes; staging is given back when the device is through with both."""
        job, plan, memory = unit.job, unit.job.plan, unit.job.device_memory
        if plan is None or memory is None:
            raise InternalError("a unit was queued before its push had begun, or its source lies on no device")
        layers = range(unit.layer, unit.layer + unit.num_layers)
        fences = [fence for layer in layers if (fence := job.fence(layer)) is not None]
        with memory.staging() as staging:
            for fence in fences:
                staging.stream.wait_for(fence)
            for layer in layers:
                for src, dst, size in plan.copies(layer, unit.first, unit.num_blocks):
                    staging.stream.copy(self._target + dst, job.address(src, size), size)
            if not job.has_digest:
                return
            for fence in fences:  # The digest reads through another stream.
                fence.wait()
            for layer in layers:
                for first, count in cut(unit.first, unit.num_blocks, job.step_blocks):
                    job.hash(layer, first, count)

    async def close(self) -> None:
        if not await self._attachment.emptied():
            return
        connection = self._attachment.connection
        try:
            await asyncio.to_thread(self._device.close, self._target)
        except BatonError as error:
            # Nothing is queued any more, so that what follows is true all the same.
            logging.getLogger(__name__).warning("cannot close the receiver's memory: %s", error.message)
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                # Hints may fill the buffer; without this word the receiver waits for the end of our process.
                await asyncio.get_running_loop().sock_sendall(connection, _LET_GO)
        except (OSError, TimeoutError):
            logging.getLogger(__name__).info("the receiver did not hear that its memory was let go")
        connection.close()


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
    """Nobody waits for the connection any more."""
    try:
        if not opening.cancelled() and opening.exception() is None:
            device.close(opening.result())
        _say_let_go(connection)
    finally:
        connection.close()
