"""The cluster's key on gRPC ports: which calls pass, what a refused caller and the log learn, where it is hidden."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.access import KEY_HEADER, OPEN, AccessConfig, PeerKey, is_loopback
from baton.errors import BadConfig, BatonError, Unauthenticated
from baton.guard import Guard, Refusals, host_of_peer
from baton.server import GrpcServer
from baton.settings import difference
from baton.types import Role
from kvtransfer.config import TransferConfig
from router.config import RouterConfig
from worker.config import WorkerConfig

KEY = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class ManualClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def now(self) -> float:
        return self.now_s


class Listener:
    """A server with a method of each kind behind the key, and what its guard has counted."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.num_refused = 0
        self.num_served = 0

        def count() -> None:
            self.num_refused += 1

        guard = Guard(PeerKey(KEY).check, Refusals(self.clock, count))
        self.server = GrpcServer(guards=[guard])
        self.address = self.server.bind("127.0.0.1:0")

    def serve(self) -> None:
        def handler(kind: str) -> Any:
            async def one(request: Any, context: Any) -> bytes:
                self.num_served += 1
                return b"answer"

            async def many(request: Any, context: Any) -> AsyncIterator[bytes]:
                self.num_served += 1
                yield b"answer"

            behaviour = many if kind.endswith("stream") else one
            return getattr(grpc, f"{kind}_rpc_method_handler")(behaviour, lambda data: data)

        handlers = grpc.method_handlers_generic_handler("test.Service", {kind: handler(kind) for kind in KINDS})

        def register(servicer: Any, server: aio.Server) -> None:
            server.add_generic_rpc_handlers((handlers,))

        self.server.add(register, None)


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Listener, aio.Channel]]:
    listener = Listener()
    listener.serve()
    await listener.server.start()
    try:
        async with aio.insecure_channel(listener.address) as channel:
            yield listener, channel
    finally:
        await listener.server.stop(0)


async def outcome(channel: aio.Channel, kind: str, metadata: Any) -> tuple[grpc.StatusCode, str]:
    """Nothing is sent by a stream: its caller has to be judged before it says anything."""
    method: Any = getattr(channel, kind)(f"/test.Service/{kind}")
    sent = () if kind.startswith("stream") else (b"",)
    call = method(*sent, metadata=metadata, timeout=5)
    try:
        if kind.endswith("stream"):
            assert [part async for part in call] == [b"answer"]
        else:
            assert await call == b"answer"
    except aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("kind", KINDS)
async def test_only_the_clusters_key_opens_a_method_of_any_kind(kind: str) -> None:
    async with listening() as (listener, channel):
        for metadata in (None, ((KEY_HEADER, OTHER),), ((KEY_HEADER, KEY[:-1]),), ((KEY_HEADER, ""),),
                         (("authorization", f"Bearer {KEY}"),)):  # fmt: skip
            code, details = await outcome(channel, kind, metadata)
            assert code is grpc.StatusCode.UNAUTHENTICATED, metadata
            assert "--cluster-key" in details
            assert KEY not in details
            assert OTHER not in details
        assert (listener.num_served, listener.num_refused) == (0, 5)
        assert (await outcome(channel, kind, AccessConfig(cluster_key=KEY).metadata))[0] is grpc.StatusCode.OK
        assert (listener.num_served, listener.num_refused) == (1, 5)


async def test_health_and_reflection_need_no_key_and_unknown_methods_do_not_exist() -> None:
    async with listening() as (listener, channel):
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        assert [part async for part in reflection(iter([b""]), timeout=5)]
        unknown: Any = channel.unary_unary("/test.Service/Nothing")
        with pytest.raises(aio.AioRpcError) as refused:
            await unknown(b"", timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert listener.num_refused == 0


async def test_a_refused_peer_is_logged_once_a_minute_without_what_it_said(caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "baton.access"]

    caplog.set_level(logging.INFO)
    async with listening() as (listener, channel):
        for _ in range(5):
            await outcome(channel, "unary_unary", ((KEY_HEADER, OTHER),))
        (first,) = lines()
        assert first.startswith("127.0.0.1 was refused /test.Service/unary_unary: ")
        listener.clock.now_s += 61.0
        await outcome(channel, "unary_unary", None)
        assert "4 more like it" in lines()[1]
        assert listener.num_refused == 6
    assert not [x for x in lines() if OTHER in x or KEY in x]


def test_a_key_is_compared_as_a_whole() -> None:
    check = PeerKey(KEY).check
    check("/m", {KEY_HEADER: KEY})
    check("/m", {KEY_HEADER: KEY.encode()})
    for said in (KEY + "0", KEY.upper(), f"{KEY} ", b"\xff" * 32):
        with pytest.raises(Unauthenticated):
            check("/m", {KEY_HEADER: said})


@pytest.mark.parametrize("bad", ["short", "0" * 31, "a b" * 20, "ü" * 40, "0" * 32 + "\n"])
def test_a_bad_key_stops_the_start_and_is_not_shown(bad: str) -> None:
    with pytest.raises(BadConfig, match=r"^cluster_key is '\(hidden\)', expected at least 32") as refused:
        AccessConfig(cluster_key=bad)
    assert bad not in refused.value.message


@pytest.mark.parametrize("given", ["tls_cert", "tls_key"])
def test_a_certificate_needs_its_key(given: str) -> None:
    files: dict[str, Any] = {given: Path("a.pem")}
    with pytest.raises(BadConfig, match="expected --tls-cert and --tls-key together"):
        AccessConfig(**files)


def test_the_key_is_in_no_dump_of_settings() -> None:
    access = AccessConfig(cluster_key=KEY, tls_cert=Path("/c.pem"), tls_key=Path("/k.pem"), tls_ca=Path("/ca.pem"))
    configs = (
        WorkerConfig(model=Path("m"), role=Role.MIXED, access=access),
        RouterConfig(nodes=("h:1",), access=access),
        TransferConfig(access=access),
    )
    for config in configs:
        assert KEY not in repr(config)
        assert KEY not in json.dumps(difference(config))
    assert difference(configs[0])["access"] == {"tls_cert": "/c.pem", "tls_key": "/k.pem", "tls_ca": "/ca.pem"}
    assert KEY not in repr(replace(access, tls_name="x"))


def test_what_proves_something() -> None:
    assert OPEN.is_open
    assert OPEN.metadata == ()
    assert not AccessConfig(cluster_key=KEY).is_open
    assert AccessConfig(cluster_key=KEY).metadata == ((KEY_HEADER, KEY),)
    with_tls = AccessConfig(tls_cert=Path("c"), tls_key=Path("k"), tls_ca=Path("a"))
    assert not with_tls.is_open
    assert AccessConfig(tls_cert=Path("c"), tls_key=Path("k")).is_open, "that is for clients alone"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False), ("[::]", False), ("", False), ("*", False),
        ("10.0.0.1", False), ("fe80::1%eth0", False), ("node-a.example", False), ("127.0.0.1.example", False),
    ],
)  # fmt: skip
def test_which_addresses_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:127.0.0.1:50000", "127.0.0.1"), ("ipv6:%5B::1%5D:50000", "::1"), ("ipv6:[fd00::2]:1", "fd00::2"), ("", "")],
)
def test_a_peers_host(peer: str, host: str) -> None:
    assert host_of_peer(peer) == host


def test_many_peers_fill_no_memory() -> None:
    refusals = Refusals(ManualClock(), lambda: None, logging.DEBUG)
    for number in range(10_000):
        refusals.refused(f"10.0.{number >> 8}.{number & 255}", "/m", BatonError("no"))
    assert len(refusals._limit._kinds) <= 256
