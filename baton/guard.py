"""Refuses gRPC calls whose caller does not prove who it is, before their messages are read. Needs the `router` extra.

Health and reflection stay open: probes have no secret.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

import grpc
from grpc import aio

from baton import errors
from baton.clock import Clock
from baton.defects import LogLimit
from baton.server import abort_with

_OPEN = (
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
)

_log = logging.getLogger("baton.access")

# method and metadata of a call; raises a BatonError to refuse it.
Check = Callable[[str, Mapping[str, str | bytes]], None]


def host_of_peer(peer: str) -> str:
    """Of what gRPC calls a peer: ipv4:127.0.0.1:50000, or ipv6:[::1]:50000 with the brackets as %5B and %5D."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


class Refusals:
    """Counts refused callers, and logs each once a minute at most."""

    def __init__(self, clock: Clock, count: Callable[[], None], level: int = logging.WARNING) -> None:
        self._count = count
        self._level = level
        self._limit = LogLimit(clock, burst=1, window_s=60.0)

    def refused(self, host: str, what: str, error: errors.BatonError) -> None:
        self._count()
        more = self._limit.admits(host)
        if more is not None:
            _log.log(self._level, "%s was refused %s: %s%s", host or "a peer", what, error.message, more)


class Guard(aio.ServerInterceptor):
    def __init__(self, check: Check, refusals: Refusals) -> None:
        self._check = check
        self._refusals = refusals

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN):
            return handler
        metadata: dict[str, str | bytes] = dict(handler_call_details.invocation_metadata or ())
        try:
            self._check(method, metadata)
        except errors.BatonError as error:
            return self._refusing(error, method, handler)
        return handler

    def _refusing(
        self, error: errors.BatonError, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            self._refusals.refused(host_of_peer(context.peer()), method, error)
            await abort_with(context, error)

        async def refuse_stream(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            await refuse(request, context)
            yield  # makes it a stream

        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        behaviour = refuse_stream if handler.response_streaming else refuse
        made: grpc.RpcMethodHandler[Any, Any] = getattr(grpc, f"{kind}_rpc_method_handler")(
            # What the message is does not matter, nor whether it can be parsed.
            behaviour, lambda data: data, handler.response_serializer,
        )  # fmt: skip
        return made
