"""Rogue peers: processes without the cluster's key, or with a wrong one, on every port of a worker.

docs/operating.md, "Access". What a peer without a key could do before: read ledgers, reserve every block, map the
whole cache for writing, drain.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

import baton
from baton import PROTOCOL_VERSION, codec
from baton.access import KEY_HEADER, AccessConfig
from baton.types import Role, SamplingParams, SequenceSpec
from baton.v1 import node_pb2, node_pb2_grpc, transfer_pb2
from engine.fake import expected_tokens
from kvtransfer.transports.local_plane import TOKEN_BYTES
from kvtransfer.transports.tcp_socket import MAGIC, PREAMBLE
from router.cluster.membership import State
from router.config import RouterConfig
from router.serve import running
from tests.support.relay import LAYOUT, worker
from tests.support.router import until

KEY = "0123456789abcdef0123456789abcdef"
WRONG: Any = [None, ((KEY_HEADER, "f" * 32),), ((KEY_HEADER, KEY[:-1]),), (("authorization", f"Bearer {KEY}"),)]
SETTINGS: dict[str, Any] = {"access": AccessConfig(cluster_key=KEY)}


def methods() -> list[tuple[str, str]]:
    """Of every service of a worker, with their kind. Sessions of protocol 1 have services of their own."""
    found = []
    for service in (
        node_pb2.DESCRIPTOR.services_by_name["Node"],
        transfer_pb2.DESCRIPTOR.services_by_name["KvTransfer"],
    ):
        for method in service.methods:
            kind = (
                f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
            )
            found.append((f"/{service.full_name}/{method.name}", kind))
    assert {name.rpartition("/")[2] for name, _ in found} >= {
        "Describe", "Drain", "SetRole", "Ledger", "Cache", "Clock", "Trace", "Session", "Channel",
    }  # fmt: skip
    return [
        *found,
        ("/baton.v1.PrefillNode/Session", "stream_stream"),
        ("/baton.v1.DecodeNode/Session", "stream_stream"),
    ]


async def code_of(channel: aio.Channel, path: str, kind: str, metadata: Any) -> tuple[grpc.StatusCode, str]:
    method: Any = getattr(channel, kind)(path)
    call = method(*(() if kind.startswith("stream") else (b"",)), metadata=metadata, timeout=5)
    return await call.code(), await call.details()


@pytest.mark.parametrize("metadata", WRONG, ids=["none", "wrong", "short", "elsewhere"])
async def test_no_method_of_a_worker_answers_without_the_key(
    tmp_path: Path, metadata: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with worker(tmp_path, "d0", **SETTINGS) as node, aio.insecure_channel(node.address) as channel:
        for path, kind in methods():
            code, details = await code_of(channel, path, kind, metadata)
            assert code is grpc.StatusCode.UNAUTHENTICATED, path
            assert KEY not in details
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING, "probes have no key, and nothing is draining"
        stub = node_pb2_grpc.NodeStub(channel)
        ledger = await stub.Ledger(node_pb2.LedgerRequest(), timeout=5, metadata=SETTINGS["access"].metadata)
        assert ledger.free_blocks == ledger.total_blocks == LAYOUT.num_blocks
    told = [r.getMessage() for r in caplog.records if r.name == "baton.access"]
    assert len(told) == 1, "one line a peer and minute"
    assert "127.0.0.1 was refused /baton.v1.Node/" in told[0]


def listening_ports() -> set[int]:
    found = psutil.Process(os.getpid()).net_connections("tcp")
    return {connection.laddr.port for connection in found if connection.status == "LISTEN"}


def cache_sockets() -> set[str]:
    """Names of the abstract sockets over which this process hands out its cache."""
    text = Path("/proc/net/unix").read_text()
    mine = f"@baton-kv-{os.getpid()}-"
    return {word for line in text.splitlines() for word in line.split()[-1:] if word.startswith(mine)}


async def test_no_other_port_gives_the_cache_away(tmp_path: Path) -> None:
    """Whoever finds the data port and the unix socket still has no token, which only the control channel gives."""
    before = listening_ports()
    async with worker(tmp_path, "d0", Role.DECODE, transports=("shm", "tcp"), **SETTINGS) as node:
        own = {int(node.address.rpartition(":")[2])}
        (name,) = cache_sockets()
        for token in (b"\0" * TOKEN_BYTES, os.urandom(TOKEN_BYTES), b""):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as rogue:
                rogue.settimeout(10)
                rogue.connect("\0" + name.removeprefix("@"))
                await asyncio.to_thread(rogue.sendall, token)
                rogue.shutdown(socket.SHUT_WR)
                said, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, rogue, 1, 4)
                assert (said, descriptors) == (b"", [])
        for port in listening_ports() - before - own:
            for first in (
                PREAMBLE.pack(MAGIC, os.urandom(32), 0),
                b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".ljust(PREAMBLE.size),
            ):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as rogue:
                    rogue.sendall(first)
                    rogue.shutdown(socket.SHUT_WR)
                    answer = await asyncio.to_thread(_all_of, rogue)
                    # The metrics port speaks HTTP; the data port says nothing at all to who has no token.
                    assert not answer or answer.startswith(b"HTTP/1."), port


def _all_of(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(65_536):
            found += part
    except ConnectionResetError:
        pass
    return found


async def test_with_the_same_key_everything_works_and_with_another_nothing_joins(tmp_path: Path) -> None:
    both = {"transports": ("tcp",), **SETTINGS}
    async with (
        worker(tmp_path, "p0", Role.PREFILL, **both) as prefill,
        worker(tmp_path, "d0", Role.DECODE, **both) as decode,
    ):
        nodes = (prefill.address, decode.address)
        async with running(RouterConfig(nodes=nodes, **SETTINGS)) as router:
            await until(lambda: all(x.state is State.READY for x in router.dispatcher.nodes.members))
            async with baton.AsyncClient(router.grpc or "") as client:
                done = await client.complete([1, 2, 3], max_tokens=8, temperature=0.0, seed=0)
                assert len((await client.ledger()).nodes) == 2
                assert len(await client.trace()) == 3
            sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=8)
            assert list(done.token_ids) == expected_tokens(SequenceSpec("a", (1, 2, 3), sampling), LAYOUT, 1000)
            assert (done.relay.prefill_node_id, done.relay.decode_node_id) == ("p0", "d0")
        for access in (AccessConfig(), AccessConfig(cluster_key="f" * 32)):
            async with running(RouterConfig(nodes=nodes, access=access)) as router:
                members = router.dispatcher.nodes.members
                await until(lambda: all("UNAUTHENTICATED" in x.reason for x in members))  # noqa: B023
                assert all("--cluster-key" in x.reason and KEY not in x.reason for x in members)
                assert not router.dispatcher.is_ready


async def test_nodes_with_different_keys_exchange_nothing(tmp_path: Path) -> None:
    """A prefill node of another cluster is refused by the decode node, however valid its lease is."""
    other = AccessConfig(cluster_key="e" * 32)
    async with (
        worker(tmp_path, "p0", Role.PREFILL, access=other) as prefill,
        worker(tmp_path, "d0", Role.DECODE, **SETTINGS) as decode,
        aio.insecure_channel(prefill.address) as to_prefill,
        aio.insecure_channel(decode.address) as to_decode,
    ):
        p = await _session(to_prefill, other)
        d = await _session(to_decode, SETTINGS["access"])
        sequence = codec.sequence_to_pb(_spec())
        reserve = node_pb2.SessionRequest.Reserve(sequence=sequence, ttl_s=20, prefill_node_id="p0")
        await d.write(node_pb2.SessionRequest(reserve=reserve))
        lease = (await _until(d, "reserved"))[0]
        await p.write(node_pb2.SessionRequest(run=node_pb2.SessionRequest.Run(sequence=sequence, lease=lease)))
        failed = (await _until(p, "failed"))[0]
        assert failed.failure.code == "Incompatible"
        assert "cluster key" in failed.failure.message
        for call in (p, d):
            call.cancel()


def _spec() -> SequenceSpec:
    return SequenceSpec("a/0/1", tuple(range(1, 40)), SamplingParams(temperature=0.0, seed=0, max_tokens=8))


async def _session(channel: aio.Channel, access: AccessConfig) -> Any:
    call = node_pb2_grpc.NodeStub(channel).Session(metadata=access.metadata)
    hello = node_pb2.SessionHello(router_id="r", router_incarnation=1, protocol_version=PROTOCOL_VERSION)
    await call.write(node_pb2.SessionRequest(hello=hello))
    return call


async def _until(call: Any, field: str) -> Any:
    async with asyncio.timeout(10):
        while True:
            if found := getattr(await call.read(), field):
                return found
