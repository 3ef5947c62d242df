"""One client's HTTP connection, with limits on its memory and its time, and the number of all connections.

It closes connections that are silent, that do not finish a request's head, or that do not read their answer, and it
bounds heads. The application bounds the time of a body.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import socket
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from baton import errors

_log = logging.getLogger("baton.router.http")

# Requests of one connection that are read before the first is answered; later ones are read later. They are counted
# after this many bytes, which contain at most 150 of them (600 where a body ends inside): uvicorn copies the rest of a
# body for each piece.
_MAX_PIPELINED = 16
_HEAD_PIECE_BYTES, _BODY_PIECE_BYTES = 4096, 16384
# How long a refused client may continue to send.
LINGER_S = 2.0
# Interval of the check whether a client that has closed its side, and whose answer has not begun, is still connected.
_PROBES_S = (0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits on the memory and the time of clients' connections."""

    max_connections: int
    # From the connection, or the first byte of a further request, to the end of the request's head.
    head_timeout_s: float
    # Between two requests.
    keep_alive_s: float
    # A client that reads no byte of an answer for this long counts as gone.
    write_timeout_s: float
    max_head_bytes: int
    max_headers: int


class _RefusedHeadError(Exception):
    """A head that is refused; raised inside the parser."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Connections:
    """All connections of one listener. ``count`` gets the reason for each one that is closed early."""

    def __init__(self, limits: ConnectionLimits, count: Callable[[str], None]) -> None:
        self.limits = limits
        self.count = count
        self._all: dict[Connection, None] = {}
        # Those without a request, the longest idle one first.
        self._idle: dict[Connection, None] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    def start(self) -> None:
        limits = self.limits
        pause_s = min(1.0, limits.head_timeout_s / 4, limits.keep_alive_s / 4, limits.write_timeout_s / 4)
        loop = asyncio.get_running_loop()

        def sweep() -> None:
            now = loop.time()
            for connection in list(self._all):
                connection.look(now)
            self._sweeper = loop.call_later(pause_s, sweep)

        sweep()

    def stop(self) -> None:
        """Closes all connections whose client does not read."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._all):
            connection.transport.abort()

    def __len__(self) -> int:
        return len(self._all)

    def joined(self, connection: Connection) -> bool:
        """Makes room by closing the connection that has been idle for longest; False if all are busy."""
        if len(self._all) >= self.limits.max_connections:
            if not self._idle:
                self.count("full")
                return False
            longest = next(iter(self._idle))
            self.count("displaced")
            self.left(longest)
            longest.transport.abort()
        self._all[connection] = None
        self._idle[connection] = None
        return True

    def left(self, connection: Connection) -> None:
        self._all.pop(connection, None)
        self._idle.pop(connection, None)

    def is_idle(self, connection: Connection) -> None:
        if connection in self._all:
            self._idle[connection] = None

    def is_busy(self, connection: Connection) -> None:
        self._idle.pop(connection, None)


class Connection(HttpToolsProtocol):
    """One client's connection: uvicorn's protocol with the limits of this module."""

    def __init__(self, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mates = connections
        self._limits = connections.limits
        # Deadline of the head or of the next request; None while a request is served.
        self._deadline_s: float | None = None
        self._is_in_head = False
        self._is_in_message = False
        # Bytes of a head, of trailers or of chunk extensions so far.
        self._framing_bytes = 0
        # Input behind more requests than are read ahead. Reading is paused meanwhile.
        self._held = b""
        self._refusal: _RefusedHeadError | None = None
        self._is_refused = False
        # Bytes that the client has not read, and since when the number has not fallen.
        self._unsent_bytes = 0
        self._unsent_since_s = 0.0

    # ── Life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline_s = self.loop.time() + self._limits.head_timeout_s
        if not self._mates.joined(self):
            self._refuse(503, "the router has as many connections as it may have; try again later", lingers=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._mates.left(self)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def look(self, now: float) -> None:
        """Close the connection if a deadline has passed."""
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            # The kernel accepts in steps of 64 KiB, and sends as the client reads.
            unsent += _unacknowledged_bytes(self.transport.get_extra_info("socket"))
        if unsent == 0 or unsent != self._unsent_bytes:
            self._unsent_bytes, self._unsent_since_s = unsent, now
        elif now - self._unsent_since_s >= self._limits.write_timeout_s:
            _log.info("%s took nothing for %.0f s and is given up", self._peer, self._limits.write_timeout_s)
            self._mates.count("stuck")
            self.transport.abort()
            return
        if self._deadline_s is not None and now >= self._deadline_s and not self._is_answering:
            if not self._is_refused:
                self._mates.count("slow_head" if self._is_in_head or self.cycle is None else "idle")
            self.transport.abort()

    @property
    def _peer(self) -> str:
        return "a client" if self.client is None else f"{self.client[0]}:{self.client[1]}"

    @property
    def _has_tls(self) -> bool:
        return self.scheme == "https"

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # Input

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        data, self._held = self._held + data, b""
        try:
            begin = 0
            while begin < len(data):
                if len(self.pipeline) >= _MAX_PIPELINED:
                    self._held = data[begin:]
                    self.flow.pause_reading()
                    break
                is_in_body = self._is_in_message and not self._is_in_head
                end = begin + (_BODY_PIECE_BYTES if is_in_body else _HEAD_PIECE_BYTES)
                self._take(data[begin:end])
                begin = end
        except (httptools.HttpParserError, _RefusedHeadError) as error:
            refusal = self._refusal or (error if isinstance(error, _RefusedHeadError) else None)
            self._mates.count("large_head" if refusal is not None and refusal.status == 431 else "malformed")
            if self._is_answering and (self.cycle.response_started or self.pipeline):
                self.transport.abort()  # a refusal here would look like a part of the answer
            elif refusal is not None:
                self._refuse(refusal.status, refusal.message)
            else:
                self._refuse(400, f"this is not an HTTP/1.1 request: {type(error).__name__}: {error}")

    def _take(self, data: bytes) -> None:
        if self._is_in_message:
            self._framing_bytes += len(data)
        while data:
            data = self._feed(data)
        if self._is_in_message and self._framing_bytes > self._limits.max_head_bytes:
            raise self._too_large()

    def _feed(self, data: bytes) -> bytes:
        """Returns the bytes to be read again. A request for another protocol (Java's client sends one each time) is
        served without the switch; the parser would leave its body to the other protocol."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as asked:
            line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            headers = [b"%s: %s\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            return b"".join([line, *headers, b"\r\n", data[asked.args[0] :]])
        return b""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._is_in_head = self._is_in_message = True
        self._framing_bytes = 0
        self._deadline_s = self.loop.time() + self._limits.head_timeout_s

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_head:
            return  # a trailer: no route uses one
        # Whitespace around a value is not part of it (RFC 9110, 5.5); the parser leaves what is behind.
        super().on_header(name, value.rstrip(b" \t"))
        if len(self.headers) > self._limits.max_headers:
            raise self._too_large()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._check_head()
        if self.parser.should_upgrade():
            return
        self._deadline_s = None
        self._mates.is_busy(self)
        if self.parser.get_http_version() == "1.0":
            app, self.app = self.app, (unchunked := _Unchunked(self.app))
            super().on_headers_complete()
            self.app, unchunked.cycle = app, self.cycle
        else:
            super().on_headers_complete()
        held = _HeadHeld(self.transport, self.cycle, self.loop, self._close)
        self.cycle.transport = cast(asyncio.Transport, held)

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_message = False
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _check_head(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_head_bytes:
            raise self._too_large()
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        version = self.parser.get_http_version()
        if num_hosts > 1 or (num_hosts == 0 and version == "1.1"):
            raise self._refused(400, f"the request has {num_hosts} Host headers, expected one")
        if version not in ("1.0", "1.1"):
            raise self._refused(505, f"HTTP/{version} is not served here, expected HTTP/1.1")
        if self.parser.get_method() == b"CONNECT":
            raise self._refused(501, "this is no proxy: CONNECT is not served here")
        # The parser decodes only chunks: a body that was compressed as well would look like a plain one.
        coding = b", ".join(value for name, value in self.headers if name == b"transfer-encoding")
        if coding and coding.strip().lower() != b"chunked":
            found = errors.quoted(coding.decode("latin-1"))
            # If chunked is the last coding, at least the end of the body is known.
            status = 501 if coding.lower().endswith(b"chunked") else 400
            raise self._refused(status, f"the body's Transfer-Encoding is {found}, expected chunked or none")

    def _too_large(self) -> _RefusedHeadError:
        limits = self._limits
        return self._refused(
            431,
            f"the request's head, or what comes with its chunks, is too large, expected at most "
            f"{limits.max_head_bytes} bytes and {limits.max_headers} headers",
        )

    def _refused(self, status: int, message: str) -> _RefusedHeadError:
        """Stored here as well: the parser raises its own error instead."""
        self._refusal = _RefusedHeadError(status, message)
        return self._refusal

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that closed its side after the request still gets the answer, unless it has disconnected. Over TLS
        both sides are closed at once."""
        if self._has_tls or not self._is_answering or self.cycle.more_body or self.transport.is_closing():
            return None
        self.cycle.keep_alive = False
        self._probe(0)
        return True

    def _probe(self, number: int) -> None:
        """Tests whether the client is still connected: only a byte sent to it tells a half-closed connection from a
        closed one.

        So the answer is begun: its first bytes are the same in all cases. Between two chunks of an answer the byte is a
        leading zero of the next chunk's size. A client that has left answers with a reset.
        """
        cycle = self.cycle
        if self.transport.is_closing() or cycle.response_complete:
            return
        sock = self.transport.get_extra_info("socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0:
            self.transport.abort()
            return
        if number == 0 and not cycle.response_started and not self.pipeline:
            cycle.transport = cast(asyncio.Transport, _Begun(self.transport))
        elif number == 0 and cycle.chunked_encoding and not getattr(cycle.transport, "is_holding", False):
            self.transport.write(b"0")
        self.loop.call_later(_PROBES_S[min(number, len(_PROBES_S) - 1)], self._probe, number + 1)

    # Output

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_answering and not self._is_refused:
            self._deadline_s = self.loop.time() + self._limits.keep_alive_s
            self._mates.is_idle(self)
        if self._held and not self.transport.is_closing():
            self.data_received(b"")

    def _refuse(self, status: int, message: str, *, lingers: bool = True) -> None:
        """Answer without the application, and close."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        if not lingers or self._is_answering:
            self.transport.close()
        else:
            self._linger()

    def _close(self) -> None:
        """After the answer to a client that keeps no connection. It may still be sending what is not read."""
        if self._is_in_message and not self.transport.is_closing():
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Close, but read pending input meanwhile: closing at once would reset the connection, and a client that is
        still sending would not read the answer."""
        self._is_refused = True
        self.flow.resume_reading()
        self._deadline_s = self.loop.time() + LINGER_S
        if self.transport.can_write_eof():
            self.transport.write_eof()


def _unacknowledged_bytes(sock: socket.socket) -> int:
    """Bytes of the stream in the kernel's send queue."""
    held: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
    return held


class _HeadHeld:
    """A transport that holds the response head back until the body's first bytes of the same loop turn, and sends
    both together. A send costs about a tenth of the router's work until the first token."""

    def __init__(
        self,
        transport: asyncio.Transport,
        cycle: RequestResponseCycle,
        loop: asyncio.AbstractEventLoop,
        close: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._cycle = cycle
        self._loop = loop
        self._close = close
        self._head: bytes | None = None
        self.is_holding = True

    def write(self, data: bytes) -> None:
        if not self.is_holding:
            self._transport.write(data)
        elif self._head is None:
            self._head = data
            self._loop.call_soon(self._release)
        else:
            self._release(data)

    def close(self) -> None:
        self._release()
        self._close()

    def _release(self, body: bytes = b"") -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self.is_holding = False
            # It has to close a connection that is not kept.
            if self._cycle.keep_alive:
                self._cycle.transport = self._transport
            self._transport.write(head + body)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Begun:
    """A transport to which the first bytes of the status line have been written."""

    _PREFIX = b"HTTP/1.1 "

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._is_first = True
        transport.write(self._PREFIX)

    def write(self, data: bytes) -> None:
        if self._is_first:
            assert data.startswith(self._PREFIX)
            data = data[len(self._PREFIX) :]
            self._is_first = False
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Unchunked:
    """The application for an HTTP/1.0 client, which does not support chunks: an answer without a length ends with
    the connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.cycle: RequestResponseCycle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = self.cycle
        assert cycle is not None
        is_open = False

        async def send_plain(message: Message) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start":
                is_open = not any(name.lower() == b"content-length" for name, _ in message["headers"])
                if is_open:
                    cycle.chunked_encoding = False
            elif is_open:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, send_plain)
