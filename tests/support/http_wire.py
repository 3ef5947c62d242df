"""HTTP clients that write bytes, and the router that they write to."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from router.config import LimitsConfig
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, baseline, router_beside

QUICK = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)


@asynccontextmanager
async def served(folder: Path, config: FakeConfig = QUICK, **limits: Any) -> AsyncIterator[tuple[Router, FakeCluster]]:
    async with FakeCluster(config, prefill=1, decode=1) as cluster:
        async with router_beside(cluster, model_folder=folder, limits=LimitsConfig(**limits)) as router:
            try:
                yield router, cluster
            finally:
                while Wire.opened:
                    Wire.opened.pop().close()
        await baseline(cluster)


class Wire:
    """A client that writes bytes; `served` closes it."""

    opened: ClassVar[list[Wire]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.opened.append(self)

    @classmethod
    async def open(cls, router: Router, *, buffer_bytes: int | None = None) -> Wire:
        assert router.http is not None
        url = urlsplit(router.http)
        sock = socket.socket()
        if buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (url.hostname, url.port))
        return cls(*await asyncio.open_connection(sock=sock, limit=4096 if buffer_bytes else 2**16))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def rest(self, timeout_s: float = 10.0) -> bytes:
        """All that comes until the end, which may be a reset."""
        got = b""
        async with asyncio.timeout(timeout_s):
            try:
                while chunk := await self.reader.read(65536):
                    got += chunk
            except ConnectionError:
                pass
        return got

    async def answer(self, timeout_s: float = 10.0) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and, as far as Content-Length says, body."""
        async with asyncio.timeout(timeout_s):
            status, headers = parsed(await self.reader.readuntil(b"\r\n\r\n"))
            return status, headers, await self.reader.readexactly(int(headers.get("content-length", "0")))

    def close(self) -> None:
        self.writer.transport.abort()


def parsed(head: bytes) -> tuple[int, dict[str, str]]:
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)}


def get(path: str = "/health", *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *headers, "", ""]).encode()


def post(body: dict[str, Any], *headers: str, version: str = "1.1", path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: a", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


async def asked(router: Router, data: bytes, *, half_close: bool = False) -> bytes:
    """All that the router says to these bytes on a connection of their own."""
    wire = await Wire.open(router)
    wire.send(data)
    if half_close:
        wire.writer.write_eof()
    got = await wire.rest()
    wire.close()
    return got
