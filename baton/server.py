"""The gRPC server of every Baton process: binding, health, reflection, error mapping, message limits, stop.

Each process adds its own servicers. Needs the `router` extra.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton import reflection
from baton.descriptors import num_allowed, shares
from baton.errors import BadConfig, BatonError, InternalError, InvalidRequest, described
from baton.grpc_errors import ERROR_CODE_KEY, ERROR_PARAM_KEY, RETRY_AFTER_KEY

ERROR_DOMAIN = "baton"
# A health name that stays SERVING while the process is well, also while it drains: for liveness probes.
LIVENESS = "baton.live"
_DETAILS_KEY = "grpc-status-details-bin"
# How long the end of a call waits for a peer that does not read.
_STATUS_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)

Servicer = TypeVar("Servicer")


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one connection may ask of the process."""

    max_message_bytes: int = 16 * 1024 * 1024
    max_concurrent_streams: int = 10_000
    # All of a call's metadata; gRPC refuses more with RESOURCE_EXHAUSTED.
    max_metadata_bytes: int = 16 * 1024
    # Connections of all peers; further ones are closed at once. 0: a quarter of the files that the process may open.
    max_connections: int = 0
    # From the connection to the end of the HTTP/2 handshake.
    handshake_timeout_s: float = 10.0
    # A connection without calls is closed after so long; peers that need it again connect again.
    idle_s: float = 300.0
    # A silent peer is pinged, and dropped if it does not answer.
    keepalive_s: float = 5.0
    keepalive_timeout_s: float = 5.0
    # A peer without calls that pings more often is dropped; gRPC's own default.
    least_ping_interval_s: float = 300.0

    def options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", self.max_concurrent_streams),
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            ("grpc.max_allowed_incoming_connections", self.max_connections or shares(num_allowed()).grpc),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_timeout_s * 1000)),
            ("grpc.http2.settings_timeout", int(self.handshake_timeout_s * 1000)),
            ("grpc.max_connection_idle_ms", int(self.idle_s * 1000)),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", int(self.least_ping_interval_s * 1000)),
            # Else two processes on one port would silently share its connections.
            ("grpc.so_reuseport", 0),
        ]


class GrpcServer:
    """One grpc.aio server: ``bind`` it, add servicers, ``start``, and ``stop`` with a deadline."""

    def __init__(
        self,
        limits: ServerLimits | None = None,
        on_malformed: Callable[[], None] = lambda: None,
        *,
        guards: Sequence[grpc.aio.ServerInterceptor] = (),
        parsers: Sequence[grpc.aio.ServerInterceptor] = (),
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """``on_malformed`` is called for every message that cannot be parsed.

        ``guards`` see a call first, before its message is parsed; ``parsers`` see it last, and their errors are mapped.
        ``credentials`` come from `baton/channels.py`; None: ports are plain.
        """
        self._credentials = credentials
        self._server = grpc.aio.server(
            options=(limits or ServerLimits()).options(),
            interceptors=[*guards, ErrorMappingInterceptor(on_malformed), *parsers],
        )
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []

    def add(
        self, register: Callable[[Servicer, grpc.aio.Server], None], servicer: Servicer, service_name: str = ""
    ) -> None:
        """``register`` is the generated ``add_XServicer_to_server``. Without its full proto name it is not listed."""
        register(servicer, self._server)
        if service_name:
            self._names.append(service_name)

    def bind(self, listen: str, *, advertise_host: str | None = None, param: str = "listen") -> str:
        """Bind ``host:port`` (port 0: any); returns the address to advertise. Raises BadConfig if that fails, with the
        name of the setting that it comes from."""
        host, colon, port = listen.rpartition(":")
        if not colon or not port.isdigit():
            raise BadConfig(f"listen address is {listen!r}, expected host:port", param=param)
        try:
            if self._credentials is None:
                bound = self._server.add_insecure_port(listen)
            else:
                bound = self._server.add_secure_port(listen, self._credentials)
        except RuntimeError as error:
            raise BadConfig(f"cannot listen on {listen}: {error}", param=param) from error
        if bound == 0:
            raise BadConfig(f"cannot listen on {listen}: the address is taken or not ours", param=param)
        return f"{advertise_host or host}:{bound}"

    async def start(self, *, is_serving: bool = True) -> None:
        """Serve what was added, with health and reflection. ``is_serving``: as for ``set_serving``."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.add_to(self._server, (*self._names, health.SERVICE_NAME))
        await self._server.start()
        await self.set_live(True)
        await self.set_serving(is_serving)

    async def set_serving(self, is_serving: bool) -> None:
        """Readiness: health of the whole server ("") and of every service added."""
        for name in ("", *self._names):
            await self._health.set(name, _health(is_serving))

    async def set_live(self, is_live: bool) -> None:
        await self._health.set(LIVENESS, _health(is_live))

    async def stop(self, grace_s: float) -> None:
        """Accept nothing new, give running calls ``grace_s`` seconds, then cut them off."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _health(is_well: bool) -> health_pb2.HealthCheckResponse.ServingStatus.ValueType:
    status = health_pb2.HealthCheckResponse
    return status.SERVING if is_well else status.NOT_SERVING


def rich_status(error: BatonError) -> status_pb2.Status:
    """The error as google.rpc.Status: message, ErrorInfo (reason = class name) and RetryInfo where a time is known."""
    info = error_details_pb2.ErrorInfo(
        reason=error.code, domain=ERROR_DOMAIN, metadata={"retryable": str(error.retryable).lower()}
    )
    if error.param is not None:
        info.metadata["param"] = error.param
    details = [_packed(info)]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    code = grpc.StatusCode[error.grpc_status].value[0]
    return status_pb2.Status(code=code, message=error.message, details=details)


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: BatonError) -> NoReturn:
    """End the call with the error's status; its name, parameter and retry time are in the metadata as text as well."""
    metadata = [(_DETAILS_KEY, rich_status(error).SerializeToString()), (ERROR_CODE_KEY, error.code)]
    if error.param is not None:
        metadata.append((ERROR_PARAM_KEY, error.param))
    if error.retry_after_s is not None:
        metadata.append((RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}"))
    await context.abort(grpc.StatusCode[error.grpc_status], error.message, trailing_metadata=tuple(metadata))


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a request that could not be parsed: an exception there would not reach an interceptor."""

    reason: str


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return parse


class ErrorMappingInterceptor(grpc.aio.ServerInterceptor):
    """Turns a servicer's exception into a status: a BatonError into its own, any other into INTERNAL with a log line.

    A malformed message becomes INVALID_ARGUMENT with one line of log.
    """

    def __init__(self, on_malformed: Callable[[], None] = lambda: None) -> None:
        self._on_malformed = on_malformed

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        rebuild = getattr(grpc, f"{kind}_rpc_method_handler")
        behaviour = getattr(handler, kind)
        method = handler_call_details.method
        wrap = self._guard_stream if inspect.isasyncgenfunction(behaviour) else self._guard
        # Messages of a stream raise where they are read, which is inside the behaviour.
        parse = handler.request_deserializer if handler.request_streaming else _lenient(handler.request_deserializer)
        # Quoted: the class is generic only in its stubs.
        return cast(
            "grpc.RpcMethodHandler[Any, Any]", rebuild(wrap(behaviour, method), parse, handler.response_serializer)
        )

    def _guard(self, behaviour: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Any]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await behaviour(_parsed(request), context)
            except Exception as error:
                await self._end(context, error, method)

        return guarded

    def _guard_stream(
        self, behaviour: Callable[[Any, Any], AsyncIterator[Any]], method: str
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                async for response in behaviour(_parsed(request), context):
                    yield response
            except Exception as error:
                await self._end(context, error, method)

        return guarded

    async def _end(self, context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, (grpc.aio.UsageError, grpc.aio.InternalError)):
            # The peer left during a read or write, or does not read: no status can reach it.
            _log.info("%s from %s was over before it was answered: %s", method, context.peer(), error)
            raise asyncio.CancelledError from error
        if isinstance(error, DecodeError):
            self._on_malformed()
            _log.info("%s from %s is refused: %s", method, context.peer(), error)
            error = InvalidRequest(f"the message to {method} is malformed: {error}")
        elif not isinstance(error, BatonError):
            _log.error("%s raised", method, exc_info=error)
            error = InternalError(described(error))
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                await abort_with(context, error)
        except (grpc.aio.UsageError, grpc.aio.InternalError, TimeoutError) as late:
            # The call is over, or the peer does not read and a pending write blocks the status. The call is cut off.
            _log.info("%s from %s could not be told %r: %s", method, context.peer(), error.message, late)
            raise asyncio.CancelledError from late


def _parsed(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise DecodeError(request.reason)
    return request
