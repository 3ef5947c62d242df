"""A small HTTP server for GET /metrics, for processes without an HTTP face."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import BadConfig

_log = logging.getLogger("baton.metrics")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class MetricsServerConfig:
    request_timeout_s: float = 5.0
    max_connections: int = 16
    max_head_bytes: int = 16 * 1024


class MetricsServer:
    """One answer per connection, on this event loop."""

    def __init__(self, read: Callable[[], bytes], config: MetricsServerConfig | None = None) -> None:
        self._read = read
        self._config = config or MetricsServerConfig()
        self._listener: socket.socket | None = None
        self._server: asyncio.Server | None = None
        # Oldest first.
        self._tasks: dict[asyncio.Task[None], None] = {}

    def bind(self, host: str, port: int) -> int:
        """Bind the port (0: any) and return it; ``start`` begins to answer. Raises BadConfig if it cannot be bound."""
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise BadConfig(f"cannot serve metrics on {host}:{port}: {error}", param="metrics_port") from error
        bound: int = self._listener.getsockname()[1]
        return bound

    async def start(self) -> None:
        assert self._listener is not None, "bind comes first"
        limit = self._config.max_head_bytes
        self._server = await asyncio.start_server(self._accept, sock=self._listener, limit=limit)

    async def close(self) -> None:
        if self._server is None:
            if self._listener is not None:
                self._listener.close()
            return
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= self._config.max_connections:
            # The oldest connection has waited longer for its request than any scraper would.
            oldest = next(iter(self._tasks))
            del self._tasks[oldest]
            oldest.cancel()
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                writer.write(await self._answer_to(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            _log.debug("a scrape failed: %s: %s", type(error).__name__, error)
        finally:
            writer.transport.abort()

    async def _answer_to(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            message = f"the head is larger than {self._config.max_head_bytes} bytes\n"
            return _response("431 Request Header Fields Too Large", message.encode(), "text/plain")
        return self._answer(head.split(b"\r\n", 1)[0])

    def _answer(self, request_line: bytes) -> bytes:
        words = request_line.split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/"):
            return _response("400 Bad Request", b"this is not an HTTP request\n", "text/plain")
        method, path = words[0], words[1].split(b"?", 1)[0]
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed\r\nAllow: GET, HEAD", b"only GET and HEAD\n", "text/plain")
        if path != b"/metrics":
            return _response("404 Not Found", b"there is only /metrics here\n", "text/plain")
        try:
            body = self._read()
        except Exception:  # a defect in one reader must not close the worker's port silently
            _log.exception("metrics could not be read")
            return _response("500 Internal Server Error", b"see the log\n", "text/plain")
        return _response("200 OK", body, CONTENT_TYPE, has_body=method == b"GET")


def _response(status: str, body: bytes, content_type: str, *, has_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if has_body else b"")
