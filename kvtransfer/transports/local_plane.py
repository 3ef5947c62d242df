"""The receiving end within a host: an abstract unix socket over which senders get the memory and say what they wrote.

The socket stays open as the sender's sign of life. Abstract sockets leave no file behind. What is handed over is its
children's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence

from baton.patience import patient_timeout
from kvtransfer.protocol.messages import WrittenRange
from kvtransfer.transports.interface import PlaneEvents
from kvtransfer.transports.local_wire import HINT

TOKEN_BYTES = 32
_HELLO_TIMEOUT_S = 5.0
_MAX_PENDING = 64
# A pause after an accept that failed.
_ACCEPT_AGAIN_S = 0.1
# Hints that are read at once, and layers of one: what a peer says holds the loop up for milliseconds.
_MAX_HINTS = 16
_MAX_HINTED_LAYERS = 1024


class LocalPlane(ABC):
    """Hands the memory to senders that present a channel's token. All methods on the event loop."""

    def __init__(self, events: PlaneEvents) -> None:
        self._events = events
        self.endpoint = f"baton-kv-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener: socket.socket | None = None
        # Tokens that were handed out and not used yet.
        self._offers: dict[bytes, int] = {}
        self._connections: dict[int, socket.socket] = {}
        # Per channel, the beginning of a hint whose end has not come.
        self._partial: dict[int, bytes] = {}
        self._greetings: set[asyncio.Task[None]] = set()

    @abstractmethod
    def _hand_over(self, channel: int, connection: socket.socket) -> None:
        """Give the peer the memory. Raises OSError if that cannot be done."""

    def _hinted(self, channel: int, epoch: int, attempt: int, ranges: Sequence[WrittenRange]) -> None:
        """The writer says what it wrote."""
        self._events.wrote(channel, epoch, attempt, ranges)

    def _ended(self, channel: int) -> None:
        """The socket has ended, or never was."""
        self._events.writer_gone(channel)

    async def start(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        listener.bind(f"\0{self.endpoint}")
        listener.listen(_MAX_PENDING)
        self._listener = listener
        self._listen(listener)

    def _listen(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def offer(self, channel: int, token: bytes) -> None:
        """Let one connection with this token in."""
        self._offers[token] = channel

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:
            # Out of descriptors: it would be called again at once, and for ever.
            logging.getLogger(__name__).debug("a connection was not accepted: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(_ACCEPT_AGAIN_S, self._listen, listener)
            return
        connection.setblocking(False)
        if len(self._greetings) >= _MAX_PENDING or _peer_uid(connection) != os.getuid():
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._greet(connection))
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)

    async def _greet(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with patient_timeout(_HELLO_TIMEOUT_S):
                token = await loop.sock_recv(connection, TOKEN_BYTES)
        except (TimeoutError, OSError):
            token = b""
        except asyncio.CancelledError:
            connection.close()
            raise
        channel = self._offers.pop(token, None)
        if channel is None:
            logging.getLogger(__name__).warning(
                "refused a connection for the cache's memory: its token is unknown or used"
            )
            connection.close()
            return
        try:
            self._hand_over(channel, connection)
        except OSError:
            connection.close()
            self._ended(channel)
            return
        self._connections[channel] = connection
        loop.add_reader(connection, self._on_readable, channel, connection)

    def _on_readable(self, channel: int, connection: socket.socket) -> None:
        try:
            data = connection.recv(HINT.size * _MAX_HINTS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            data = self._partial.pop(channel, b"") + data
            for start in range(0, len(data) - HINT.size + 1, HINT.size):
                epoch, attempt, layer, num_layers, first, count = HINT.unpack_from(data, start)
                stop = layer + min(num_layers, _MAX_HINTED_LAYERS)
                ranges = [WrittenRange(i, first, count) for i in range(layer, stop)]
                self._hinted(channel, epoch, attempt, ranges)
            self._partial[channel] = data[len(data) - len(data) % HINT.size :]
            return
        asyncio.get_running_loop().remove_reader(connection)
        connection.close()
        self._partial.pop(channel, None)
        del self._connections[channel]
        self._ended(channel)

    def open_epoch(self, channel: int, epoch: int, block_ids: Sequence[int]) -> None:
        """Nothing to open: the sender writes by itself."""
        del channel, epoch, block_ids

    def close_epoch(self, channel: int, epoch: int, after_bytes: int) -> bool:
        del channel, epoch, after_bytes
        return True

    def drop(self, channel: int) -> None:
        """The channel is lost. The sender is told by end-of-file, lets go and closes; only then is the writer gone."""
        for token, offered_to in list(self._offers.items()):
            if offered_to == channel:
                del self._offers[token]
        connection = self._connections.get(channel)
        if connection is None:
            self._ended(channel)
            return
        with contextlib.suppress(OSError):  # Its end is readable then, and reported from there.
            connection.shutdown(socket.SHUT_WR)

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for task in list(self._greetings):
            task.cancel()
        await asyncio.gather(*self._greetings, return_exceptions=True)
        for connection in self._connections.values():
            loop.remove_reader(connection)
            connection.close()
        self._connections.clear()


def _peer_uid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", raw)
    return int(uid)
