"""Between hosts: several streams, sendmsg from the source cache, recv_into the target cache, no copy in between.

A frame names an epoch and positions of its lease, never an address: the receiver works out the addresses from its own
live leases, so a bad or late frame cannot touch a byte outside them; it is drained and answered as refused. Every frame
is acknowledged on its stream once its last byte is in the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from baton.errors import BatonError, InternalError, TransferFailed
from baton.types import KvLayout
from kvtransfer import staged
from kvtransfer.digest import ByteArray
from kvtransfer.host import keep_apart
from kvtransfer.memory import CacheMemory, DeviceMemory
from kvtransfer.plan import Span, spans
from kvtransfer.writing import Lanes, Unit, refused_by_receiver, write_unit

NAME = "tcp"
_MAGIC = b"BATONKV1"
# magic, token, number of the stream
_PREAMBLE = struct.Struct("!8s32sI")
# epoch, layer, num_layers, first, num_blocks, payload bytes
_FRAME = struct.Struct("!QIIIIQ")
# epoch, 0 written / 1 refused
_ACK = struct.Struct("!QI")
_READY = b"\1"
_MAX_FRAME_BYTES = 64 << 20
_MAX_STREAMS = 64
# Below the kernel's IOV_MAX of 1024.
_MAX_IOV = 512
_SCRATCH_BYTES = 256 << 10
_HELLO_TIMEOUT_S = 5.0
# Unacknowledged data on a path that went silent: the kernel gives the connection up after this long.
_USER_TIMEOUT_MS = 10_000
# Within a host: what is in flight stays in a core's cache, so the receiver's copy does not come from memory. Left alone,
# the kernel lets megabytes pile up. It doubles the number; more than 208 KiB few hosts allow (net.core.rmem_max).
_LOCAL_BUFFER_BYTES = 208 << 10


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if connection.getsockname()[0] == connection.getpeername()[0]:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _LOCAL_BUFFER_BYTES)


def _break(connection: socket.socket) -> None:
    """Wake every thread that is blocked in the socket."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _views(memory: ByteArray, found: Sequence[Span]) -> list[memoryview]:
    whole = memory.data
    return [whole[offset : offset + size] for offset, size in found]


def _batches(views: list[memoryview]) -> Iterator[list[memoryview]]:
    for start in range(0, len(views), _MAX_IOV):
        yield views[start : start + _MAX_IOV]


def _advance(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the views after their first ``num_bytes`` were moved."""
    for i, view in enumerate(views):
        if num_bytes < view.nbytes:
            return [view[num_bytes:], *views[i + 1 :]]
        num_bytes -= view.nbytes
    return []


def send_all(connection: socket.socket, views: list[memoryview]) -> None:
    while views:
        views = _advance(views, connection.sendmsg(views[:_MAX_IOV]))


def receive_all(connection: socket.socket, views: list[memoryview]) -> bool:
    """Fill the views; False if the stream ended before."""
    for batch in _batches(views):
        left = batch
        while left:
            num_bytes = connection.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
            if num_bytes == 0:
                return False
            left = _advance(left, num_bytes)
    return True


@dataclass(slots=True)
class _Epoch:
    channel: int
    block_ids: Sequence[int]
    num_writing: int = 0
    is_closed: bool = False


@dataclass(slots=True)
class _Streams:
    """Sockets of one channel and the number of threads that serve them."""

    token: bytes
    sockets: list[socket.socket] = field(default_factory=list)
    num_threads: int = 0
    is_dropped: bool = False


class TcpReceiver:
    """Accepts streams with a channel's token and fills the cache from them, one thread per stream.

    Methods on the event loop; the callbacks are called there too.
    """

    name = NAME
    is_one_sided = False

    def __init__(
        self,
        memory: CacheMemory,
        layout: KvLayout,
        *,
        advertised_host: str,
        listen_host: str,
        on_frame: Callable[[int, int, int, int], None] | None,
        on_writer_gone: Callable[[int], None],
        on_quiet: Callable[[int], None],
    ) -> None:
        """``on_frame(epoch, layer, first, num_blocks)`` is called in a stream's thread, before the acknowledgement."""
        self._memory = memory
        self._layout = layout
        self._advertised_host = advertised_host
        self._listen_host = listen_host or advertised_host.strip("[]")
        self._on_frame = on_frame
        self._on_writer_gone = on_writer_gone
        self._on_quiet = on_quiet
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._greetings: set[asyncio.Task[None]] = set()
        self._threads: set[threading.Thread] = set()
        # Shared with the stream threads.
        self._lock = threading.Lock()
        self._epochs: dict[int, _Epoch] = {}
        self._channels: dict[int, _Streams] = {}

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        found = await loop.getaddrinfo(self._listen_host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(256)
        self._listener = listener
        self._accepting = loop.create_task(self._accept(listener))

    @property
    def port(self) -> int:
        assert self._listener is not None, "not started"
        return int(self._listener.getsockname()[1])

    def offer(self, channel: int, token: bytes) -> str:
        with self._lock:
            self._channels[channel] = _Streams(token)
        return f"{self._advertised_host}:{self.port}"

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            if len(self._greetings) >= _MAX_STREAMS:
                connection.close()
                continue
            task = loop.create_task(self._greet(connection))
            self._greetings.add(task)
            task.add_done_callback(self._greetings.discard)

    async def _greet(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        raw = bytearray()
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                while len(raw) < _PREAMBLE.size:
                    part = await loop.sock_recv(connection, _PREAMBLE.size - len(raw))
                    if not part:
                        raise ConnectionError("closed before its preamble")
                    raw += part
        except (TimeoutError, OSError):
            connection.close()
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        magic, token, number = _PREAMBLE.unpack(raw)
        with self._lock:
            channel = next((n for n, s in self._channels.items() if s.token == token and not s.is_dropped), None)
            is_welcome = magic == _MAGIC and channel is not None
            is_welcome = is_welcome and len(self._channels[channel or 0].sockets) < _MAX_STREAMS
            if is_welcome and channel is not None:
                self._channels[channel].sockets.append(connection)
                self._channels[channel].num_threads += 1
        if channel is None or not is_welcome:
            logging.getLogger(__name__).warning("refused a data stream without a valid token")
            connection.close()
            return
        connection.setblocking(True)
        _tune(connection)
        name = f"baton-kv-recv-{channel}"
        thread = threading.Thread(target=self._serve, args=(channel, number, connection), name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    # Fences. Event loop, except where said.

    def open_epoch(self, channel: int, epoch: int, block_ids: Sequence[int]) -> None:
        with self._lock:
            self._epochs[epoch] = _Epoch(channel, block_ids)

    def close_epoch(self, channel: int, epoch: int) -> bool:
        with self._lock:
            found = self._epochs.get(epoch)
            if found is None:
                return True
            found.is_closed = True
            if found.num_writing:
                return False
            del self._epochs[epoch]
            return True

    def _enter(self, channel: int, epoch: int) -> Sequence[int] | None:
        """Stream thread: the lease's blocks if a frame may be written into them now."""
        with self._lock:
            found = self._epochs.get(epoch)
            if found is None or found.is_closed or found.channel != channel:
                return None
            found.num_writing += 1
            return found.block_ids

    def _leave(self, epoch: int) -> None:
        """Stream thread."""
        with self._lock:
            found = self._epochs[epoch]
            found.num_writing -= 1
            is_quiet = found.is_closed and found.num_writing == 0
            if is_quiet:
                del self._epochs[epoch]
        if is_quiet:
            self._tell(self._on_quiet, epoch)

    def _tell(self, callback: Callable[[int], None], value: int) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody is left to be told.
            self._loop.call_soon_threadsafe(callback, value)

    def drop(self, channel: int) -> None:
        with self._lock:
            streams = self._channels.get(channel)
            if streams is None:
                return
            streams.is_dropped = True
            is_gone = streams.num_threads == 0
            if is_gone:
                del self._channels[channel]
            for connection in streams.sockets:
                _break(connection)
        if is_gone:
            self._on_writer_gone(channel)

    # Stream threads.

    def _serve(self, channel: int, number: int, connection: socket.socket) -> None:
        keep_apart(number)
        try:
            connection.sendall(_READY)
            self._receive(channel, connection)
        except (OSError, BatonError) as error:
            logging.getLogger(__name__).info("data stream of channel %d ended: %s", channel, error)
        finally:
            self._ended(channel, connection)

    def _ended(self, channel: int, connection: socket.socket) -> None:
        """A channel that lost one stream loses all: its sender could not tell which frames arrived."""
        with self._lock:
            streams = self._channels[channel]
            streams.num_threads -= 1
            streams.is_dropped = True
            streams.sockets.remove(connection)
            for other in streams.sockets:
                _break(other)
            is_gone = streams.num_threads == 0
            if is_gone:
                del self._channels[channel]
            self._threads.discard(threading.current_thread())
        connection.close()
        if is_gone:
            self._tell(self._on_writer_gone, channel)

    def _receive(self, channel: int, connection: socket.socket) -> None:
        head = bytearray(_FRAME.size)
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        while receive_all(connection, [memoryview(head)]):
            epoch, layer, num_layers, first, num_blocks, num_bytes = _FRAME.unpack(head)
            if num_bytes > _MAX_FRAME_BYTES:
                logging.getLogger(__name__).warning(
                    "frame of %d bytes refused, at most %d", num_bytes, _MAX_FRAME_BYTES
                )
                return
            block_ids = self._enter(channel, epoch)
            if block_ids is None:
                if not _discard(connection, scratch, num_bytes):
                    return
                connection.sendall(_ACK.pack(epoch, 1))
                continue
            try:
                is_inside = self._is_inside(block_ids, layer, num_layers, first, num_blocks, num_bytes)
                if is_inside:
                    is_whole = self._fill(connection, epoch, block_ids, layer, num_layers, first, num_blocks)
                else:
                    is_whole = _discard(connection, scratch, num_bytes)
            finally:
                self._leave(epoch)
            if not is_whole:
                return
            connection.sendall(_ACK.pack(epoch, int(not is_inside)))

    def _is_inside(
        self, block_ids: Sequence[int], layer: int, num_layers: int, first: int, num_blocks: int, num_bytes: int
    ) -> bool:
        """Whether a frame's payload lies inside the lease and has the size it says."""
        inside = layer + num_layers <= self._layout.num_layers and first + num_blocks <= len(block_ids)
        return inside and num_layers * num_blocks * self._layout.block_bytes == num_bytes

    def _fill(
        self,
        connection: socket.socket,
        epoch: int,
        block_ids: Sequence[int],
        layer: int,
        num_layers: int,
        first: int,
        num_blocks: int,
    ) -> bool:
        """Receive a frame's payload; then it is digested, in one go for each layer."""
        memory = self._memory
        if isinstance(memory, DeviceMemory):
            frame = staged.Frame(epoch, block_ids, layer, num_layers, first, num_blocks)
            return staged.fill(memory, self._layout, frame, lambda v: receive_all(connection, [v]), self._on_frame)
        layers = range(layer, layer + num_layers)
        found = [span for i in layers for span in spans(self._layout, i, block_ids, first, num_blocks)]
        if not receive_all(connection, _views(memory, found)):
            return False
        if self._on_frame is not None:
            for i in layers:
                self._on_frame(epoch, i, first, num_blocks)
        return True

    async def close(self) -> None:
        tasks = [*self._greetings] if self._accepting is None else [self._accepting, *self._greetings]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        with self._lock:
            for streams in self._channels.values():
                streams.is_dropped = True
                for connection in streams.sockets:
                    _break(connection)
            threads = list(self._threads)
        for thread in threads:
            await asyncio.to_thread(thread.join, 5.0)


def _discard(connection: socket.socket, scratch: memoryview, num_bytes: int) -> bool:
    while num_bytes:
        part = scratch[: min(num_bytes, len(scratch))]
        if not receive_all(connection, [part]):
            return False
        num_bytes -= len(part)
    return True


class TcpWire:
    """The streams to one receiver: one sending thread each, acknowledgements are read on the event loop."""

    name = NAME
    max_unit_bytes = 8 << 20

    def __init__(self, streams: list[socket.socket], on_lost: Callable[[str], None]) -> None:
        self.num_lanes = len(streams)
        self._streams = streams
        self._on_lost = on_lost
        # Per stream, frames sent or being sent and not acknowledged, oldest first; and a half-read acknowledgement.
        self._unacked: list[deque[Unit]] = [deque() for _ in streams]
        self._partial = [bytearray() for _ in streams]
        self._is_closing = False
        self._lanes = Lanes("baton-kv-send", len(streams), write_unit)

    @classmethod
    async def connect(cls, endpoint: str, token: bytes, num_streams: int, on_lost: Callable[[str], None]) -> TcpWire:
        """Raises TransferFailed if the receiver does not accept every stream."""
        loop = asyncio.get_running_loop()
        streams: list[socket.socket] = []
        try:
            for number in range(num_streams):
                streams.append(await _open_stream(endpoint, token, number))
        except OSError as error:
            _close_all(streams)
            raise TransferFailed(f"cannot open a data stream to {endpoint}: {error}") from error
        except BaseException:
            _close_all(streams)
            raise
        wire = cls(streams, on_lost)
        for number, stream in enumerate(streams):
            stream.setblocking(True)
            loop.add_reader(stream, wire._on_readable, number, stream)
        return wire

    def submit(self, units: Sequence[Unit]) -> None:
        self._lanes.submit(units)

    def write(self, lane: int, unit: Unit) -> None:
        job = unit.job
        if job.plan is None:
            raise InternalError("a unit was queued before its push had begun")
        layout, block_ids = job.plan.src_layout, job.plan.src_block_ids
        num_bytes = unit.num_layers * unit.num_blocks * layout.block_bytes
        head = _FRAME.pack(job.epoch, unit.layer, unit.num_layers, unit.first, unit.num_blocks, num_bytes)
        views = [memoryview(head)]
        self._unacked[lane].append(unit)
        try:
            if job.device_memory is not None:
                send_all(self._streams[lane], views)
                staged.read(job.device_memory, unit, lambda view: send_all(self._streams[lane], [view]))
                return
            layers = range(unit.layer, unit.layer + unit.num_layers)
            for layer in layers:
                found = spans(layout, layer, block_ids, unit.first, unit.num_blocks)
                views += [job.read(offset, size).data for offset, size in found]
            send_all(self._streams[lane], views)
            for layer in layers:
                # After the kernel has read them, which it does faster than a hash reads what is in no cache.
                job.hash(layer, unit.first, unit.num_blocks)
        except OSError as error:
            raise TransferFailed(f"data stream broke: {error}") from error
        except BaseException:
            # What came next would be taken for the rest of this frame.
            _break(self._streams[lane])
            raise

    def _on_readable(self, lane: int, stream: socket.socket) -> None:
        try:
            data = stream.recv(_ACK.size * 256, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(stream)
            self._on_lost("the receiver closed a data stream")
            return
        partial = self._partial[lane]
        partial += data
        for start in range(0, len(partial) - _ACK.size + 1, _ACK.size):
            self._acknowledged(lane, *_ACK.unpack_from(partial, start))
        del partial[: len(partial) - len(partial) % _ACK.size]

    def _acknowledged(self, lane: int, epoch: int, status: int) -> None:
        if not self._unacked[lane]:
            self._on_lost("the receiver acknowledged a frame that was not sent")
            return
        unit = self._unacked[lane].popleft()
        if status or epoch != unit.job.epoch:
            unit.job.fail(refused_by_receiver())
        else:
            unit.job.landed(unit)

    async def close(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        loop = asyncio.get_running_loop()
        for stream in self._streams:
            loop.remove_reader(stream)
            _break(stream)
        self._lanes.close()
        await asyncio.to_thread(self._lanes.join, 5.0)
        _close_all(self._streams)


async def _open_stream(endpoint: str, token: bytes, number: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    host, _, port = endpoint.rpartition(":")
    found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    stream = socket.socket(family, kind, protocol)
    try:
        stream.setblocking(False)
        await loop.sock_connect(stream, address)
        _tune(stream)
        await loop.sock_sendall(stream, _PREAMBLE.pack(_MAGIC, token, number))
        if await loop.sock_recv(stream, 1) != _READY:
            raise ConnectionError("the receiver refused it: token unknown or too many streams")
    except BaseException:
        stream.close()
        raise
    return stream


def _close_all(streams: Sequence[socket.socket]) -> None:
    for stream in streams:
        stream.close()
