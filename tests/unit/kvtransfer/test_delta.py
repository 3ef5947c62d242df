"""Transfers to a receiver that holds a sequence's first blocks: exactly the others are written.

Row 23 of docs/failures.md: a prefix hit shifts the block mapping.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
from dataclasses import replace

import grpc.aio
import numpy as np
import pytest

from baton import codec
from baton.errors import InvalidRequest, TransferFailed
from baton.types import KvLayout, Lease, TransferReport
from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer.config import TransferConfig
from kvtransfer.digest import DIGEST_NAME
from kvtransfer.encoding import IDENTITY
from kvtransfer.protocol.receiver_events import Arrived, Released
from kvtransfer.sender import Push
from kvtransfer.transports import tcp_socket as tcp
from kvtransfer.wire_codec import encoding_to_pb
from tests.support.figures import figure
from tests.support.transfer import LAYOUT, Pair, describe, pair, token, until

# Two blocks are one segment of a digest: what is skipped shifts where segments begin.
LARGE = KvLayout(num_layers=2, num_blocks=16, num_kv_heads=2, head_dim=256, block_tokens=64, dtype="float32")
TRANSPORTS = ["shm", "tcp", "cuda_ipc", "fake:reorder=1,delay_s=0.001,over=shm", "fake:reorder=1,over=tcp"]
NUM_FULL = 5
HITS = [0, 1, 2, NUM_FULL - 1, NUM_FULL]
POISON = 0xAB


def config_of(spec: str, layerwise_from_bytes: int) -> TransferConfig:
    name = spec.rsplit("over=", 1)[-1]
    return TransferConfig(transports=(spec,), layerwise_from_bytes={name: layerwise_from_bytes})


class Blocks:
    """Hands out ids of one cache in random order."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._random, self._ids = random.Random(seed), range(num_blocks)

    def some(self, count: int) -> list[int]:
        return self._random.sample(self._ids, count)


def put(p: Pair, block_ids: list[int], value: int) -> None:
    """Fill blocks of the receiver's cache."""
    layout = p.receiver._layout
    for layer, block in itertools.product(range(layout.num_layers), block_ids):
        at = layout.offset(layer, block)
        p.target[at : at + layout.block_bytes] = value


async def compute(p: Pair, push: Push, layout: KvLayout, source: list[int], num_hits: int) -> None:
    """As an engine that finds ``num_hits`` blocks in its cache and computes the others in steps of two: a block has its
    bytes no sooner than that is told."""
    where = [[layout.offset(layer, block) for block in source] for layer in range(layout.num_layers)]
    truth = [[p.source[at : at + layout.block_bytes].copy() for at in row] for row in where]
    for at in [at for row in where for at in row[num_hits:]]:
        p.source[at : at + layout.block_bytes] = POISON
    done = num_hits
    while True:
        first, done = done, min(done + 2, len(source))
        for layer in range(layout.num_layers):
            for at, block in list(zip(where[layer], truth[layer], strict=True))[first:done]:
                p.source[at : at + layout.block_bytes] = block
            push.layer_ready(layer, done)
        if done == len(source):
            return
        await asyncio.sleep(0.001)


async def hand_over(
    p: Pair,
    layout: KvLayout,
    name: str,
    *,
    num_tokens: int,
    source: list[int],
    target: list[int],
    hits: tuple[int, int],
) -> TransferReport:
    """One transfer with hits at prefill and at decode; everything that is written is compared with what should be.

    What decode holds is poisoned: even its own bytes, written once more, would show.
    """
    num_prefill, num_decode = hits
    num_blocks = layout.blocks_for(num_tokens)
    shared, leased = target[:num_decode], target[num_decode:]
    put(p, target, 0xEE)
    put(p, shared, POISON)
    expected = p.target.copy()
    for layer, i in itertools.product(range(layout.num_layers), range(num_decode, num_blocks)):
        src, dst = layout.offset(layer, source[i]), p.receiver._layout.offset(layer, target[i])
        expected[dst : dst + layout.block_bytes] = p.source[src : src + layout.block_bytes]
    missing = num_blocks - num_decode
    lease = p.receiver.grant(name, leased, ttl_s=30, min_blocks=missing, num_cached_blocks=num_decode)
    assert not {*lease.block_ids} & {*shared}, "what is shared is not named"
    push = p.sender.begin(lease, source, num_known_tokens=num_tokens)
    await compute(p, push, layout, source, num_prefill)
    report = await push.commit(token(name))
    arrived = await p.inbox.wait(Arrived, name)
    assert arrived.first_token == token(name)
    assert np.array_equal(p.target, expected), (name, "a byte of a block that was not missing, or not all of these")
    assert (report.num_blocks, report.num_bytes) == (missing, missing * layout.block_bytes * layout.num_layers)
    assert report.retransmits == 0
    return report


@pytest.mark.parametrize("layerwise_from_bytes", [0, 1 << 40])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_23_exactly_the_missing_blocks_are_written_whatever_is_held(
    transport: str, layerwise_from_bytes: int
) -> None:
    """Every pair of hits, for a prompt that ends with a block and for one that ends within the next."""
    config = config_of(transport, layerwise_from_bytes)
    target_layout = replace(LAYOUT, num_blocks=LAYOUT.num_blocks + 11)
    sources, targets = Blocks(LAYOUT.num_blocks, 1), Blocks(target_layout.num_blocks, 2)
    async with pair(sender_config=config, receiver_config=config, target_layout=target_layout) as p:
        for tail, at_prefill, at_decode in itertools.product((0, 3), HITS, HITS):
            num_tokens = NUM_FULL * LAYOUT.block_tokens + tail
            num_blocks = LAYOUT.blocks_for(num_tokens)
            report = await hand_over(
                p,
                LAYOUT,
                f"r/{tail}/{at_prefill}/{at_decode}",
                num_tokens=num_tokens,
                source=sources.some(num_blocks),
                # One more than the prompt needs: for the first new token, or for what follows it.
                target=targets.some(num_blocks + 1),
                hits=(at_prefill, at_decode),
            )
            is_layerwise = layerwise_from_bytes == 0 and num_blocks > at_decode
            assert report.layerwise == is_layerwise
    figure(23, "pairs of prefix hits whose every byte was compared", 2 * len(HITS) ** 2, "pairs")


@pytest.mark.parametrize("layerwise_from_bytes", [0, 1 << 40])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_23_segments_of_digests_begin_where_the_missing_blocks_begin(
    transport: str, layerwise_from_bytes: int
) -> None:
    config = config_of(transport, layerwise_from_bytes)
    sources, targets = Blocks(LARGE.num_blocks, 3), Blocks(LARGE.num_blocks, 4)
    async with pair(source_layout=LARGE, target_layout=LARGE, sender_config=config, receiver_config=config) as p:
        for at_prefill, at_decode in itertools.product((0, 3), HITS):
            num_tokens = NUM_FULL * LARGE.block_tokens + 1
            source, target = sources.some(NUM_FULL + 1), targets.some(NUM_FULL + 1)
            name = f"r/{at_prefill}/{at_decode}"
            await hand_over(
                p, LARGE, name, num_tokens=num_tokens, source=source, target=target, hits=(at_prefill, at_decode)
            )


@pytest.mark.parametrize("spec", ["fake:corrupt=2,over=tcp", "fake:drop=1,over=shm", "fake:swap=1,over=tcp"])
async def test_damage_is_found_and_repaired_behind_a_hit(spec: str) -> None:
    config = config_of(spec, 0)
    async with pair(sender_config=config, receiver_config=config) as p:
        layout = p.receiver._layout
        put(p, [3, 4], POISON)
        lease = p.receiver.grant("r", [9, 8, 7], ttl_s=30, min_blocks=3, num_cached_blocks=2)
        push = p.sender.begin(lease, [1, 2, 3, 4, 5], num_known_tokens=5 * LAYOUT.block_tokens)
        for layer in range(LAYOUT.num_layers):
            push.layer_ready(layer, 5)
        report = await push.commit(token("r"))
        assert report.retransmits > 0
        put(p, [3, 4], 0xEE)
        p.check_copied(LAYOUT, [3, 4, 5], layout, lease.block_ids)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_nothing_is_pushed_where_nothing_is_missing_and_the_push_can_be_aborted(transport: str) -> None:
    config = config_of(transport, 0)
    num_tokens = 2 * LAYOUT.block_tokens
    async with pair(sender_config=config, receiver_config=config) as p:
        lease = p.receiver.grant("a", [9], ttl_s=30, min_blocks=0, num_cached_blocks=2)
        await p.sender.begin(lease, [1, 2], num_known_tokens=num_tokens).abort("cancelled")
        await p.inbox.wait(Released, "a")
        lease = p.receiver.grant("b", [9], ttl_s=30, min_blocks=0, num_cached_blocks=2)
        # Whatever the engine tells: a computation that found everything may have told nothing.
        report = await p.sender.begin(lease, [1, 2], num_known_tokens=num_tokens).commit(token("b"))
        assert (report.num_bytes, report.num_blocks, report.layerwise) == (0, 0, False)
        await p.inbox.wait(Arrived, "b")
        assert (p.target == 0xEE).all()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_wrong_number_of_cached_blocks_is_refused_by_either_end(transport: str) -> None:
    """A lease that was altered on its way, or a sender that counts otherwise."""
    config = config_of(transport, 0)
    num_tokens = 5 * LAYOUT.block_tokens
    async with pair(sender_config=config, receiver_config=config) as p:
        before = p.target.copy()
        for number, (num_told, at_begin) in enumerate([(0, True), (1, True), (6, True), (1 << 31, True), (3, False)]):
            name = f"r{number}"
            leased = p.receiver.grant(name, [9, 8, 7], ttl_s=30, min_blocks=3, num_cached_blocks=2)
            lease: Lease = replace(leased, num_cached_blocks=num_told)
            if at_begin:
                with pytest.raises(InvalidRequest, match=f"{num_told} cached and 3 leased"):
                    p.sender.begin(lease, [1, 2, 3, 4, 5], num_known_tokens=num_tokens)
                p.receiver.revoke(name, "refused")
            else:
                push = p.sender.begin(lease, [1, 2, 3, 4, 5], num_known_tokens=num_tokens)
                await compute(p, push, LAYOUT, [1, 2, 3, 4, 5], 0)
                with pytest.raises(TransferFailed, match="2 blocks committed, expected 3 to 3"):
                    await push.commit(token(name))
            await p.inbox.wait(Released, name)
        assert [notice for notice in p.inbox.notices if isinstance(notice, Arrived)] == []
        outside = np.ones(len(before), dtype=bool)
        for layer, block in itertools.product(range(LAYOUT.num_layers), (9, 8, 7)):
            at = p.receiver._layout.offset(layer, block)
            outside[at : at + LAYOUT.block_bytes] = False
        assert np.array_equal(p.target[outside], before[outside])


class Hostile:
    """A peer that has passed the handshake for tcp and says and sends what it likes."""

    def __init__(self, call: grpc.aio.StreamStreamCall, stream: socket.socket) -> None:
        self._call, self.stream = call, stream

    @classmethod
    async def connect(cls, channel: grpc.aio.Channel) -> Hostile:
        call = transfer_pb2_grpc.KvTransferStub(channel).Channel()
        hello = pb.ChannelRequest.Hello(
            node=codec.node_to_pb(describe("evil-0", LAYOUT)),
            transports=("tcp",),
            digest=DIGEST_NAME,
            encodings=[encoding_to_pb(IDENTITY)],
        )
        await call.write(pb.ChannelRequest(hello=hello))
        welcome = (await call.read()).welcome
        host, port = welcome.endpoint.rsplit(":", 1)
        stream = await asyncio.to_thread(socket.create_connection, (host, int(port)), 5)
        stream.sendall(tcp.PREAMBLE.pack(tcp.MAGIC, welcome.token, 0))
        assert await asyncio.to_thread(stream.recv, 1) == tcp.READY
        return cls(call, stream)

    async def say(self, **message: object) -> None:
        await self._call.write(pb.ChannelRequest(**message))

    async def send(self, *head: int, payload: bytes) -> None:
        frame = tcp.FRAME.pack(*head, len(payload)) + payload
        await asyncio.get_running_loop().sock_sendall(self.stream, frame)


async def test_no_frame_and_no_message_of_a_hostile_sender_reaches_a_shared_block() -> None:
    """Every position that a frame can name, before, in and beyond the lease, and commits that count the shared blocks
    as well. Each lie costs its lease; only bytes of leased blocks may change."""
    config = config_of("tcp", 0)
    shared, leased = [0, 1, 2, 3], [20, 11]
    wild = [0, 1, 2, 3, 2**31, 2**32 - 4, 2**32 - 1]
    payload = b"\x66" * LAYOUT.block_bytes
    async with pair(receiver_config=config, sender_config=config) as p, grpc.aio.insecure_channel(p.address) as channel:
        layout = p.receiver._layout
        put(p, shared, POISON)
        before = p.target.copy()
        allowed = np.zeros(len(before), dtype=bool)
        for layer, block in itertools.product(range(layout.num_layers), leased):
            at = layout.offset(layer, block)
            allowed[at : at + layout.block_bytes] = True
        evil = await Hostile.connect(channel)
        evil.stream.setblocking(False)
        cases = [(first, 1, 0) for first in wild] + [(0, n, 0) for n in wild] + [(0, 1, layer) for layer in wild]
        for number, (first, num_blocks, layer) in enumerate(cases):
            name = f"r{number}"
            lease = p.receiver.grant(name, leased, ttl_s=30, min_blocks=2, num_cached_blocks=4)
            await evil.say(begin=pb.ChannelRequest.Begin(sequence_id=name, epoch=lease.epoch))
            await evil.send(lease.epoch, layer, 1, first, num_blocks, payload=payload)
            if (first, num_blocks, layer) == (0, 1, 0):
                # No lie yet: the peer is really connected.
                await until(lambda: (p.target[allowed] == 0x66).any())
            # Of an epoch that was not granted.
            await evil.send(lease.epoch ^ 1, 0, 1, 0, 1, payload=payload)
            commit = pb.ChannelRequest.Commit(
                sequence_id=name,
                epoch=lease.epoch,
                attempt=1,
                # With the shared ones, or fewer than are missing.
                num_blocks=6 if number % 2 else 1,
                layer_digests=[bytes(16)] * LAYOUT.num_layers,
                first_token=codec.tokens_to_pb(token(name)),
                num_sent_bytes=len(payload),
            )
            await evil.say(commit=commit)
            await p.inbox.wait(Released, name)
        evil.stream.close()
        await until(lambda: not p.receiver._writers)
        assert np.array_equal(p.target[~allowed], before[~allowed])
        assert not any(isinstance(notice, Arrived) for notice in p.inbox.notices)
