"""Asks an OpenAI-compatible server over HTTP/1.1 and notes when each token arrives.

Each request has a connection of its own and a small parser: the generator often shares the cores of the server that it
measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools

from baton.errors import BadConfig, quoted
from baton.tls import load_authority
from loadgen.load import Request

_READ_BYTES = 1 << 16
_MAX_ERROR_CHARS = 300
_OK = 200


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is: the address without ``/v1``."""

    host: str
    port: int
    path: str = ""
    is_tls: bool = False
    # With TLS: an authority to believe beside the system's, and the name in the certificate if it is not ``host``.
    tls_ca: Path | None = None
    tls_name: str = ""

    @classmethod
    def parse(cls, url: str, tls_ca: Path | None = None, tls_name: str = "") -> Server:
        """Raises BadConfig."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise BadConfig(f"the URL {quoted(url)} is wrong: {error}", param="url") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadConfig(f"the URL is {quoted(url)}, expected http://HOST:PORT or https://HOST:PORT", param="url")
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        found = cls(parts.hostname, port or (443 if is_tls else 80), path, is_tls, tls_ca, tls_name)
        if is_tls:
            _context(tls_ca)
        return found


@lru_cache(maxsize=16)
def _context(ca: Path | None) -> ssl.SSLContext:
    """Once for all requests: reading the system's authorities takes tens of milliseconds. Raises BadConfig."""
    context = ssl.create_default_context()
    if ca is not None:
        load_authority(context, ca)
    return context


class Reply:
    """A response whose head has arrived. ``status`` is its code."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._has_head = False
        self._has_length = False
        self._is_done = False
        self.status = 0

    # httptools calls these.
    def on_header(self, name: bytes, _value: bytes) -> None:
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        self._is_done = True

    async def head(self) -> None:
        while not self._has_head:
            await self._feed()
        self.status = self._parser.get_status_code()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        while True:
            ready, self._parts = self._parts, []
            if ready:
                yield b"".join(ready)
            elif self._is_done:
                return
            else:
                await self._feed()

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def _feed(self) -> None:
        data = await self._reader.read(_READ_BYTES)
        if data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserError as error:
                raise ConnectionError(f"the answer is no HTTP/1.1: {error}") from error
        elif self._has_head and not self._has_length:
            # Such a body ends with the connection.
            self._is_done = True
        else:
            raise ConnectionError("the server closed the connection before the end of its answer")


@contextlib.asynccontextmanager
async def exchange(
    server: Server, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> AsyncIterator[Reply]:
    """One request on a connection of its own. Raises OSError."""
    trust: dict[str, Any] = {}
    if server.is_tls:
        trust = {"ssl": _context(server.tls_ca), "server_hostname": server.tls_name or server.host}
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=_READ_BYTES, **trust)
    try:
        lines = {
            "Host": f"{server.host}:{server.port}", "Connection": "close", "Content-Type": "application/json",
            "Content-Length": str(len(body)), **(headers or {}),
        }  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"{method} {server.path}{path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        reply = Reply(reader)
        await reply.head()
        yield reply
    finally:
        # Not closed gracefully: nothing is left to send, and an answer that is not read to its end is not wanted.
        writer.transport.abort()


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and what came of it. Times are seconds from the beginning of the run, by the client's clock."""

    number: int
    request: Request
    # When it was to be sent, and when it was sent.
    due_s: float
    sent_s: float
    ended_s: float
    # When each token arrived; tokens of one event arrive together.
    stamps_s: tuple[float, ...] = ()
    # HTTP status; 0: there was none.
    status: int = 0
    # Why it is no whole answer.
    error: str | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def ttft_s(self) -> float:
        """From when it was due: a generator that is late must not make the server look fast."""
        return self.stamps_s[0] - self.due_s

    @property
    def e2e_s(self) -> float:
        return self.stamps_s[-1] - self.due_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        return tuple(b - a for a, b in zip(self.stamps_s, self.stamps_s[1:], strict=False))

    @property
    def tbt_s(self) -> float | None:
        """The mean time between two tokens; None for a single token."""
        count = len(self.stamps_s) - 1
        return (self.stamps_s[-1] - self.stamps_s[0]) / count if count else None


@dataclass(frozen=True, slots=True)
class Asking:
    """What all requests of a run have in common. ``extra``: fields of the body; None takes one out."""

    model: str
    headers: Mapping[str, str]
    extra: Mapping[str, Any]
    # Keep the ids of the tokens, to compare them.
    keeps_ids: bool = False

    def body(self, prompt: Sequence[int], num_tokens: int) -> bytes:
        """A greedy request whose output never ends early, as vLLM and Baton understand it."""
        fields = {
            "model": self.model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "return_token_ids": True, **self.extra,
        }  # fmt: skip
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


class _Tokens:
    """Reads an answer's events; a token is an id, or an event with text where a server sends no ids."""

    def __init__(self) -> None:
        self.stamps_s: list[float] = []
        self.ids: list[int] = []
        self.error: str | None = None
        self._rest = b""

    def take(self, part: bytes, at_s: float) -> None:
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                self._event(json.loads(data), at_s)

    def _event(self, event: Mapping[str, Any], at_s: float) -> None:
        if "error" in event:
            self.error = str(event["error"])[:_MAX_ERROR_CHARS]
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids")
            self.ids += ids or ()
            self.stamps_s += [at_s] * (bool(choice.get("text")) if ids is None else len(ids))


async def ask(
    server: Server, asking: Asking, body: bytes, number: int, request: Request, due_s: float, clock: Callable[[], float]
) -> Answer:
    """One request, streamed. A failure is an answer with an error; only a cancellation is raised."""
    tokens, status, sent_s, error = _Tokens(), 0, clock(), None
    try:
        async with exchange(server, "POST", "/v1/completions", body, asking.headers) as reply:
            status = reply.status
            if status == _OK:
                async for part in reply.parts():
                    tokens.take(part, clock())
            else:
                text = (await reply.body()).decode(errors="replace")
                error = f"HTTP {status}: {text[:_MAX_ERROR_CHARS]}"
    except (OSError, ValueError) as raised:
        error = f"{type(raised).__name__}: {raised}"[:_MAX_ERROR_CHARS]
    error = error or tokens.error
    if error is None and len(tokens.stamps_s) != request.output_tokens:
        error = f"{len(tokens.stamps_s)} tokens, expected {request.output_tokens}"
    ids = tuple(tokens.ids) if asking.keeps_ids else ()
    return Answer(number, request, due_s, sent_s, clock(), tuple(tokens.stamps_s), status, error, ids)


async def get(server: Server, path: str, headers: Mapping[str, str] | None = None) -> bytes:
    """The body of an answer with status 200. Raises OSError."""
    async with exchange(server, "GET", path, headers=headers) as reply:
        body = await reply.body()
        if reply.status != _OK:
            raise ConnectionError(
                f"GET {path}: HTTP {reply.status}: {body[:_MAX_ERROR_CHARS].decode(errors='replace')}"
            )
        return body


async def model_of(server: Server, headers: Mapping[str, str]) -> str:
    """The name of the first model that the server lists. Raises OSError."""
    try:
        return str(json.loads(await get(server, "/v1/models", headers))["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConnectionError(f"GET /v1/models gave no model: {type(error).__name__}: {error}") from error


def seconds_since(began_s: float) -> Callable[[], float]:
    return lambda: time.perf_counter() - began_s
