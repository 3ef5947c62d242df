"""API keys for the two faces of the router, checked in wrappers around the applications.

As in vLLM: with keys set, paths under /v1 need `Authorization: Bearer KEY`, or `x-api-key: KEY` as Anthropic's clients
send it; health and metrics stay open. The status page stays open too, but its data, which names requests and machines,
needs a key. Of the gRPC services the router's own needs the same words as metadata; health and reflection stay open.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc import aio
from starlette.types import ASGIApp, Receive, Scope, Send

from baton import errors
from baton.api_keys import ApiKey
from baton.server import abort_with
from router.clients import authorization_of, key_in
from router.http_errors import body_of

_GUARDED_PATHS = ("/v1", "/tokenize", "/detokenize", "/status/data")


class ApiKeys:
    """Stores digests, not keys: they have equal length, so that a comparison takes the same time for any input."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._digests = [_digest(key.secret.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: bytes) -> None:
        """Raises Unauthenticated unless the header's value is `Bearer` and one of the keys."""
        if not authorization:
            raise errors.Unauthenticated(
                "no API key was given, expected the header 'Authorization: Bearer KEY' (BATON_API_KEY for `baton`)"
            )
        asked = _digest(key_in(authorization))
        # Every key is compared, so that the time does not depend on the key.
        matches = [hmac.compare_digest(asked, digest) for digest in self._digests]
        if not any(matches):
            raise errors.Unauthenticated(
                "the API key is not one of this router's, expected 'Authorization: Bearer KEY'"
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class HttpGuard:
    """An ASGI application that wraps another."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Browsers send preflight requests without a key.
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and _is_guarded(scope["path"]):
            try:
                self._keys.check(authorization_of(scope))
            except errors.Unauthenticated as error:
                await _refuse(error, scope["path"], send)
                return
        await self._app(scope, receive, send)


def _is_guarded(path: str) -> bool:
    return any(path == guarded or path.startswith(f"{guarded}/") for guarded in _GUARDED_PATHS)


async def _refuse(error: errors.Unauthenticated, path: str, send: Send) -> None:
    body = json.dumps(body_of(error, path)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class GrpcGuard(aio.ServerInterceptor):
    """Refuses calls of one service without a key, for all kinds of methods."""

    def __init__(self, service_name: str, keys: ApiKeys) -> None:
        self._prefix = f"/{service_name}/"
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        metadata: dict[str, str | bytes] = dict(handler_call_details.invocation_metadata or ())
        said = metadata.get("authorization", b"")
        try:
            self._keys.check(said.encode() if isinstance(said, str) else said)
        except errors.Unauthenticated as error:
            return _refusing(error, handler)
        return handler


def _refusing(
    error: errors.Unauthenticated, handler: grpc.RpcMethodHandler[Any, Any]
) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        await abort_with(context, error)

    async def refuse_stream(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        await abort_with(context, error)
        yield  # makes it a stream

    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    behaviour = refuse_stream if handler.response_streaming else refuse
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
