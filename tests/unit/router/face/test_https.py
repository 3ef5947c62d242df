"""The router's faces over TLS: clients as they are, certificates that change, and peers that begin a handshake only."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

import baton
from baton import errors
from baton.access import AccessConfig
from router.face.http_server import _MAX_HANDSHAKES
from router.serve import Router
from tests.support.certificates import make_certificates
from tests.support.fake_nodes import FakeCluster
from tests.support.router import router_beside, until

BODY: dict[str, Any] = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 4}


@pytest.fixture
def access(tmp_path: Path) -> AccessConfig:
    return make_certificates(tmp_path / "pki")


def trusting(access: AccessConfig) -> ssl.SSLContext:
    """As clients have it: strict, where Python is."""
    return ssl.create_default_context(cafile=str(access.tls_ca))


@asynccontextmanager
async def serving(access: AccessConfig, **settings: Any) -> AsyncIterator[tuple[Router, httpx.AsyncClient]]:
    # Its nodes have no TLS here: the certificate is for clients alone.
    faces = AccessConfig(tls_cert=access.tls_cert, tls_key=access.tls_key)
    async with (
        FakeCluster(mixed=1) as cluster,
        router_beside(cluster, access=faces, **settings) as router,
        httpx.AsyncClient(base_url=router.http or "", verify=trusting(access)) as client,
    ):
        assert (router.http or "").startswith("https://127.0.0.1:")
        yield router, client


async def test_clients_use_both_faces(access: AccessConfig) -> None:
    async with serving(access) as (router, client):
        assert (await client.get("/health")).json() == {"status": "ok"}
        whole = (await client.post("/v1/completions", json=BODY)).json()
        assert whole["usage"]["completion_tokens"] == 4
        async with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        http = httpx.AsyncClient(verify=trusting(access))
        async with openai.AsyncOpenAI(base_url=f"{router.http}/v1", api_key="none", http_client=http) as sdk:
            assert [m.id async for m in sdk.models.list()] == ["fake"]
        async with baton.AsyncClient(router.grpc or "", tls_ca=access.tls_ca) as typed:
            assert len((await typed.complete([1, 2, 3], max_tokens=2)).token_ids) == 2
        async with baton.AsyncClient(router.grpc or "") as plain:
            with pytest.raises(errors.Unavailable):
                await plain.status(timeout_s=2.0)
        with pytest.raises(errors.BadConfig, match="missing"):
            baton.AsyncClient(router.grpc or "", tls_ca="/missing")


async def test_a_client_that_leaves_and_one_whose_head_is_too_large(access: AccessConfig) -> None:
    async with serving(access) as (router, client):
        answer = await client.get("/health", headers={"x-large": "x" * 100_000})
        assert answer.status_code == 431
        async with client.stream("POST", "/v1/completions", json={**BODY, "stream": True, "max_tokens": 64}) as answer:
            assert answer.status_code == 200
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
        assert (await client.get("/health")).status_code == 200


async def test_a_large_body_and_many_requests_on_one_connection(access: AccessConfig) -> None:
    async with serving(access) as (_, client):
        large = {**BODY, "prompt": [1] * 3000, "user": "x" * 200_000}
        assert (await client.post("/v1/completions", json=large)).status_code in (200, 400)
        for _ in range(20):
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        answers = await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}


async def connected(router: Router) -> socket.socket:
    url = urlsplit(router.http or "")
    found = socket.socket()
    found.setblocking(False)
    await asyncio.get_running_loop().sock_connect(found, (url.hostname, url.port))
    return found


async def test_a_thousand_connections_at_once_hold_up_nothing(access: AccessConfig) -> None:
    def handshakes() -> int:
        return sum(task.get_name() == "handshake" for task in asyncio.all_tasks())

    async with serving(access) as (router, client):
        url = urlsplit(router.http or "")
        # Without a turn of the loop in between: all of them wait when the listener is next asked.
        waiting = [socket.create_connection((url.hostname, url.port), 10) for _ in range(1000)]
        counts = [handshakes()]
        async with asyncio.timeout(60):
            while counts[-1] < _MAX_HANDSHAKES:
                await asyncio.sleep(0)
                counts.append(handshakes())
            assert max(b - a for a, b in itertools.pairwise(counts)) <= 1, "a turn of the loop accepts one"
            for _ in range(1000):
                await asyncio.sleep(0)
                # One more has been told to end.
                assert handshakes() <= _MAX_HANDSHAKES + 1
            assert (await client.get("/health")).status_code == 200
        for each in waiting:
            each.close()


async def test_silent_and_plain_connections_keep_no_client_out(
    access: AccessConfig, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    async with serving(access) as (router, client):
        silent = [await connected(router) for _ in range(300)]
        for plain in silent[:100]:
            await loop.sock_sendall(plain, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        async with asyncio.timeout(10):
            assert (await client.get("/health")).status_code == 200
            # The oldest made room, and those that spoke another protocol were refused.
            answer = b""
            with contextlib.suppress(ConnectionError):
                answer = await loop.sock_recv(silent[0], 100)
        assert not answer.startswith(b"HTTP")
        for each in silent:
            each.close()
        assert (await client.get("/health")).status_code == 200
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


async def test_a_certificate_that_is_replaced_is_shown_to_new_connections(access: AccessConfig, tmp_path: Path) -> None:
    async with serving(access) as (router, client):
        url = urlsplit(router.http or "")

        async def shown() -> str:
            where = (url.hostname or "", url.port or 0)
            return await asyncio.to_thread(ssl.get_server_certificate, where, timeout=5)

        first = await shown()
        async with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
            make_certificates(tmp_path / "pki")
            assert await shown() != first
            assert "[DONE]" in (await answer.aread()).decode(), "a stream goes on over its connection"


async def test_keys_and_tls_go_together(access: AccessConfig) -> None:
    async with serving(access, api_keys=("client",), admin_key="operators") as (router, client):
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/v1/models", headers={"authorization": "Bearer client"})).status_code == 200
        assert json.loads((await client.get("/status/data", headers={"authorization": "Bearer operators"})).content)
        async with baton.AsyncClient(router.grpc or "", api_key="client", tls_ca=access.tls_ca) as typed:
            with pytest.raises(errors.Forbidden):
                await typed.ledger()
