"""The sending end of tcp streams: one lane each, sendmsg from the source cache, no copy in between."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence

from baton.access import OPEN, AccessConfig
from baton.errors import TransferFailed
from baton.tls import dialling_context
from kvtransfer.transports.tcp_socket import FRAME, MAGIC, PREAMBLE, READY, break_off, has_ended, send_all, tune
from kvtransfer.transports.tcp_tls import receive, secured, send
from kvtransfer.writing import Lanes, Unit, write_unit


class TcpWire:
    """The streams to one receiver: one sending thread each; their end is noticed on the event loop."""

    max_unit_bytes = 8 << 20

    def __init__(self, streams: list[socket.socket], on_lost: Callable[[str], None]) -> None:
        self.num_lanes = len(streams)
        self._streams = streams
        self._on_lost = on_lost
        self._is_closing = False
        self._lanes = Lanes("baton-kv-send", len(streams), write_unit)

    @classmethod
    async def connect(
        cls,
        endpoint: str,
        token: bytes,
        num_streams: int,
        on_lost: Callable[[str], None],
        access: AccessConfig = OPEN,
    ) -> TcpWire:
        """Raises TransferFailed if the receiver does not accept every stream, BadConfig for certificates that cannot
        be read."""
        loop = asyncio.get_running_loop()
        context = dialling_context(access)
        streams: list[socket.socket] = []
        try:
            for number in range(num_streams):
                streams.append(await _open_stream(endpoint, token, number, context, access.tls_name))
        except OSError as error:
            _close_all(streams)
            raise TransferFailed(f"cannot open a data stream to {endpoint}: {error}") from error
        except BaseException:
            _close_all(streams)
            raise
        wire = cls(streams, on_lost)
        for stream in streams:
            stream.setblocking(True)
            loop.add_reader(stream, wire._on_readable, stream)
        return wire

    def submit(self, units: Sequence[Unit]) -> None:
        self._lanes.submit(units)

    def write(self, lane: int, unit: Unit) -> int:
        num_bytes = unit.job.num_bytes(unit.area)
        head = [memoryview(FRAME.pack(unit.job.epoch, *unit.area, num_bytes))]

        def send(views: list[memoryview]) -> None:
            whole = [*head, *views]
            head.clear()
            send_all(self._streams[lane], whole)

        try:
            unit.job.send(unit.area, send)
            return num_bytes
        except OSError as error:
            raise TransferFailed(f"data stream broke: {error}") from error
        except BaseException:
            # What came next would be taken for the rest of this frame.
            break_off(self._streams[lane])
            raise

    def _on_readable(self, stream: socket.socket) -> None:
        """The receiver says nothing on a stream: what is readable is its end."""
        if not has_ended(stream):
            return
        asyncio.get_running_loop().remove_reader(stream)
        self._on_lost("the receiver closed a data stream")

    async def close(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        loop = asyncio.get_running_loop()
        for stream in self._streams:
            loop.remove_reader(stream)
            break_off(stream)
        self._lanes.close()
        await asyncio.to_thread(self._lanes.join, 5.0)
        _close_all(self._streams)


async def _open_stream(
    endpoint: str, token: bytes, number: int, context: ssl.SSLContext | None, tls_name: str
) -> socket.socket:
    loop = asyncio.get_running_loop()
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    stream = socket.socket(family, kind, protocol)
    try:
        stream.setblocking(False)
        await loop.sock_connect(stream, address)
        tune(stream)
        if context is not None:
            stream = await secured(stream, context, name=tls_name or host)
        await send(stream, PREAMBLE.pack(MAGIC, token, number))
        if await receive(stream, 1) != READY:
            raise ConnectionError("the receiver refused it: token unknown or too many streams")
    except BaseException:
        stream.close()
        raise
    return stream


def _close_all(streams: Sequence[socket.socket]) -> None:
    for stream in streams:
        stream.close()
