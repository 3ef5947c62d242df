"""Checks the structure of gRPC requests, and parses each when the event loop has time for it.

gRPC would parse a message on the event loop as soon as it arrives, which blocks the loop for 16 ms a megabyte if the
message consists of empty parts (0.1 ms if it is text). So gRPC passes bytes, and they are parsed here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
from grpc import aio

from baton import errors
from baton.server import abort_with
from baton.v1 import router_pb2
from router.face.body import SMALL_BODY_BYTES
from router.turns import Turns

_GENERATE = f"/{router_pb2.DESCRIPTOR.services_by_name['Router'].full_name}/Generate"
# Fields of the request with parts of their own, which cost as much.
_NESTED = tuple(
    router_pb2.GenerateRequest.DESCRIPTOR.fields_by_name[name].number
    for name in ("chat", "sampling", "structured_output")
)
_FIELDS = router_pb2.GenerateRequest.DESCRIPTOR.fields_by_number


class ParseInTurns(aio.ServerInterceptor):
    """For `Generate`, the only method with large requests. Refuses messages of more than ``max_parts`` parts: fields
    of the request, of its conversation and of its sampling."""

    def __init__(self, turns: Turns, max_parts: int) -> None:
        self._turns = turns
        self._max_parts = max_parts

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler_call_details.method != _GENERATE:
            return cast("grpc.RpcMethodHandler[Any, Any] | None", handler)
        parse, behaviour = handler.request_deserializer, handler.unary_stream

        async def parsed(raw: bytes, context: Any) -> None:
            await self._turns.wait()
            if len(raw) > SMALL_BODY_BYTES and (error := self._complaint(raw)) is not None:
                await abort_with(context, error)
            await behaviour(parse(raw), context)

        found = grpc.unary_stream_rpc_method_handler(parsed, bytes, handler.response_serializer)
        return cast("grpc.RpcMethodHandler[Any, Any]", found)

    def _complaint(self, raw: bytes) -> errors.BatonError | None:
        param = overfull(raw, self._max_parts)
        if param is None:
            return None
        return errors.InvalidRequest(
            f"the message has more than {self._max_parts} parts, the last of them in {param}, expected fewer; send "
            "less at once",
            param=param,
        )


def overfull(raw: bytes, max_parts: int) -> str | None:
    """The field whose parts exceed the limit; None if none does, as far as the message can be read."""
    num_parts = 0
    # Position, end and field of the messages still to be read; 0 is the request itself.
    pending = [(0, len(raw), 0)]
    try:
        while pending:
            at, end, field = pending.pop()
            while at < end:
                tag, at = _varint(raw, at)
                num_parts += 1
                if num_parts > max_parts:
                    found = _FIELDS.get(field or tag >> 3)
                    return found.name if found is not None else "unknown fields"
                match tag & 7:
                    case 0:
                        _, at = _varint(raw, at)
                    case 1:
                        at += 8
                    case 2:
                        size, at = _varint(raw, at)
                        if not field and tag >> 3 in _NESTED:
                            pending.append((at, min(at + size, end), tag >> 3))
                        at += size
                    case 5:
                        at += 4
    except IndexError:
        pass  # malformed: the parser will report it
    return None


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("a number of more than ten bytes")
