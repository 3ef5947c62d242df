"""TLS on gRPC ports: which peers get in, which servers are believed, certificates that are replaced while it runs."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.access import OPEN, AccessConfig
from baton.channels import dial, dial_blocking, face_credentials, peer_credentials
from baton.errors import BadConfig
from baton.server import GrpcServer
from baton.tls import ListenerFiles, dialling_context, peer_files
from tests.support.certificates import make_certificates

# A connection of its own for each channel.
ALONE = (("grpc.use_local_subchannel_pool", 1),)


@asynccontextmanager
async def listening(credentials: grpc.ServerCredentials | None) -> AsyncIterator[str]:
    server = GrpcServer(credentials=credentials)
    address = server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


async def gets_in(address: str, access: AccessConfig, timeout_s: float = 20.0) -> bool:
    async with dial(address, access, ALONE) as channel:
        try:
            call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
            return (await call).status == health_pb2.HealthCheckResponse.SERVING
        except aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            return False


async def test_peers_need_a_certificate_of_the_authority(tmp_path: Path) -> None:
    ours, others = make_certificates(tmp_path / "ours"), make_certificates(tmp_path / "others")
    async with listening(peer_credentials(ours)) as address:
        assert await gets_in(address, ours)
        assert await gets_in(address, make_certificates(tmp_path / "ours", "another.example")), (
            "any name of the authority"
        )
        assert not await gets_in(address, OPEN), "plain"
        assert not await gets_in(address, AccessConfig(tls_ca=ours.tls_ca)), "without a certificate"
        forged = replace(others, tls_ca=ours.tls_ca)
        assert not await gets_in(address, forged), "a certificate of another authority"
        assert not await gets_in(address, replace(ours, tls_ca=others.tls_ca)), "a server of another authority"


async def test_a_server_is_believed_by_its_name(tmp_path: Path) -> None:
    named = make_certificates(tmp_path, "node-a.example")
    async with listening(peer_credentials(named)) as address:
        assert not await gets_in(address, named), "it was dialled by its address"
        assert await gets_in(address, replace(named, tls_name="node-a.example"))
        assert not await gets_in(address, replace(named, tls_name="node-b.example"))


async def test_clients_of_a_router_need_no_certificate(tmp_path: Path) -> None:
    ours = make_certificates(tmp_path)
    async with listening(face_credentials(ours)) as address:
        assert await gets_in(address, AccessConfig(tls_ca=ours.tls_ca))
        assert await gets_in(address, ours)
        assert not await gets_in(address, OPEN)
        with dial_blocking(address, AccessConfig(tls_ca=ours.tls_ca)) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await asyncio.to_thread(stub.Check, health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    async with listening(face_credentials(AccessConfig(tls_cert=ours.tls_cert, tls_key=ours.tls_key))) as address:
        assert await gets_in(address, AccessConfig(tls_ca=ours.tls_ca)), "without an authority for peers"


def shown(address: str) -> str:
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=5)


async def test_a_certificate_that_is_replaced_is_shown_from_the_next_connection_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ours = make_certificates(tmp_path)
    assert ours.tls_cert is not None
    async with listening(face_credentials(ours)) as address, dial(address, AccessConfig(tls_ca=ours.tls_ca)) as channel:
        check: Any = health_pb2_grpc.HealthStub(channel).Check
        assert await check(health_pb2.HealthCheckRequest(), timeout=5)
        first = await asyncio.to_thread(shown, address)
        assert await asyncio.to_thread(shown, address) == first
        make_certificates(tmp_path)
        second = await asyncio.to_thread(shown, address)
        assert second != first
        ours.tls_cert.write_text("half of a certif")
        assert await asyncio.to_thread(shown, address) == second, "what cannot be used does not end the old one"
        assert "stays in use" in caplog.text
        make_certificates(tmp_path)
        assert await asyncio.to_thread(shown, address) not in (first, second)
        assert await check(health_pb2.HealthCheckRequest(), timeout=5), "connections that are open go on"


async def test_another_authority_is_taken_up_without_a_restart(tmp_path: Path) -> None:
    """As operators change one: the file names both, then every process gets a new certificate."""
    ours, next_ones = make_certificates(tmp_path / "ours"), make_certificates(tmp_path / "next")
    assert ours.tls_ca is not None
    assert next_ones.tls_ca is not None
    async with listening(peer_credentials(ours)) as address:
        newcomer = replace(next_ones, tls_ca=ours.tls_ca)
        assert not await gets_in(address, newcomer)
        both = ours.tls_ca.read_bytes() + next_ones.tls_ca.read_bytes()
        draft = tmp_path / "draft"
        draft.write_bytes(both)
        os.replace(draft, ours.tls_ca)
        assert await gets_in(address, newcomer)
        assert await gets_in(address, ours)


@pytest.mark.parametrize("what", ["missing", "no PEM", "another's key", "no authority"])
def test_files_that_cannot_be_used_stop_the_start_with_their_names(tmp_path: Path, what: str) -> None:
    ours = make_certificates(tmp_path)
    other = make_certificates(tmp_path, "other.example")
    assert ours.tls_cert is not None
    assert ours.tls_ca is not None
    if what == "missing":
        ours.tls_cert.unlink()
    elif what == "no PEM":
        ours.tls_cert.write_text("hello")
    elif what == "another's key":
        ours = replace(ours, tls_key=other.tls_key)
    else:
        ours.tls_ca.write_text("hello")
    with pytest.raises(BadConfig, match=str(tmp_path)):
        peer_files(ours)
    with pytest.raises(BadConfig, match=str(tmp_path)):
        dialling_context(ours)


def test_a_file_that_is_missing_is_said_once_and_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = make_certificates(tmp_path)
    assert ours.tls_cert is not None
    files = peer_files(ours)
    assert files is not None
    content = ours.tls_cert.read_bytes()
    ours.tls_cert.unlink()
    assert [files.newer() for _ in range(10)] == [None] * 10
    assert caplog.text.count("stays in use") == 1
    ours.tls_cert.write_bytes(content)
    assert files.newer() == files.first
    assert files.newer() is None


def test_a_key_is_not_in_what_is_printed(tmp_path: Path) -> None:
    ours = make_certificates(tmp_path)
    assert ours.tls_cert is not None
    assert ours.tls_key is not None
    files = ListenerFiles(ours.tls_cert, ours.tls_key, None)
    assert "PRIVATE" not in repr(files.first)
    assert ours.tls_key.stat().st_mode & 0o777 == 0o600
