"""The receiving end of tcp streams: one thread each, recv_into the target cache, no copy in between.

Knows which leases are live and lets no frame reach a byte outside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.errors import BatonError, TransferFailed
from baton.patience import patient_timeout, patient_wait
from baton.tls import peer_files
from kvtransfer.host import keep_apart
from kvtransfer.plan import Area, BlockList
from kvtransfer.transports.interface import PlaneSite
from kvtransfer.transports.tcp_socket import FRAME, MAGIC, PREAMBLE, READY, break_off, receive_all, tune
from kvtransfer.transports.tcp_tls import receive, secured

_MAX_FRAME_BYTES = 64 << 20
_MAX_STREAMS = 64
# Connections that have not shown their token. With more, the one that has been at it for longest is given up.
_MAX_GREETINGS = 256
_SCRATCH_BYTES = 256 << 10
_HELLO_TIMEOUT_S = 5.0
# A pause after an accept that failed; out of descriptors it would fail again at once.
_ACCEPT_AGAIN_S = 0.1


@dataclass(slots=True)
class _Epoch:
    channel: int
    blocks: BlockList
    # Frames being written, and payload bytes written, since the epoch was opened.
    num_writing: int = 0
    num_written_bytes: int = 0
    # No frame is let in once so many bytes are written; None: the sender has not said how many there are.
    stop_at_bytes: int | None = None

    @property
    def is_closed(self) -> bool:
        return self.stop_at_bytes is not None and self.num_written_bytes >= self.stop_at_bytes


@dataclass(slots=True)
class _Streams:
    """Sockets of one channel and the number of threads that serve them."""

    token: bytes
    sockets: list[socket.socket] = field(default_factory=list)
    num_threads: int = 0
    is_dropped: bool = False


class TcpPlane:
    """Accepts streams with a channel's token and fills the cache from them, one thread per stream.

    Methods on the event loop.
    """

    def __init__(self, site: PlaneSite, *, open_timeout_s: float = 10.0) -> None:
        """A stream is given up if the event loop does not say in that time whether an epoch is open. Raises BadConfig
        for certificates that cannot be used."""
        self._open_timeout_s = open_timeout_s
        self._certificates = peer_files(site.access)
        self._site = site
        self._events = site.events
        self._listen_host = site.listen_host or site.advertised_host.strip("[]")
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        # The oldest first.
        self._greetings: dict[asyncio.Task[None], None] = {}
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
    def endpoint(self) -> str:
        assert self._listener is not None, "not started"
        return f"{self._site.advertised_host}:{self._listener.getsockname()[1]}"

    def offer(self, channel: int, token: bytes) -> None:
        with self._lock:
            self._channels[channel] = _Streams(token)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, or a peer that left at once: the next one is let in again.
                logging.getLogger(__name__).debug("a data stream was not accepted: %s", error)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            while len(self._greetings) >= _MAX_GREETINGS:
                # Connections without a token, silent as long as they may be, keep none out that has one.
                oldest = next(iter(self._greetings))
                del self._greetings[oldest]
                oldest.cancel()
            task = loop.create_task(self._greet(connection))
            self._greetings[task] = None
            task.add_done_callback(lambda done: self._greetings.pop(done, None))
            # Those that wait are accepted without a turn of the loop; and a greeting that has begun closes its socket.
            await asyncio.sleep(0)

    async def _greet(self, connection: socket.socket) -> None:
        raw = bytearray()
        try:
            async with patient_timeout(_HELLO_TIMEOUT_S):
                if self._certificates is not None:
                    connection = await secured(connection, self._certificates.context(), is_server=True)
                while len(raw) < PREAMBLE.size:
                    part = await receive(connection, PREAMBLE.size - len(raw))
                    if not part:
                        raise ConnectionError("closed before its preamble")
                    raw += part
        except (TimeoutError, OSError):
            connection.close()
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        magic, token, number = PREAMBLE.unpack(raw)
        with self._lock:
            found = (n for n, s in self._channels.items() if hmac.compare_digest(s.token, token) and not s.is_dropped)
            channel = next(found, None)
            is_welcome = magic == MAGIC and channel is not None
            is_welcome = is_welcome and len(self._channels[channel or 0].sockets) < _MAX_STREAMS
            if is_welcome and channel is not None:
                self._channels[channel].sockets.append(connection)
                self._channels[channel].num_threads += 1
        if channel is None or not is_welcome:
            logging.getLogger(__name__).warning("refused a data stream without a valid token")
            connection.close()
            return
        connection.setblocking(True)
        tune(connection)
        name = f"baton-kv-recv-{channel}"
        thread = threading.Thread(target=self._serve, args=(channel, number, connection), name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    # Fences. Event loop, except where said.

    @property
    def num_epochs(self) -> int:
        """Epochs that are open, or closed with bytes under way."""
        with self._lock:
            return len(self._epochs)

    def open_epoch(self, channel: int, epoch: int, block_ids: Sequence[int]) -> None:
        with self._lock:
            if channel in self._channels:  # Else its last stream has just ended.
                self._epochs[epoch] = _Epoch(channel, BlockList(self._site.layout, block_ids))

    def close_epoch(self, channel: int, epoch: int, after_bytes: int) -> bool:
        with self._lock:
            found = self._epochs.get(epoch)
            if found is None:
                return True
            found.stop_at_bytes = after_bytes
            return self._take_quiet(epoch, found)

    def _take_quiet(self, epoch: int, found: _Epoch) -> bool:
        """With the lock held: True, once, when the epoch is closed and nothing is being written into it."""
        if not found.is_closed or found.num_writing:
            return False
        del self._epochs[epoch]
        return True

    def _enter(self, channel: int, epoch: int) -> BlockList | None:
        """Stream thread: the lease's blocks if a frame may be written into them now. Raises TransferFailed if the
        event loop does not say so in time."""
        with self._lock:
            is_open = epoch in self._epochs
        if not is_open:
            self._ask(channel, epoch)
        with self._lock:
            found = self._epochs.get(epoch)
            if found is None or found.is_closed or found.channel != channel:
                return None
            found.num_writing += 1
            return found.blocks

    def _ask(self, channel: int, epoch: int) -> None:
        """Stream thread: the frame may have overtaken its Begin, which takes another connection."""
        is_answered = threading.Event()

        def ask() -> None:
            try:
                self._events.data_came(channel, epoch)
            finally:
                is_answered.set()

        self._tell(ask)
        if not patient_wait(is_answered, self._open_timeout_s):
            raise TransferFailed(f"the event loop did not answer in {self._open_timeout_s} s")

    def _leave(self, epoch: int, num_bytes: int) -> None:
        """Stream thread: so many bytes of the frame were written."""
        with self._lock:
            found = self._epochs[epoch]
            found.num_writing -= 1
            found.num_written_bytes += num_bytes
            is_quiet = self._take_quiet(epoch, found)
        if is_quiet:
            self._tell(self._events.quiet, epoch)

    def _tell(self, callback: Callable[..., None], *values: int) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: there is nothing left to tell.
            self._loop.call_soon_threadsafe(callback, *values)

    def drop(self, channel: int) -> None:
        with self._lock:
            streams = self._channels.get(channel)
            if streams is None:
                return
            streams.is_dropped = True
            is_gone = streams.num_threads == 0
            if is_gone:
                self._forget(channel)
            for connection in streams.sockets:
                break_off(connection)
        if is_gone:
            self._events.writer_gone(channel)

    def _forget(self, channel: int) -> None:
        """With the lock held, and no thread left: what the channel may write into is not closed any more."""
        del self._channels[channel]
        for epoch in [epoch for epoch, found in self._epochs.items() if found.channel == channel]:
            del self._epochs[epoch]

    # Stream threads.

    def _serve(self, channel: int, number: int, connection: socket.socket) -> None:
        keep_apart(number)
        try:
            connection.sendall(READY)
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
                break_off(other)
            is_gone = streams.num_threads == 0
            if is_gone:
                self._forget(channel)
            self._threads.discard(threading.current_thread())
        connection.close()
        if is_gone:
            self._tell(self._events.writer_gone, channel)

    def _receive(self, channel: int, connection: socket.socket) -> None:
        head = bytearray(FRAME.size)
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        while receive_all(connection, [memoryview(head)]):
            epoch, *numbers, num_bytes = FRAME.unpack(head)
            if num_bytes > _MAX_FRAME_BYTES:
                logging.getLogger(__name__).warning(
                    "frame of %d bytes refused, at most %d", num_bytes, _MAX_FRAME_BYTES
                )
                return
            blocks = self._enter(channel, epoch)
            if blocks is None:
                if not _discard(connection, scratch, num_bytes):
                    return
                continue
            area = Area(*numbers)
            is_whole = is_inside = False
            try:
                is_inside = _is_inside(blocks, area, num_bytes)
                if is_inside:
                    is_whole = self._fill(connection, epoch, blocks, area)
                else:
                    self._tell(self._events.strayed, channel, epoch)
                    is_whole = _discard(connection, scratch, num_bytes)
            finally:
                self._leave(epoch, num_bytes if is_whole and is_inside else 0)
            if not is_whole:
                return

    def _fill(self, connection: socket.socket, epoch: int, blocks: BlockList, area: Area) -> bool:
        """Receive a frame's payload; then it is digested."""
        landed = self._events.landed
        on_written = None if landed is None else functools.partial(landed, epoch)
        return self._site.memory.scatter(blocks, area, lambda views: receive_all(connection, views), on_written)

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
                    break_off(connection)
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


def _is_inside(blocks: BlockList, area: Area, num_bytes: int) -> bool:
    """Whether a frame's payload lies inside the lease and has the size it says."""
    layout = blocks.layout
    inside = area.layer + area.num_layers <= layout.num_layers and area.first + area.num_blocks <= len(blocks.ids)
    return inside and area.num_layers * area.num_blocks * layout.block_bytes == num_bytes
