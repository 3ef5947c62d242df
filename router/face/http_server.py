"""The HTTP listener of the router: uvicorn on this event loop, plain or with TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from baton import errors
from baton.tls import ListenerFiles
from router.face.http_connection import LINGER_S, Connection, ConnectionLimits, Connections

# Connections accepted at once, between two checks of their number; they must fit into the reserve of descriptors. The
# listen backlog is another number.
_ACCEPTS_AT_ONCE = 16
_BACKLOG = 1024
# Connections whose TLS handshake has begun. With more, the one that has been at it for longest is given up.
_MAX_HANDSHAKES = 256
# A pause after an accept that failed; out of descriptors it would fail again at once.
_ACCEPT_AGAIN_S = 0.1
# uvicorn's own idle time-out, which any byte resets; `Connection.look` handles idle connections here.
_NEVER_S = 86_400
# Bytes of an answer that the kernel accepts before the client has read any; far more than a second's tokens.
_MAX_UNSENT_BYTES = 128 * 1024


def listen(host: str, port: int) -> socket.socket:
    """A socket for the HTTP face. Raises BadConfig if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol given, asyncio sets TCP_NODELAY on accepted sockets. Without it, the first token of a second
    # request on a connection waited 40 ms for the client's delayed ACK of the response head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted sockets inherit it. The default lets the kernel keep megabytes for a client that does not read.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise errors.BadConfig(f"cannot listen on {host}:{port}: {error}", param="http_port") from error
    return listener


class _Uvicorn(uvicorn.Server):
    """With certificates it accepts connections itself: uvicorn would keep the first certificate for ever, and asyncio
    bounds neither the number of handshakes nor, below a minute, their time."""

    def __init__(self, config: uvicorn.Config, certificates: ListenerFiles | None, handshake_timeout_s: float) -> None:
        super().__init__(config)
        self._certificates = certificates
        self._handshake_timeout_s = handshake_timeout_s
        self._accepting: list[asyncio.Task[None]] = []
        # The oldest first.
        self._handshakes: dict[asyncio.Task[None], None] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        certificates = self._certificates
        if certificates is None:
            await super().startup(sockets)
            for listener in sockets or []:
                listener.listen(_BACKLOG)
            return
        await self.lifespan.startup()
        self.servers = []
        for listener in sockets or []:
            listener.setblocking(False)
            listener.listen(_BACKLOG)
            self._accepting.append(asyncio.create_task(self._accept(listener, certificates), name="https"))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        tasks = (*self._accepting, *self._handshakes)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket, certificates: ListenerFiles) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except ConnectionError:
                continue
            except OSError as error:
                # In asyncio's words, which descriptors.say_less_of_accept knows.
                context = {"message": "socket.accept() out of system resource", "exception": error}
                loop.call_exception_handler(context)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            while len(self._handshakes) >= _MAX_HANDSHAKES:
                oldest = next(iter(self._handshakes))
                # Not counted any more, though it ends in the loop's next turn.
                del self._handshakes[oldest]
                oldest.cancel()
            self._begin(connection, certificates.context())
            # Those that wait are accepted without a turn of the loop: a thousand would hold up all that runs on it.
            await asyncio.sleep(0)

    def _begin(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        def ended(done: asyncio.Task[None]) -> None:
            self._handshakes.pop(done, None)
            if done.cancelled():
                connection.close()

        task = asyncio.get_running_loop().create_task(self._greet(connection, context), name="handshake")
        self._handshakes[task] = None
        task.add_done_callback(ended)

    async def _greet(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return made

        # A client that speaks no TLS, does not believe the certificate, or left: it knows why.
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(
                protocol, connection, ssl=context, ssl_handshake_timeout=self._handshake_timeout_s,
                ssl_shutdown_timeout=LINGER_S,
            )  # fmt: skip


class HttpServer:
    """uvicorn on this event loop, on a socket bound here, without its signal handlers."""

    def __init__(
        self, app: ASGIApp, host: str, port: int, limits: ConnectionLimits, count: Callable[[str], None],
        certificates: ListenerFiles | None = None,
    ) -> None:  # fmt: skip
        """``certificates``: what it shows; None: it serves plain HTTP."""
        self._scheme = "http" if certificates is None else "https"
        self._host = host
        self._port = port
        self._connections = Connections(limits, count)

        def connect(**kwargs: Any) -> Connection:
            return Connection(self._connections, **kwargs)

        self._server = _Uvicorn(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2,
                timeout_keep_alive=_NEVER_S, server_header=False, interface="asgi3", ws="none", proxy_headers=False,
                backlog=_ACCEPTS_AT_ONCE, http=connect,  # type: ignore[arg-type]  # it calls what it is given
            ),
            certificates, limits.head_timeout_s,
        )  # fmt: skip
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Returns the base URL."""
        listener = listen(self._host, self._port)
        port = listener.getsockname()[1]
        self._connections.start()
        # `_serve` is `serve` without its signal handling, which belongs to the process.
        self._task = asyncio.create_task(self._server._serve([listener]), name="http")  # noqa: SLF001
        host = f"[{self._host}]" if listener.family is socket.AF_INET6 else self._host
        return f"{self._scheme}://{host}:{port}"

    async def stop(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            await self._task
            self._connections.stop()
