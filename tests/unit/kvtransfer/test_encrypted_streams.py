"""tcp streams with TLS: the same bytes arrive, none is readable on the way, and strangers get no stream."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from baton.access import OPEN, AccessConfig
from baton.errors import BatonError, NodeLost, TransferFailed
from baton.tls import ListenerFiles, dialling_context
from baton.types import KvLayout
from kvtransfer.config import TransferConfig
from kvtransfer.protocol.receiver_events import Arrived, Released
from kvtransfer.transports import tcp_socket as tcp
from kvtransfer.transports.interface import PlaneEvents, PlaneSite
from kvtransfer.transports.tcp_receiver import TcpPlane
from kvtransfer.transports.tcp_tls import secured
from tests.support.certificates import make_certificates
from tests.support.transfer import LAYOUT, Pair, host_memory, pair, token, until

# One (layer, block) is larger than a record of TLS, and no multiple of one.
LARGE = KvLayout(num_layers=2, num_blocks=8, num_kv_heads=3, head_dim=40, block_tokens=24, dtype="float32")


@pytest.fixture
def access(tmp_path: Path) -> AccessConfig:
    return make_certificates(tmp_path / "pki")


def over_tcp(access: AccessConfig) -> TransferConfig:
    return TransferConfig(transports=("tcp",), access=access)


async def moved(p: Pair, layout: KvLayout, source: list[int], target: tuple[int, ...]) -> None:
    lease = p.receiver.grant("r/0/0", target, ttl_s=30)
    push = p.sender.begin(lease, source, num_known_tokens=None)
    for layer in range(layout.num_layers):
        push.layer_ready(layer, len(source))
    report = await push.commit(token("r/0/0"))
    assert (report.transport, report.num_blocks, report.retransmits) == ("tcp", len(source), 0)
    await p.inbox.wait(Arrived, "r/0/0")


@pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("num_streams", [1, 3])
async def test_bytes_arrive_as_without(access: AccessConfig, layout: KvLayout, num_streams: int) -> None:
    config = replace(over_tcp(access), tcp_streams=num_streams)
    async with pair(sender_config=config, receiver_config=config, source_layout=layout) as p:
        target = replace(layout, num_blocks=layout.num_blocks + 11)
        await moved(p, layout, [5, 6, 7, 1], (11, 10, 12, 3))
        p.check_copied(layout, [5, 6, 7, 1], target, (11, 10, 12, 3))


async def test_bytes_on_a_device_arrive_too(access: AccessConfig) -> None:
    config = over_tcp(access)
    async with pair(sender_config=config, receiver_config=config, source_on_device=True, target_on_device=True) as p:
        await moved(p, LAYOUT, [5, 6], (11, 10))
        assert np.array_equal(
            p.source[LAYOUT.offset(0, 5) : LAYOUT.offset(0, 6)],
            p.target[(o := replace(LAYOUT, num_blocks=51).offset(0, 11)) : o + LAYOUT.block_bytes],
        )


async def test_a_sender_of_another_authority_moves_nothing(access: AccessConfig, tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "others")
    for config in (over_tcp(other), over_tcp(OPEN), over_tcp(replace(other, tls_ca=access.tls_ca))):
        config = replace(config, connect_timeout_s=0.4)
        async with pair(sender_config=config, receiver_config=over_tcp(access)) as p:
            lease = p.receiver.grant("r/0/0", [1, 2], ttl_s=0.6)
            push = p.sender.begin(lease, [3, 4], num_known_tokens=None)
            for layer in range(LAYOUT.num_layers):
                push.layer_ready(layer, 2)
            with pytest.raises((NodeLost, TransferFailed)):
                await push.commit(token("r/0/0"))
            await p.inbox.wait(Released, "r/0/0")
            assert (p.target == 0xEE).all()


TOKEN = b"t" * 32


class Plane:
    """A receiving end alone, to which a test connects as it likes."""

    def __init__(self, access: AccessConfig) -> None:
        self.memory = np.zeros(LAYOUT.total_bytes, dtype=np.uint8)
        self.gone: list[int] = []
        events = PlaneEvents(
            writer_gone=self.gone.append, wrote=lambda *_: None, quiet=lambda _: None, data_came=lambda *_: None,
            strayed=lambda *_: None, landed=None,
        )  # fmt: skip
        self.plane = TcpPlane(PlaneSite(host_memory(self.memory), LAYOUT, "127.0.0.1", "", events, access))

    async def connect(self, context: ssl.SSLContext | None) -> socket.socket:
        host, port = self.plane.endpoint.split(":")
        stream = await asyncio.to_thread(socket.create_connection, (host, int(port)), 5)
        if context is None:
            return stream
        return await asyncio.to_thread(context.wrap_socket, stream, server_hostname="127.0.0.1")


async def ended(stream: socket.socket) -> bool:
    """Whether it is closed without having been let in; an alert of TLS may come before."""

    def rest() -> bytes:
        found = b""
        try:
            while part := stream.recv(1024):
                found += part
        except OSError:
            pass
        return found

    return not (await asyncio.to_thread(rest)).startswith(tcp.READY)


async def test_only_a_certificate_and_the_token_open_a_stream(access: AccessConfig, tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "others")
    p = Plane(access)
    await p.plane.start()
    try:
        p.plane.offer(1, TOKEN)
        preamble = tcp.PREAMBLE.pack(tcp.MAGIC, TOKEN, 0)
        with await p.connect(None) as plain:
            plain.sendall(preamble)
            assert await ended(plain), "the right token, and no TLS"
        stranger = dialling_context(replace(other, tls_ca=access.tls_ca))
        bare = dialling_context(AccessConfig(tls_ca=access.tls_ca))
        for context in (stranger, bare):
            with await p.connect(context) as stream:
                try:
                    await asyncio.to_thread(stream.sendall, preamble)
                except OSError:
                    continue
                assert await ended(stream)
        ours = dialling_context(access)
        with await p.connect(ours) as stream:
            await asyncio.to_thread(stream.sendall, tcp.PREAMBLE.pack(tcp.MAGIC, b"u" * 32, 0))
            assert await ended(stream), "a peer without a token"
        with await p.connect(ours) as stream:
            await asyncio.to_thread(stream.sendall, preamble)
            assert await asyncio.to_thread(stream.recv, 1) == tcp.READY
            p.plane.open_epoch(1, 9, (5, 2))
            block = bytes(range(256)) * (LAYOUT.block_bytes // 256)
            await asyncio.to_thread(tcp.send_all, stream, [
                memoryview(tcp.FRAME.pack(9, 1, 1, 1, 1, len(block))), memoryview(block)])  # fmt: skip
            offset = LAYOUT.offset(1, 2)
            await until(lambda: bytes(p.memory[offset : offset + len(block)]) == block)
            assert not p.gone
        await until(lambda: p.gone == [1])
    finally:
        await p.plane.close()


async def test_a_handshake_that_is_not_finished_ends(access: AccessConfig) -> None:
    p = Plane(access)
    await p.plane.start()
    with await p.connect(None) as silent:
        await asyncio.sleep(0.05)
        await asyncio.wait_for(p.plane.close(), 5.0)
        assert await ended(silent)


async def pipe(access: AccessConfig) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """Both ends of one stream, blocking."""
    assert access.tls_cert is not None
    assert access.tls_key is not None
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    files, context = ListenerFiles(access.tls_cert, access.tls_key, access.tls_ca), dialling_context(access)
    assert context is not None
    sending, receiving = await asyncio.gather(
        secured(a, context, name="127.0.0.1"), secured(b, files.context(), is_server=True)
    )
    for end in (sending, receiving):
        end.setblocking(True)
    return sending, receiving


@pytest.mark.parametrize("sizes", [(1,), (36, 100), (20, 16384), (16383, 16384, 16385), (5, 70_000, 3, 3, 40_000), ()])
async def test_views_of_any_size_are_sent_and_filled(access: AccessConfig, sizes: tuple[int, ...]) -> None:
    sending, receiving = await pipe(access)
    with sending, receiving:
        rng = np.random.default_rng(0)
        views = [memoryview(rng.integers(0, 256, size, dtype=np.uint8).tobytes()) for size in sizes]
        # Cut elsewhere on the other side.
        buffer = bytearray(sum(sizes))
        cut = len(buffer) // 3
        parts = [memoryview(buffer)[:cut], memoryview(buffer)[cut:]]
        filling = asyncio.create_task(asyncio.to_thread(tcp.receive_all, receiving, parts))
        await asyncio.to_thread(tcp.send_all, sending, views)
        assert await asyncio.wait_for(filling, 10)
        assert bytes(buffer) == b"".join(views)
        assert not tcp.has_ended(receiving), "no ticket, nothing that looks like an end"
        assert not tcp.has_ended(sending)


@pytest.mark.parametrize("side", ["sending", "receiving"])
async def test_a_stream_that_is_broken_off_wakes_its_thread_and_passes_nothing_in_the_clear(
    access: AccessConfig, side: str
) -> None:
    sending, receiving = await pipe(access)
    with sending, receiving:
        buffer = bytearray(1 << 20)
        work: Callable[[], object] = (
            (lambda: tcp.send_all(sending, [memoryview(bytes(32 << 20))]))
            if side == "sending"
            else (lambda: tcp.receive_all(receiving, [memoryview(buffer)]))
        )
        blocked = asyncio.create_task(asyncio.to_thread(work))
        await asyncio.sleep(0.1)
        assert not blocked.done()
        tcp.break_off(sending if side == "sending" else receiving)
        if side == "sending":
            with pytest.raises(OSError, match=r"EPIPE|[Bb]roken pipe|EOF"):
                await asyncio.wait_for(blocked, 5)
        else:
            assert await asyncio.wait_for(blocked, 5) is False
        assert not any(buffer), "what came was no record"


async def test_an_end_is_seen_on_a_stream_that_says_nothing(access: AccessConfig) -> None:
    sending, receiving = await pipe(access)
    with sending:
        assert not tcp.has_ended(sending)
        receiving.close()
        await until(lambda: tcp.has_ended(sending))


async def test_what_is_missing_is_named(access: AccessConfig) -> None:
    assert access.tls_ca is not None
    access.tls_ca.unlink()
    with pytest.raises(BatonError, match=r"ca\.pem"):
        Plane(access)
