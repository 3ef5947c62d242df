"""The one error tree. Each leaf knows its gRPC status, HTTP status, OpenAI error type and whether a retry can help.

BatonError
├── InvalidRequest        the caller's mistake                                INVALID_ARGUMENT    400
│   ├── PromptTooLong     prompt + output exceed the context                  INVALID_ARGUMENT    400
│   ├── UnknownModel      the name is not served here                         NOT_FOUND           404
│   ├── UnknownNode       no such node is in the cluster                      NOT_FOUND           404
│   └── UnknownResponse   no such response is kept here                       NOT_FOUND           404
├── Unauthenticated       no key, or not one of ours                          UNAUTHENTICATED     401
├── Forbidden             a client's key where the admin's is needed          PERMISSION_DENIED   403
├── Overloaded            refused now, come back later                        RESOURCE_EXHAUSTED  429   retryable
│   ├── RateLimited       more than its API key may have                      RESOURCE_EXHAUSTED  429   retryable
│   ├── NoBlocks          the node's KV pool has no room                      RESOURCE_EXHAUSTED  429   retryable
│   └── TooLate           it would miss its objectives                        RESOURCE_EXHAUSTED  429   retryable
│       └── Shed          the same, refused before others for its priority    RESOURCE_EXHAUSTED  429   retryable
├── Unavailable           no node can serve it at present                     UNAVAILABLE         503   retryable
│   ├── Draining          the node refuses new work, it is about to leave     UNAVAILABLE         503   retryable
│   ├── NodeLost          a node died or its session broke                    UNAVAILABLE         503   retryable
│   └── TransferFailed    KV did not arrive                                   UNAVAILABLE         503   retryable
├── Conflict              no longer as the caller's decision assumed         ABORTED             409   retryable
├── Incompatible          fingerprint, layout, dtype or version differ        FAILED_PRECONDITION 409
├── DeadlineExceeded      the request's time is up                            DEADLINE_EXCEEDED   408
├── Cancelled             the client left                                     CANCELLED           499
├── ClientTooSlow         too much of its output waits for the client          ABORTED             408
├── UnsupportedModel      this model cannot be served, and why                FAILED_PRECONDITION 500
├── BadConfig             a setting is wrong; stops the start                 FAILED_PRECONDITION 500
├── BadLogits             NaN or infinity where a token is to be drawn        INTERNAL            500
└── InternalError         our own defect                                      INTERNAL            500
"""

from __future__ import annotations

import reprlib
from itertools import islice
from typing import ClassVar

# A message must fit into one gRPC trailer and one log line. A trailer holds 8 KiB: the message twice, once with three
# bytes for each byte that is not ASCII.
MAX_MESSAGE_BYTES = 1000
_MAX_QUOTED_CHARS = 80
_MAX_DESCRIBED_CHARS = 200


class BatonError(Exception):
    """Base of every error Baton raises on purpose. The message says what was wrong, what was expected, what to do."""

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        message = _sendable(message)
        super().__init__(message)
        self.message = message
        self.param = None if param is None else shortened(param, _MAX_QUOTED_CHARS)
        self.retry_after_s = retry_after_s

    @property
    def code(self) -> str:
        return type(self).__name__


class InvalidRequest(BatonError):
    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    openai_type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    pass


class UnknownModel(InvalidRequest):
    grpc_status = "NOT_FOUND"
    http_status = 404


class UnknownNode(InvalidRequest):
    grpc_status = "NOT_FOUND"
    http_status = 404


class UnknownResponse(InvalidRequest):
    grpc_status = "NOT_FOUND"
    http_status = 404


class Unauthenticated(BatonError):
    grpc_status = "UNAUTHENTICATED"
    http_status = 401
    openai_type = "invalid_request_error"


class Forbidden(BatonError):
    grpc_status = "PERMISSION_DENIED"
    http_status = 403
    openai_type = "invalid_request_error"


class Overloaded(BatonError):
    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429
    openai_type = "rate_limit_error"
    retryable = True


class RateLimited(Overloaded):
    pass


class NoBlocks(Overloaded):
    pass


class TooLate(Overloaded):
    pass


class Shed(TooLate):
    pass


class Unavailable(BatonError):
    grpc_status = "UNAVAILABLE"
    http_status = 503
    openai_type = "service_unavailable_error"
    retryable = True


class Draining(Unavailable):
    pass


class NodeLost(Unavailable):
    pass


class TransferFailed(Unavailable):
    pass


class Conflict(BatonError):
    grpc_status = "ABORTED"
    http_status = 409
    retryable = True


class Incompatible(BatonError):
    grpc_status = "FAILED_PRECONDITION"
    http_status = 409
    openai_type = "server_error"


class DeadlineExceeded(BatonError):
    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 408
    openai_type = "timeout_error"


class Cancelled(BatonError):
    grpc_status = "CANCELLED"
    http_status = 499
    openai_type = "cancelled"


class ClientTooSlow(BatonError):
    grpc_status = "ABORTED"
    http_status = 408
    openai_type = "timeout_error"


class UnsupportedModel(BatonError):
    grpc_status = "FAILED_PRECONDITION"


class BadConfig(BatonError):
    grpc_status = "FAILED_PRECONDITION"


class BadLogits(BatonError):
    """Not retryable: every node with these weights computes the same logits for these tokens."""


class InternalError(BatonError):
    pass


def shortened(text: str, max_chars: int) -> str:
    """``text``, or its beginning and its length."""
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}... ({len(text)} characters)"


def _sendable(message: str) -> str:
    """The message as valid UTF-8, cut at MAX_MESSAGE_BYTES with its length appended."""
    raw = message.encode("utf-8", "backslashreplace")
    if len(raw) <= MAX_MESSAGE_BYTES:
        return raw.decode()
    return f"{raw[:MAX_MESSAGE_BYTES].decode('utf-8', 'ignore')}... ({len(message)} characters)"


class _Quote(reprlib.Repr):
    """repr() whose cost and length are bounded whatever the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxother = _MAX_QUOTED_CHARS

    def repr_str(self, x: str, level: int) -> str:
        head = repr(x[:_MAX_QUOTED_CHARS])
        return head if len(x) <= _MAX_QUOTED_CHARS else f"{head}... ({len(x)} characters)"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return self.repr_str(x.decode("latin-1"), level) if len(x) > _MAX_QUOTED_CHARS else repr(x)

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        # As inherited, but without sorting all keys first.
        few = {k: x[k] for k in islice(x, self.maxdict)}
        return super().repr_dict(few, level).removesuffix("}") + (", ...}" if len(x) > len(few) else "}")

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() <= 256:
            return str(x)
        return f"an integer of about {int(x.bit_length() * 0.30103) + 1} digits"


_QUOTE = _Quote()


def quoted(value: object) -> str:
    """A value that came from outside, for a message: its representation, shortened."""
    return shortened(_QUOTE.repr(value), 2 * _MAX_QUOTED_CHARS)


def leaves_of(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions in a group, however deep."""
    return [
        leaf
        for error in group.exceptions
        for leaf in (leaves_of(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def cause_of(error: BaseException) -> BaseException:
    """The error itself; of an exception group the first that is no BatonError, else the first."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = leaves_of(error)
    return next((leaf for leaf in leaves if not isinstance(leaf, BatonError)), leaves[0])


def described(error: BaseException) -> str:
    """Type and text of an error, for a message; of a group those of its cause, since a group's text is only a count."""
    cause = cause_of(error)
    return f"{type(cause).__name__}: {shortened(str(cause), _MAX_DESCRIBED_CHARS)}"


def _leaves(root: type[BatonError]) -> dict[str, type[BatonError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _leaves(child)
    return found


def from_code(code: str, message: str, param: str = "") -> BatonError:
    """Rebuild an error from the ``code`` it had on the other side of a wire; unknown codes become InternalError."""
    error = _leaves(BatonError).get(code)
    return InternalError(f"{code}: {message}") if error is None else error(message, param=param or None)
