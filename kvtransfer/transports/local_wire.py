"""The sending end within a host: a socket to a receiver whose memory is open here, and lanes that copy into it.

Owns the socket, counts the threads that are writing, and tells the receiver what they wrote. What is opened, and how
bytes are copied into it, is its children's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from baton.errors import TransferFailed
from baton.patience import patient_wait
from kvtransfer.writing import Lanes, Unit

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


class LocalWire(ABC):
    """``write`` runs in lanes, everything else on the event loop."""

    def __init__(self, connection: socket.socket, lanes: Lanes, num_lanes: int) -> None:
        self.num_lanes = num_lanes
        self._connection = connection
        self._lanes = lanes
        self._lock = threading.Lock()
        # Threads inside; once closing, none enters and the last one out is waited for.
        self._num_inside = 0
        self._is_closing = False
        self._is_empty = threading.Event()

    @property
    @abstractmethod
    def max_unit_bytes(self) -> int: ...

    @abstractmethod
    def _copy(self, unit: Unit) -> None:
        """In a lane: when it returns, the unit's bytes are in the receiver's memory, and digested."""

    @abstractmethod
    async def _let_go(self) -> None:
        """Close the memory. No thread is in it, and none will be."""

    def submit(self, units: Sequence[Unit]) -> None:
        self._lanes.submit(units)

    def write(self, lane: int, unit: Unit) -> int:
        with self._writing():
            self._copy(unit)
            self._tell_written(unit)
        return 0

    async def close(self) -> None:
        if await self._emptied():
            await self._let_go()
            self._connection.close()

    def watch(self, on_lost: Callable[[str], None], reason: str) -> None:
        """``on_lost(reason)`` when the receiver closes the socket."""
        asyncio.get_running_loop().add_reader(self._connection, self._on_readable, on_lost, reason)

    def _on_readable(self, on_lost: Callable[[str], None], reason: str) -> None:
        try:
            if self._connection.recv(64):
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(self._connection)
        on_lost(reason)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
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

    def _tell_written(self, unit: Unit) -> None:
        """The receiver digests what was written while the next unit is copied. If its buffer is full, at commit."""
        if not unit.job.has_digest:
            return
        hint = HINT.pack(unit.job.epoch, unit.attempt, *unit.area)
        with contextlib.suppress(OSError):  # A broken connection is seen by its reader.
            # Unix sockets take a message this small whole or not at all, so lanes need no lock.
            self._connection.send(hint, socket.MSG_DONTWAIT)

    async def _emptied(self) -> bool:
        """Let no thread in any more and wait for those inside. False: leave memory and socket alone, as that was done
        already or a thread does not come out; the receiver then gets its memory back when this process ends."""
        with self._lock:
            if self._is_closing:
                return False
            self._is_closing = True
            if self._num_inside == 0:
                self._is_empty.set()
        asyncio.get_running_loop().remove_reader(self._connection)
        if self._is_empty.is_set() or await asyncio.to_thread(patient_wait, self._is_empty, _LEAVE_TIMEOUT_S):
            return True
        _log.error("a thread has been writing into a peer's memory for %s s; it stays open", _LEAVE_TIMEOUT_S)
        return False
