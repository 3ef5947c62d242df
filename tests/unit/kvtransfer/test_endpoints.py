"""Sender and receiver over real sockets: bytes arrive, failures are told, nothing is left behind."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from baton import PROTOCOL_VERSION, codec
from baton.errors import (
    BadConfig,
    Cancelled,
    Incompatible,
    InternalError,
    InvalidRequest,
    NoBlocks,
    NodeLost,
    TransferFailed,
    Unavailable,
)
from baton.v1 import transfer_pb2, transfer_pb2_grpc
from kvtransfer.config import TransferConfig
from kvtransfer.digest import DIGEST_NAME
from kvtransfer.encoding import IDENTITY, Encoding, choose_encoding
from kvtransfer.protocol.lease import LeaseState
from kvtransfer.protocol.receiver import ReceiverConfig
from kvtransfer.protocol.receiver_events import Arrived, Quarantined, Released
from kvtransfer.protocol.sender import SenderConfig
from kvtransfer.sender import Push
from tests.support.transfer import LAYOUT, Valve, begun, describe, pair, token, until

TRANSPORTS = ["shm", "tcp", "cuda_ipc"]


def only(transport: str, **changes: object) -> TransferConfig:
    return TransferConfig(transports=(transport,), **changes)


def ready(push: Push, num_blocks: int) -> None:
    for layer in range(LAYOUT.num_layers):
        push.layer_ready(layer, num_blocks)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> object:
    before = set(threading.enumerate())
    yield
    left = {t for t in threading.enumerate() if t.is_alive()} - before
    assert not {t.name for t in left if t.name.startswith("baton")}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layerwise_from_bytes", [0, 1 << 40])
async def test_bytes_arrive_in_the_leased_blocks_and_nowhere_else(transport: str, layerwise_from_bytes: int) -> None:
    config = only(transport, layerwise_from_bytes={transport: layerwise_from_bytes})
    async with pair(sender_config=config, receiver_config=config) as p:
        source_blocks = [5, 6, 7, 1, 30]
        lease = p.receiver.grant("r/0/0", [11, 10, 12, 13, 50, 3], ttl_s=30)
        push = p.sender.begin(lease, source_blocks, num_known_tokens=4 * LAYOUT.block_tokens + 1)
        for num_blocks in (2, 5):
            for layer in range(LAYOUT.num_layers):
                await asyncio.to_thread(push.layer_ready, layer, num_blocks)
        report = await push.commit(token("r/0/0"))
        assert push.layerwise == (layerwise_from_bytes == 0)
        assert (report.transport, report.num_blocks, report.retransmits) == (transport, 5, 0)
        assert report.num_bytes == 5 * LAYOUT.block_bytes * LAYOUT.num_layers
        assert 0 < report.exposed_s <= report.total_s
        arrived = await p.inbox.wait(Arrived, "r/0/0")
        assert arrived.first_token == token("r/0/0")
        p.check_copied(LAYOUT, source_blocks, p.receiver._layout, lease.block_ids)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_many_pushes_share_one_channel(transport: str) -> None:
    config = only(transport)
    async with pair(sender_config=config, receiver_config=config) as p:

        async def one(i: int) -> None:
            lease = p.receiver.grant(f"r{i}", [i], ttl_s=30)
            push = p.sender.begin(lease, [39 - i], num_known_tokens=3)
            ready(push, 1)
            if i % 5 == 4:
                await push.abort("not wanted")
            else:
                await push.commit(token(f"r{i}", i))

        async with asyncio.TaskGroup() as group:
            for i in range(40):
                group.create_task(one(i))
        for i in range(40):
            await p.inbox.wait(Released if i % 5 == 4 else Arrived, f"r{i}")
        assert len(p.receiver._channels) == 1
        assert p.receiver._machine.num_leases == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "mischief", ["corrupt=1", "corrupt=2", "drop=1", "reorder=1,delay_s=0.01", "corrupt=1,drop=1,seed=3"]
)
async def test_damage_is_found_and_repaired(transport: str, mischief: str) -> None:
    sender_config = only(f"fake:{mischief},over={transport}", layerwise_from_bytes={transport: 0})
    async with pair(sender_config=sender_config, receiver_config=only(transport)) as p:
        lease = p.receiver.grant("r", [1, 2, 3, 9], ttl_s=30)
        push = p.sender.begin(lease, [4, 2, 0], num_known_tokens=24)
        ready(push, 3)
        report = await push.commit(token("r"))
        assert report.transport == transport
        assert (report.retransmits > 0) == ("corrupt" in mischief or "drop" in mischief)
        p.check_copied(LAYOUT, [4, 2, 0], p.receiver._layout, lease.block_ids)


async def test_damage_beyond_the_last_attempt_is_final() -> None:
    async with pair(sender_config=only("fake:corrupt=1000"), receiver_config=only("shm")) as p:
        lease = p.receiver.grant("r", [1, 2], ttl_s=30)
        push = p.sender.begin(lease, [4], num_known_tokens=8)
        ready(push, 1)
        with pytest.raises(TransferFailed, match="digest of layers"):
            await push.commit(token("r"))
        await p.inbox.wait(Released, "r")
        assert "Arrived" not in p.inbox.of("r")


async def test_without_digest_damage_goes_unnoticed() -> None:
    """Shows that the test above fails when nothing is verified."""
    async with pair(
        sender_config=only("fake:corrupt=1000", digest=False), receiver_config=only("shm", digest=False)
    ) as p:
        lease = p.receiver.grant("r", [1, 2], ttl_s=30)
        push = p.sender.begin(lease, [4], num_known_tokens=8)
        ready(push, 1)
        await push.commit(token("r"))
        with pytest.raises(AssertionError):
            p.check_copied(LAYOUT, [4], p.receiver._layout, lease.block_ids)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_broken_connection_fails_the_push_and_heals(transport: str) -> None:
    # One block goes out as one unit, six layer by layer.
    from_bytes = 2 * LAYOUT.num_layers * LAYOUT.block_bytes
    config = only(f"fake:die=2,over={transport}", layerwise_from_bytes={transport: from_bytes})
    async with pair(sender_config=config, receiver_config=only(transport)) as p:
        lease = p.receiver.grant("r", list(range(6)), ttl_s=30)
        push = p.sender.begin(lease, list(range(6)), num_known_tokens=48)
        # One unit a layer, so that the second dies: what is ready before the start would go out as one.
        await begun(push)
        for layer in range(LAYOUT.num_layers):
            push.layer_ready(layer, 6)
            await asyncio.sleep(0.02)
        with pytest.raises((TransferFailed, NodeLost), match="died"):
            await push.commit(token("r"))
        await p.inbox.wait(Released, "r", within_s=1)
        assert p.inbox.of("r") == ["Quarantined", "Released"]
        lease = p.receiver.grant("r2", [7], ttl_s=30)
        push = p.sender.begin(lease, [7], num_known_tokens=1)
        ready(push, 1)
        # The fake counts anew for every connection.
        await push.commit(token("r2"))
        await p.inbox.wait(Arrived, "r2")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_revoke_stops_the_writer_before_the_blocks_are_released(transport: str) -> None:
    config = only(f"fake:delay_s=0.2,over={transport}", layerwise_from_bytes={transport: 0})
    async with pair(sender_config=config, receiver_config=only(transport)) as p:
        lease = p.receiver.grant("r", [1, 2, 3], ttl_s=30)
        push = p.sender.begin(lease, [1, 2, 3], num_known_tokens=24)
        failures: list[str] = []
        push.add_failure_callback(lambda error: failures.append(error.code))
        # Before the writer has begun nothing would have to be stopped.
        await begun(push)
        ready(push, 3)
        # Into the first write, as a rule.
        await asyncio.sleep(0.05)
        p.receiver.revoke("r", "client left")
        await p.inbox.wait(Released, "r")
        p.target[:] = 0xEE
        await asyncio.sleep(0.3)
        assert (p.target == 0xEE).all(), "a write after Released"
        assert p.inbox.of("r") == ["Quarantined", "Released"]
        with pytest.raises(TransferFailed, match="client left"):
            await push.commit(token("r"))
        assert failures == ["TransferFailed"]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_revoke_before_begin_releases_at_once_and_refuses_the_late_sender(transport: str) -> None:
    """Over tcp the refused push's data is in flight by then."""
    config = only(transport, layerwise_from_bytes={transport: 0})
    async with pair(sender_config=config, receiver_config=config) as p:
        lease = p.receiver.grant("r", [1], ttl_s=30)
        p.receiver.revoke("r", "cancelled")
        p.receiver.revoke("r", "cancelled")
        await p.inbox.wait(Released, "r")
        push = p.sender.begin(lease, [1], num_known_tokens=1)
        ready(push, 1)
        with pytest.raises(TransferFailed, match="not live"):
            await push.commit(token("r"))
        assert p.inbox.of("r") == ["Released"]
        assert (p.target == 0xEE).all()


async def test_a_tcp_push_is_taken_over_before_its_sender_has_heard_a_word() -> None:
    """One round trip: Begin, data and Commit go without an answer. A second trip would wait here for ever."""
    config = only("tcp")
    async with pair(sender_config=config, receiver_config=config) as p, Valve.before(p.address) as control:

        def begin(name: str, block: int) -> Push:
            lease = replace(p.receiver.grant(name, [block], ttl_s=30), address=f"127.0.0.1:{control.port}")
            push = p.sender.begin(lease, [block], num_known_tokens=1)
            ready(push, 1)
            return push

        await begin("connects", 1).commit(token("connects"))
        control.down.clear()
        committing = asyncio.create_task(begin("r", 2).commit(token("r")))
        await p.inbox.wait(Arrived, "r")
        assert not committing.done(), "its acknowledgement is held back"
        control.down.set()
        assert (await committing).transport == "tcp"


async def test_tcp_data_that_overtakes_begin_and_commit_is_kept() -> None:
    config = only("tcp")
    async with pair(sender_config=config, receiver_config=config) as p, Valve.before(p.address) as control:
        for i, name in enumerate(("connects", "r", "left")):
            lease = replace(p.receiver.grant(name, [i], ttl_s=30), address=f"127.0.0.1:{control.port}")
            if name != "connects":
                control.up.clear()
            push = p.sender.begin(lease, [i], num_known_tokens=1)
            ready(push, 1)
            committing = asyncio.create_task(push.commit(token(name)))
            if name != "connects":
                await until(lambda name=name: p.receiver._machine.state(name) is LeaseState.WRITING)
                if name == "left":
                    p.receiver.revoke("left", "client left")
                    await p.inbox.wait(Released, "left")
                control.up.set()
            if name == "left":
                with pytest.raises(TransferFailed, match="client left"):
                    await committing
            else:
                await committing
        assert p.inbox.of("r") == ["Arrived"]
        assert p.inbox.of("left") == ["Quarantined", "Released"]


@pytest.mark.parametrize("with_writer", [False, True])
async def test_expiry_is_driven_by_the_clock(with_writer: bool) -> None:
    async with pair() as p:
        lease = p.receiver.grant("r", [1], ttl_s=0.2)
        if with_writer:
            push = p.sender.begin(lease, [1], num_known_tokens=1)
        notice = await p.inbox.wait(Released, "r", within_s=1)
        assert notice.reason == "lease expired"
        if with_writer:
            ready(push, 1)
            with pytest.raises(TransferFailed, match="expired"):
                await push.commit(token("r"))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_abort_at_every_phase(transport: str) -> None:
    config = only(f"fake:delay_s=0.05,over={transport}", layerwise_from_bytes={transport: 0})
    async with pair(sender_config=config, receiver_config=only(transport)) as p:
        for phase, pause_s in enumerate((0.0, 0.001, 0.01, 0.03, 0.06)):
            name = f"r{phase}"
            lease = p.receiver.grant(name, [phase], ttl_s=30)
            push = p.sender.begin(lease, [phase], num_known_tokens=1)
            ready(push, 1)
            await asyncio.sleep(pause_s)
            await push.abort("client left")
            with pytest.raises(Cancelled):
                await push.commit(token(name))
        for phase in range(5):
            await p.inbox.wait(Released, f"r{phase}")
        assert p.receiver._machine.num_leases == 0


async def test_a_refused_take_over_fails_the_commit_and_releases_the_blocks() -> None:
    async with pair() as p:
        p.inbox.refuse_with = NoBlocks("no room in the batch")
        lease = p.receiver.grant("r", [1], ttl_s=30)
        push = p.sender.begin(lease, [1], num_known_tokens=1)
        ready(push, 1)
        with pytest.raises(TransferFailed, match="no room in the batch"):
            await push.commit(token("r"))
        await p.inbox.wait(Released, "r")


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        ({"protocol_version": 99}, f"protocol_version is {PROTOCOL_VERSION} at decode-0 and 99 at prefill-0"),
        ({"model": replace(describe("x", LAYOUT).model, fingerprint="other")}, "fingerprint is fingerprint-1 .* other"),
        ({"kv_layout": replace(LAYOUT, block_tokens=16)}, "block_tokens is 8 here and 16 there"),
        ({"kv_layout": replace(LAYOUT, dtype="float16")}, "dtype is float32 here and float16 there"),
        # As shards of another tensor or pipeline parallelism have it.
        ({"kv_layout": replace(LAYOUT, num_kv_heads=1)}, "num_kv_heads is 2 here and 1 there"),
        ({"kv_layout": replace(LAYOUT, num_layers=6)}, "num_layers is 3 here and 6 there"),
        ({"host_id": "elsewhere"}, "none of them connects the two"),
    ],
)
async def test_a_mismatch_is_refused_at_the_handshake(alter: dict[str, object], message: str) -> None:
    async with pair(alter_sender=alter, receiver_config=only("shm")) as p:
        push = p.sender.begin(p.receiver.grant("r", [1], ttl_s=30), [1], num_known_tokens=1)
        ready(push, 1)
        with pytest.raises(Incompatible, match=message):
            await push.commit(token("r"))


async def test_digest_on_one_side_only_is_refused() -> None:
    async with pair(sender_config=TransferConfig(digest=False)) as p:
        push = p.sender.begin(p.receiver.grant("r", [1], ttl_s=30), [1], num_known_tokens=1)
        ready(push, 1)
        with pytest.raises(Incompatible, match="digest is xxh3_128/512k at decode-0 and off at prefill-0"):
            await push.commit(token("r"))


@pytest.mark.parametrize(
    ("offered", "there"),
    [
        ([], "none there"),
        ([("fp8", "cache bytes")], "'fp8 \\(digest over cache bytes\\)' there"),
        ([("identity", "wire bytes")], "'identity \\(digest over wire bytes\\)' there"),
    ],
)
async def test_two_ends_without_a_common_encoding_refuse_each_other_by_name(
    offered: list[tuple[str, str]], there: str
) -> None:
    async with pair() as p, grpc.aio.insecure_channel(p.address) as channel:
        call = transfer_pb2_grpc.KvTransferStub(channel).Channel()
        hello = transfer_pb2.ChannelRequest.Hello(
            node=codec.node_to_pb(describe("prefill-9", LAYOUT)),
            transports=["tcp"],
            digest=DIGEST_NAME,
            encodings=[transfer_pb2.Encoding(name=name, digest_covers=covers) for name, covers in offered],
        )
        await call.write(transfer_pb2.ChannelRequest(hello=hello))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        mine = r"identity \(digest over cache bytes\) here"
        match = f"decode-0 and prefill-9 have no encoding of KV in common: {mine}, {there}"
        assert re.search(match, refused.value.details() or ""), refused.value.details()


def test_the_senders_first_common_encoding_is_taken() -> None:
    assert choose_encoding("decode-0", "prefill-0", [Encoding("fp8", "cache bytes"), IDENTITY]) is IDENTITY


async def test_another_host_gets_tcp() -> None:
    async with pair(alter_sender={"host_id": "elsewhere"}) as p:
        push = p.sender.begin(p.receiver.grant("r", [1], ttl_s=30), [1], num_known_tokens=1)
        ready(push, 1)
        assert (await push.commit(token("r"))).transport == "tcp"


async def test_a_lease_of_another_incarnation_is_refused() -> None:
    async with pair() as p:
        lease = replace(p.receiver.grant("r", [1], ttl_s=30), incarnation=77)
        push = p.sender.begin(lease, [1], num_known_tokens=1)
        ready(push, 1)
        with pytest.raises(NodeLost, match="incarnation 77"):
            await push.commit(token("r"))


async def test_an_unreachable_receiver_is_told_at_once() -> None:
    async with pair() as p:
        lease = replace(p.receiver.grant("r", [1], ttl_s=30), address="127.0.0.1:1")
        async with asyncio.timeout(1):
            push = p.sender.begin(lease, [1], num_known_tokens=1)
            ready(push, 1)
            with pytest.raises(NodeLost):
                await push.commit(token("r"))


async def test_a_peer_cannot_tell_the_epoch_of_another_lease_from_its_own() -> None:
    """Data that overtakes Begin opens the lease of its epoch: a peer that counts on from its own would take others'."""
    async with pair(receiver_config=only("tcp")) as p:
        epochs = [p.receiver.grant(f"r{n}", [n % 8], 30.0).epoch for n in range(64)]
        steps = {after - before for before, after in itertools.pairwise(epochs)}
        assert min(steps) > 0, "new for each lease"
        assert len(steps) > 60


async def test_a_lease_starts_one_push_only() -> None:
    async with pair() as p:
        lease = p.receiver.grant("r", [1], ttl_s=30)
        first = p.sender.begin(lease, [1], num_known_tokens=1)
        second = p.sender.begin(lease, [1], num_known_tokens=1)
        ready(first, 1)
        ready(second, 1)
        with pytest.raises(TransferFailed, match="used before"):
            await second.commit(token("r"))
        await first.commit(token("r"))


async def test_a_connection_that_breaks_between_pushes_is_there_again_for_the_next() -> None:
    config = TransferConfig(sender=SenderConfig(max_backoff_s=0.1))
    async with pair(sender_config=config) as p:

        async def push(name: str) -> None:
            push = p.sender.begin(p.receiver.grant(name, [1], ttl_s=30), [1], num_known_tokens=1)
            ready(push, 1)
            await push.commit(token(name))

        await push("r")
        (first,) = p.receiver._channels.values()
        first.outbox.lose("for the test")
        await until(lambda: [c for c in p.receiver._channels.values() if c is not first] != [])
        await until(lambda: next(iter(p.sender._peers.values())).connection is not None)
        await push("r2")


async def test_misuse_is_refused() -> None:
    async with pair() as p:
        lease = p.receiver.grant("r", [1, 2], ttl_s=30, min_blocks=2)
        with pytest.raises(InvalidRequest, match="has a lease already"):
            p.receiver.grant("r", [3], ttl_s=30)
        with pytest.raises(InvalidRequest, match="outside the cache"):
            p.receiver.grant("r2", [51], ttl_s=30)
        with pytest.raises(InvalidRequest, match="twice"):
            p.receiver.grant("r2", [5, 5], ttl_s=30)
        with pytest.raises(InvalidRequest, match="need 3 blocks"):
            p.sender.begin(lease, [1, 2, 3], num_known_tokens=17)
        with pytest.raises(InvalidRequest, match="outside the cache"):
            p.sender.begin(lease, [40], num_known_tokens=1)
        push = p.sender.begin(lease, [1], num_known_tokens=1)
        with pytest.raises(InternalError, match="before layer 0 was ready"):
            await push.commit(token("r"))
        with pytest.raises(InternalError, match=r"outside 0\.\.2"):
            push.layer_ready(3, 1)
        ready(push, 1)
        with pytest.raises(TransferFailed, match="1 blocks committed, expected 2 to 2"):
            await push.commit(token("r"))
        await p.inbox.wait(Released, "r")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_closing_ends_what_is_under_way(transport: str) -> None:
    config = only(transport)
    async with pair(sender_config=config, receiver_config=config) as p:
        pushes = []
        for i in range(3):
            pushes.append(p.sender.begin(p.receiver.grant(f"r{i}", [i], ttl_s=30), [i], num_known_tokens=1))
            ready(pushes[-1], 1)
        await asyncio.sleep(0.1)
        await p.receiver.close(deadline_s=2)
        for i, push in enumerate(pushes):
            with pytest.raises((TransferFailed, NodeLost)):
                await push.commit(token(f"r{i}"))
            assert p.inbox.of(f"r{i}")[-1] == "Released"
        with pytest.raises(Unavailable):
            p.receiver.grant("late", [1], ttl_s=1)
        await p.sender.close(deadline_s=2)
        with pytest.raises(Unavailable):
            p.sender.begin(pushes[0]._lease, [1], num_known_tokens=1)


async def test_a_silent_sender_loses_its_channel() -> None:
    """Heartbeats off at the sender: the receiver drops the channel, the sender hears of it and lets go."""
    quiet = TransferConfig(sender=SenderConfig(heartbeat_s=60))
    strict = TransferConfig(receiver=ReceiverConfig(heartbeat_s=0.05, max_missed_heartbeats=3))
    async with pair(sender_config=quiet, receiver_config=strict) as p:
        push = p.sender.begin(p.receiver.grant("r", [1], ttl_s=30), [1], num_known_tokens=1)
        await p.inbox.wait(Quarantined, "r", within_s=2)
        await p.inbox.wait(Released, "r", within_s=1)
        ready(push, 1)
        with pytest.raises(NodeLost, match="channel lost"):
            await push.commit(token("r"))


def test_bad_settings_stop_the_start() -> None:
    for bad in (
        {"transports": ()},
        {"transports": ("rdma",)},
        {"transports": ("fake:over=rdma",)},
        {"transports": ("fake:explode=1",)},
        {"transports": ("fake:corrupt=x",)},
        {"tcp_streams": 0},
        {"connect_timeout_s": 0.0},
        {"receiver": ReceiverConfig(revoke_timeout_s=-1)},
    ):
        with pytest.raises(BadConfig):
            TransferConfig(**bad)


async def test_a_sender_that_closes_while_it_connects_again_leaves_no_socket() -> None:
    async with pair(sender_config=only("tcp"), receiver_config=only("tcp")) as p:
        lease = p.receiver.grant("r", [1], ttl_s=30)
        push = p.sender.begin(lease, [4], num_known_tokens=8)
        ready(push, 1)
        await push.commit(token("r"))
        (peer,) = p.sender._peers.values()
        wire = peer.connection.wire
        join, may_end = wire._lanes.join, threading.Event()
        wire._lanes.join = lambda timeout_s: may_end.wait(timeout_s) and join(timeout_s)

        async def open_connection(address: str) -> None:
            await asyncio.Event().wait()

        p.sender.open_connection = open_connection
        peer.connection.lose("for the test")
        await until(lambda: peer.connection is None)
        other = p.sender.begin(p.receiver.grant("s", [2], ttl_s=30), [5], num_known_tokens=8)
        await until(lambda: peer._opening is not None)
        await other.abort("it is over")
        peer.stop()
        closing = asyncio.create_task(peer.close())
        await asyncio.sleep(0)
        may_end.set()
        await closing
        assert [stream.fileno() for stream in wire._streams] == [-1] * len(wire._streams)
