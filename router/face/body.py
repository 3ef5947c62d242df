"""Reads the body of a request that generates: within limits, and checked before it is parsed.

A parser holds Python's lock from the first byte to the last, so a body's cost is bounded before: its bytes by the
model's context, and its structure, which costs far more than text (0.3 ms a megabyte of text, 150 ms a megabyte of
one-element lists).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.types import Receive, Scope

from baton import errors
from baton.errors import quoted
from router.config import LimitsConfig

# Bodies up to this size need no limit.
SMALL_BODY_BYTES = 16 * 1024


class BodyReader:
    """Reads bodies and bounds their total memory. ``max_bytes`` returns the limit of one body."""

    def __init__(self, limits: LimitsConfig, max_bytes: Callable[[], int]) -> None:
        self._limits = limits
        self._max_bytes = max_bytes
        self._num_held_bytes = 0

    @asynccontextmanager
    async def read(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """The body; its bytes count as held until the block ends.

        Raises Encoded and TooLarge (before reading, if the length is announced), Overloaded, DeadlineExceeded,
        Cancelled.
        """
        for name, value in scope["headers"]:
            if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise Encoded(value)
        limit = self._max_bytes()
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if _is_beyond(declared, limit):
            raise TooLarge(limit)
        chunks: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self._limits.write_timeout_s):
                    is_more = True
                    while is_more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise errors.Cancelled("the client left")
                        chunk = message.get("body", b"")
                        is_more = message.get("more_body", False)
                        size += len(chunk)
                        self._num_held_bytes += len(chunk)
                        self._check(size, limit)
                        chunks.append(chunk)
            except TimeoutError:
                raise errors.DeadlineExceeded("the request's body did not arrive in time") from None
            content = b"".join(chunks)
            chunks.clear()
            yield content
        finally:
            self._num_held_bytes -= size

    def _check(self, size: int, limit: int) -> None:
        if size > limit:
            raise TooLarge(limit)
        if size > SMALL_BODY_BYTES and self._num_held_bytes > self._limits.max_bodies_bytes:
            raise errors.Overloaded("too many large bodies are being read; try again", retry_after_s=1.0)


class Encoded(errors.InvalidRequest):
    http_status = 415

    def __init__(self, encoding: bytes) -> None:
        super().__init__(
            f"the body's Content-Encoding is {quoted(encoding.decode('latin-1'))}, expected none: send it uncompressed"
        )

    @property
    def code(self) -> str:
        return "UnsupportedEncoding"


class TooLarge(errors.InvalidRequest):
    http_status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes, more than the model's context can need")

    @property
    def code(self) -> str:
        return "RequestTooLarge"


def check_structure(content: bytes, limits: LimitsConfig, max_model_tokens: int | None) -> None:
    """Raises InvalidRequest for JSON with more parts than a parser may get. The contents of strings do not count."""
    for_tokens = 2 * (max_model_tokens or 0)
    _check_num("escapes", content.count(b"\\"), max(limits.max_body_escapes, for_tokens))
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    _check_num("texts", plain.count(b'"') // 2, limits.max_body_texts)
    outside = b"".join(plain.split(b'"')[::2])
    _check_num("lists and objects", outside.count(b"[") + outside.count(b"{"), limits.max_body_containers)
    _check_num("values", outside.count(b","), max(limits.max_body_values, for_tokens))


def _check_num(what: str, num: int, limit: int) -> None:
    if num > limit:
        raise errors.InvalidRequest(f"the body's JSON has {num} {what}, expected at most {limit}; send less at once")


def _is_beyond(declared: bytes, limit: int) -> bool:
    # The length is not converted: a number may have any number of digits.
    digits = declared.lstrip(b"0")
    return digits.isdigit() and (len(digits) > 18 or int(digits) > limit)
