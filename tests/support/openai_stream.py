"""An OpenAI server in the test's own loop: streams tokens at a pace, and can fail in the ways that servers do."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class OpenAiStream:
    """``fault`` of all answers: ``503``, ``429``, ``cut`` (the connection ends early), ``few`` (a token less),
    ``event`` (an error in the stream), ``hang``, ``garbage`` (no HTTP), ``text`` (no ids in the events)."""

    prompt_s: float = 0.0
    token_s: float = 0.0
    fault: str = ""
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left.set()
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *rest = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in rest)}
        body = await reader.readexactly(int(headers["content-length"]))
        if line.startswith("GET"):
            models = json.dumps({"data": [{"id": "fake"}]}).encode()
            found = "/models" in line
            writer.write(_whole(200 if found else 404, models if found else b"not here"))
            await writer.drain()
            return
        self.headers.append(headers)
        self.bodies.append(json.loads(body))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await self._generate(self.bodies[-1], reader, writer)
        finally:
            self.num_open -= 1

    async def _generate(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.fault == "garbage":
            writer.write(b"hello\r\n\r\n")
        elif self.fault in ("429", "503"):
            writer.write(_whole(int(self.fault), b'{"error": "busy"}'))
        elif self.fault == "hang":
            await reader.readexactly(1)
        else:
            await self._stream(body, writer)
        await writer.drain()

    async def _stream(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n")
        await asyncio.sleep(self.prompt_s)
        for i in range(body["max_tokens"] - (self.fault == "few")):
            if i:
                await asyncio.sleep(self.token_s)
            if self.fault == "cut" and i == 1:
                return
            ids = {} if self.fault == "text" else {"token_ids": [body["prompt"][0] + i]}
            event: dict[str, Any] = {"choices": [{"text": "x", **ids}]}
            if self.fault == "event" and i == 1:
                event = {"error": {"message": "it went wrong"}}
            # In two pieces: an event may come in parts.
            data = f"data: {json.dumps(event)}\n\n".encode()
            writer.write(_chunk(data[:9]) + _chunk(data[9:]))
            await writer.drain()
        writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _whole(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@contextlib.asynccontextmanager
async def openai_stream(**settings: Any) -> AsyncIterator[OpenAiStream]:
    fake = OpenAiStream(**settings)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()
        await server.wait_closed()
