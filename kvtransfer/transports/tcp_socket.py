"""What both ends of tcp streams share: the frames, and sockets. Owns no connection and no thread.

A frame names an epoch and positions of its lease, never an address: the receiver works out the addresses from its own
live leases, so a bad or late frame cannot touch a byte outside them; it is drained. Frames are not answered: the commit
says how many bytes were sent, and its answer covers them all.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator

MAGIC = b"BATONKV1"
# magic, token, number of the stream
PREAMBLE = struct.Struct("!8s32sI")
# epoch, layer, num_layers, first, num_blocks, payload bytes
FRAME = struct.Struct("!QIIIIQ")
READY = b"\1"
# Below the kernel's IOV_MAX of 1024.
_MAX_IOV = 512
# Of TLS; each costs a call into OpenSSL, a header and a tag.
_RECORD_BYTES = 16 << 10
# Unacknowledged data on a path that went silent: the kernel gives the connection up after this long.
_USER_TIMEOUT_MS = 10_000
# Within a host: what is in flight then stays in a core's cache and the receiver's copy does not come from memory. Left
# alone, the kernel lets megabytes pile up. Both ends need it, 176 to 256 KiB were equally good (the kernel doubles the
# number), and more than 208 KiB few hosts allow (net.core.rmem_max).
_LOCAL_BUFFER_BYTES = 208 << 10


def tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if connection.getsockname()[0] == connection.getpeername()[0]:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _LOCAL_BUFFER_BYTES)


def break_off(connection: socket.socket) -> None:
    """Wake every thread that is blocked in the socket."""
    with contextlib.suppress(OSError):
        # Of the plain socket: that of TLS would let such a thread go on without encryption.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def has_ended(connection: socket.socket) -> bool:
    """Of a readable stream whose other end says nothing: whether it is not only interrupted."""
    try:
        # Of the plain socket, too: it is the end whatever comes, and another thread may be sending.
        socket.socket.recv(connection, 1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        pass
    return True


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


def _records(views: list[memoryview]) -> Iterator[bytes | memoryview]:
    """The bytes of the views, small ones together."""
    small: list[memoryview] = []
    num_bytes = 0
    for view in views:
        if view.nbytes < _RECORD_BYTES:
            small.append(view)
            num_bytes += view.nbytes
        if small and (num_bytes >= _RECORD_BYTES or view.nbytes >= _RECORD_BYTES):
            yield b"".join(small)
            small, num_bytes = [], 0
        if view.nbytes >= _RECORD_BYTES:
            yield view
    if small:
        yield b"".join(small)


def send_all(connection: socket.socket, views: list[memoryview]) -> None:
    if isinstance(connection, ssl.SSLSocket):
        for part in _records(views):
            connection.sendall(part)
        return
    while views:
        views = _advance(views, connection.sendmsg(views[:_MAX_IOV]))


def receive_all(connection: socket.socket, views: list[memoryview]) -> bool:
    """Fill the views; False if the stream ended before."""
    if isinstance(connection, ssl.SSLSocket):
        for view in views:
            while view.nbytes:
                num_bytes = connection.recv_into(view)
                if num_bytes == 0:
                    return False
                view = view[num_bytes:]
        return True
    for batch in _batches(views):
        left = batch
        while left:
            num_bytes = connection.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
            if num_bytes == 0:
                return False
            left = _advance(left, num_bytes)
    return True
