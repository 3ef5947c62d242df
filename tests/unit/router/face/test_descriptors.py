"""A router with few files: silent connections neither make it deaf nor fill its log, and its nodes stay."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from baton import descriptors
from tests.support.fake_nodes import FakeCluster, FakeConfig

ROUTER = """
import asyncio, logging, resource, sys
from pathlib import Path
from router.config import RouterConfig
from router.serve import serve
logging.basicConfig(level=logging.INFO)
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 256))
config = RouterConfig(nodes=tuple(sys.argv[2:]), ready_file=Path(sys.argv[1]), ready_needs_nodes=True)
asyncio.run(serve(config))
"""


async def test_silent_connections_do_not_make_a_router_deaf(tmp_path: Path) -> None:
    ready, log = tmp_path / "ready.json", tmp_path / "router.log"
    async with FakeCluster(FakeConfig(), prefill=1, decode=1) as cluster:
        with log.open("w") as output:
            command = [sys.executable, "-c", ROUTER, str(ready), *cluster.addresses]
            process = await asyncio.create_subprocess_exec(*command, stderr=output, env=dict(os.environ))
        silent: list[socket.socket] = []
        try:
            async with asyncio.timeout(60):
                while not ready.exists():  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)
            faces = json.loads(ready.read_text())
            http = urlsplit(faces["http"])
            host, _, grpc_port = faces["grpc"].rpartition(":")
            for _ in range(2):
                for port in (http.port, int(grpc_port)):
                    silent += [await asyncio.to_thread(socket.create_connection, (host, port), 10) for _ in range(200)]
                answer = await asyncio.to_thread(urllib.request.urlopen, faces["http"] + "/ready", timeout=20)
                with answer:
                    assert set(json.loads(answer.read())["nodes"].values()) == {"ready"}
        finally:
            for sock in silent:
                sock.close()
            process.terminate()
            await process.wait()
    said = log.read_text()
    assert "Traceback" not in said
    assert len(said) < 20_000


def test_the_limit_is_raised_and_too_little_is_refused() -> None:
    script = (
        "import resource; from baton import descriptors, errors\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (130, 300)); print(descriptors.raise_limit())\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "try: descriptors.raise_limit()\n"
        "except errors.BadConfig as error: print(error.message)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")
    assert said[0] == "300"
    assert "100 files, expected at least 128" in said[1]


async def test_accept_errors_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """For real: a server in a process that has no descriptor left, and recovers."""
    loop = asyncio.get_running_loop()
    descriptors.say_less_of_accept(loop)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, backlog=16)
    address = server.sockets[0].getsockname()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket()
    client.setblocking(False)
    taken = len(os.listdir("/proc/self/fd"))
    caplog.set_level(logging.INFO)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(taken - 1, client.fileno() + 1), before[1]))
        await loop.sock_connect(client, address)
        await asyncio.sleep(1.5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    async with asyncio.timeout(10):
        assert await loop.sock_recv(client, 10) == b""
    client.close()
    server.close()
    await server.wait_closed()
    loop.set_exception_handler(None)
    told = [r for r in caplog.records if "no connection can be accepted" in r.getMessage()]
    assert len(told) == 1
    assert told[0].exc_info is None
