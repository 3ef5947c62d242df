"""What shm and cuda_ipc have in common at the sender: a socket to a receiver on this host whose memory is open here.

Owns the socket, counts the threads that are writing, and tells the receiver what they wrote. Knows no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from baton.errors import TransferFailed
from kvtransfer.writing import Unit

# epoch, attempt, layer, num_layers, first, num_blocks: "these were written", in the host's byte order.
HINT = struct.Struct("=QIIIII")
# A unit is copied in milliseconds; what takes longer than this hangs.
_LEAVE_TIMEOUT_S = 30.0

_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def dialed(endpoint: str, token: bytes, what: str) -> AsyncIterator[socket.socket]:
    """A socket on which the token was sent; closed if the block is left by an error. OSError becomes TransferFailed."""
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        await loop.sock_connect(connection, f"\0{endpoint}")
        await loop.sock_sendall(connection, token)
        yield connection
    except OSError as error:
        connection.close()
        raise TransferFailed(f"cannot reach the peer's {what}: {error}") from error
    except BaseException:
        connection.close()
        raise


class Attachment:
    """``writing`` and ``tell_written`` are called by any thread, everything else on the event loop."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        # Threads inside; once closing, nobody enters and the last one out is waited for.
        self._num_inside = 0
        self._is_closing = False
        self._is_empty = threading.Event()

    def watch(self, on_lost: Callable[[str], None], reason: str) -> None:
        """``on_lost(reason)`` when the receiver closes the socket."""
        asyncio.get_running_loop().add_reader(self.connection, self._on_readable, on_lost, reason)

    def _on_readable(self, on_lost: Callable[[str], None], reason: str) -> None:
        try:
            if self.connection.recv(64):
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(self.connection)
        on_lost(reason)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """The memory stays open within. Raises TransferFailed once it is being closed."""
        with self._lock:
            if self._is_closing:
                raise TransferFailed("the connection to the receiver's memory is closed")
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if self._is_closing and self._num_inside == 0:
                    self._is_empty.set()

    def tell_written(self, unit: Unit) -> None:
        """The receiver digests what was written while the next unit is copied. If its buffer is full, at commit."""
        if not unit.job.has_digest:
            return
        hint = HINT.pack(unit.job.epoch, unit.attempt, unit.layer, unit.num_layers, unit.first, unit.num_blocks)
        with contextlib.suppress(OSError):  # A broken connection is seen by its reader.
            # Unix sockets take a message this small whole or not at all, so lanes need no lock.
            self.connection.send(hint, socket.MSG_DONTWAIT)

    async def emptied(self) -> bool:
        """Lets nobody in any more and waits for those inside. False: leave memory and socket alone, as that was done
        already or somebody does not come out; the receiver then gets its memory back when this process ends."""
        with self._lock:
            if self._is_closing:
                return False
            self._is_closing = True
            if self._num_inside == 0:
                self._is_empty.set()
        asyncio.get_running_loop().remove_reader(self.connection)
        if self._is_empty.is_set() or await asyncio.to_thread(self._is_empty.wait, _LEAVE_TIMEOUT_S):
            return True
        _log.error("a thread has been writing into a peer's memory for %s s; it stays open", _LEAVE_TIMEOUT_S)
        return False
