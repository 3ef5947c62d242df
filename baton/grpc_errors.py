"""How an error of `baton.errors` crosses a gRPC call: what servers add to the status, and what clients make of it."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from grpc import aio

from baton import errors

# Trailing metadata: which error of baton.errors ended a call.
ERROR_CODE_KEY = "baton-error-code"
ERROR_PARAM_KEY = "baton-error-param"
RETRY_AFTER_KEY = "baton-retry-after-s"

_CODE_TO_ERROR: Mapping[grpc.StatusCode, type[errors.BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.UnknownModel,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Incompatible,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.Forbidden,
}

# What gRPC itself says, on either side, of messages and metadata over its limits: no later try fits better.
_SIZE_REFUSALS = ("message larger than max", "metadata size exceeds")


def error_of(error: grpc.RpcError) -> errors.BatonError:
    """The error that the other process raised; for a status from elsewhere the nearest one."""
    if not isinstance(error, grpc.Call | aio.AioRpcError):
        return errors.Unavailable(str(error))
    trailing = error.trailing_metadata() or ()
    metadata = {key: value for key, value in trailing if isinstance(value, str)}
    message = error.details() or error.code().name
    if ERROR_CODE_KEY in metadata:
        found = errors.from_code(metadata[ERROR_CODE_KEY], message)
    elif error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and any(words in message for words in _SIZE_REFUSALS):
        found = errors.InvalidRequest(message)
    else:
        found = _CODE_TO_ERROR.get(error.code(), errors.InternalError)(message)
    found.param = metadata.get(ERROR_PARAM_KEY)
    if RETRY_AFTER_KEY in metadata:
        found.retry_after_s = float(metadata[RETRY_AFTER_KEY])
    return found
