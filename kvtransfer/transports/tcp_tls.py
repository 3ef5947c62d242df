"""TLS on the sockets of tcp streams: the handshake and the few bytes around it, on the event loop. Plain sockets pass
through unchanged."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def secured(
    connection: socket.socket, context: ssl.SSLContext, *, is_server: bool = False, name: str = ""
) -> ssl.SSLSocket:
    """The non-blocking connection after its handshake; closed if that fails. Raises OSError.

    ``name``: what the certificate of the server has to say.
    """
    try:
        stream = context.wrap_socket(
            connection, server_side=is_server, server_hostname=name or None, do_handshake_on_connect=False
        )
    except BaseException:
        connection.close()
        raise
    try:
        await _when_able(stream, stream.do_handshake)
    except BaseException:
        stream.close()
        raise
    return stream


async def receive(connection: socket.socket, num_bytes: int) -> bytes:
    """As `recv` of a non-blocking socket."""
    if isinstance(connection, ssl.SSLSocket):
        return await _when_able(connection, lambda: connection.recv(num_bytes))
    return await asyncio.get_running_loop().sock_recv(connection, num_bytes)


async def send(connection: socket.socket, data: bytes) -> None:
    """All of it; ``data`` fits into one record of TLS."""
    if isinstance(connection, ssl.SSLSocket):
        num_sent = await _when_able(connection, lambda: connection.send(data))
        assert num_sent == len(data), "a record is sent whole"
    else:
        await asyncio.get_running_loop().sock_sendall(connection, data)


async def _when_able(connection: ssl.SSLSocket, action: Callable[[], _T]) -> _T:
    loop = asyncio.get_running_loop()
    while True:
        try:
            return action()
        except ssl.SSLWantReadError:
            await _until(loop.add_reader, loop.remove_reader, connection)
        except ssl.SSLWantWriteError:
            await _until(loop.add_writer, loop.remove_writer, connection)


async def _until(watch: Callable[..., Any], unwatch: Callable[[Any], Any], connection: ssl.SSLSocket) -> None:
    able: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    watch(connection, _resolve, able)
    try:
        await able
    finally:
        unwatch(connection)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
