"""The data planes on their own, with peers that lie, repeat, vanish or never had a right to speak."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import AsyncIterator

import numpy as np
import pytest

from kvtransfer.memory import HostMemory
from kvtransfer.protocol.messages import WrittenRange
from kvtransfer.transports import local_wire, shm
from kvtransfer.transports import tcp_socket as tcp
from kvtransfer.transports.fake import FaultPlan
from kvtransfer.transports.interface import PlaneEvents, PlaneSite
from kvtransfer.transports.tcp_receiver import TcpPlane
from tests.support.transfer import LAYOUT, host_memory, until

TOKEN = bytes(range(32))
SIZE = LAYOUT.block_bytes
BUFFERS = (socket.SO_SNDBUF, socket.SO_RCVBUF)


class Streams:
    """A TcpPlane with channel 1 on offer, and raw client sockets."""

    def __init__(self, plane: TcpPlane, memory: np.ndarray) -> None:
        self.plane, self.memory = plane, memory
        self.gone: list[int] = []
        self.quiet: list[int] = []
        self.frames: list[tuple[int, ...]] = []
        self.early: list[tuple[int, int]] = []
        self.stray: list[tuple[int, int]] = []
        # Opened when their first frame comes.
        self.expected: dict[int, tuple[int, ...]] = {}
        plane.offer(1, TOKEN)
        self.endpoint = plane.endpoint

    async def connect(self, token: bytes = TOKEN) -> socket.socket:
        host, port = self.endpoint.split(":")
        stream = await asyncio.to_thread(socket.create_connection, (host, int(port)), 5)
        stream.sendall(tcp.PREAMBLE.pack(tcp.MAGIC, token, 0))
        return stream

    def send(self, stream: socket.socket, *head: int, payload: bytes) -> None:
        stream.sendall(tcp.FRAME.pack(*head, len(payload)) + payload)

    def on_early(self, channel: int, epoch: int) -> None:
        self.early.append((channel, epoch))
        if epoch in self.expected:
            self.plane.open_epoch(channel, epoch, self.expected.pop(epoch))

    async def settled(self, stream: socket.socket, channel: int = 1) -> None:
        """Everything sent on the stream so far was looked at: what comes next on it has been."""
        epoch = 1000 + len(self.early)
        self.send(stream, epoch, 0, 1, 0, 1, payload=b"z")
        await until(lambda: (channel, epoch) in self.early)


@contextlib.asynccontextmanager
async def streams() -> AsyncIterator[Streams]:
    memory = np.zeros(LAYOUT.total_bytes, dtype=np.uint8)
    made: list[Streams] = []
    events = PlaneEvents(
        writer_gone=lambda channel: made[0].gone.append(channel),
        wrote=lambda *_: None,
        quiet=lambda epoch: made[0].quiet.append(epoch),
        data_came=lambda channel, epoch: made[0].on_early(channel, epoch),
        strayed=lambda channel, epoch: made[0].stray.append((channel, epoch)),
        landed=lambda *frame: made[0].frames.append(frame),
    )
    plane = TcpPlane(PlaneSite(host_memory(memory), LAYOUT, "127.0.0.1", "", events))
    await plane.start()
    made.append(Streams(plane, memory))
    try:
        yield made[0]
    finally:
        await plane.close()


async def test_tcp_fills_the_lease_and_refuses_every_frame_outside_of_it() -> None:
    async with streams() as s:
        with await s.connect() as stream:
            assert await asyncio.to_thread(stream.recv, 1) == b"\1"
            s.plane.open_epoch(1, 9, (5, 2))
            block = b"x" * SIZE
            s.send(stream, 9, 1, 1, 1, 1, payload=block)
            await s.settled(stream)
            offset = LAYOUT.offset(1, 2)
            assert bytes(s.memory[offset : offset + SIZE]) == block
            assert s.frames == [(9, 1, 1, 1)]
            s.memory[offset : offset + SIZE] = 0
            s.send(stream, 8, 0, 1, 0, 1, payload=block)
            s.send(stream, 9, 0, 0, 0, 0, payload=b"")
            await s.settled(stream)
            assert s.stray == [], "no such epoch, and nothing of the lease"
            outside = (
                (9, 3, 1, 0, 1, block),  # no such layer
                (9, 2, 2, 0, 1, block * 2),  # layers beyond the last
                (9, 0, 1, 2, 1, block),  # a position beyond the lease
                (9, 0, 1, 1, 2, block * 2),
                (9, 0, 1, 0xFFFFFFFF, 1, block),
                (9, 0, 1, 0, 1, block[:-1]),  # less than it says
                (9, 0, 1, 0, 1, block + b"y"),  # more than it says
            )
            for number, (*head, payload) in enumerate(outside, 1):
                s.send(stream, *head, payload=payload)
                await until(lambda number=number: len(s.stray) == number)
            assert s.stray == [(1, 9)] * len(outside)
            assert s.plane.close_epoch(1, 9, 0)
            s.send(stream, 9, 0, 1, 0, 1, payload=block)
            await s.settled(stream)
            assert not s.memory.any(), "late"
            assert len(s.frames) == 1, "what was refused is not told"
            stream.sendall(tcp.FRAME.pack(9, 0, 1, 0, 1, 1 << 40))
            assert await asyncio.to_thread(stream.recv, 1) == b"", "an absurd size ends the stream"
        await until(lambda: bool(s.gone))
        assert s.gone == [1]


async def test_silent_streams_without_a_token_keep_none_out_that_has_one() -> None:
    async with streams() as s:
        host, port = s.endpoint.split(":")
        # Without a turn of the loop in between: all of them wait when the listener is next asked.
        silent = [socket.create_connection((host, int(port)), 5) for _ in range(200)]
        silent += [await asyncio.to_thread(socket.create_connection, (host, int(port)), 5) for _ in range(200)]
        with await s.connect() as stream:
            assert await asyncio.to_thread(stream.recv, 1) == b"\1"
            s.plane.open_epoch(1, 9, (0, 1))
            await s.settled(stream)
        assert await asyncio.to_thread(silent[0].recv, 1) == b"", "the oldest made room"
        for each in silent:
            each.close()


async def test_tcp_is_not_quiet_while_a_frame_is_half_received() -> None:
    async with streams() as s:
        with await s.connect() as stream:
            s.plane.open_epoch(1, 9, (0, 1))
            stream.sendall(tcp.FRAME.pack(9, 0, 1, 0, 1, SIZE) + b"x" * 100)
            await asyncio.sleep(0.1)
            assert not s.plane.close_epoch(1, 9, 0)
            stream.sendall(b"x" * (SIZE - 100))
            await until(lambda: bool(s.quiet))
            assert s.quiet == [9]
            s.plane.open_epoch(1, 10, (0, 1))
            stream.sendall(tcp.FRAME.pack(10, 0, 1, 0, 1, SIZE) + b"x" * 100)
            await asyncio.sleep(0.1)
            assert not s.plane.close_epoch(1, 10, 0)
            s.plane.drop(1)
            await until(lambda: len(s.quiet) == 2 and bool(s.gone))
            assert (s.quiet, s.gone) == ([9, 10], [1])


async def test_tcp_remembers_no_epoch_of_a_channel_that_is_gone() -> None:
    async with streams() as s:
        s.plane.offer(2, b"2" * 32)
        s.plane.open_epoch(2, 8, (2, 3))
        with await s.connect() as stream:
            s.plane.open_epoch(1, 9, (0, 1))
            s.send(stream, 9, 0, 1, 0, 1, payload=b"x" * SIZE)
            await until(lambda: bool(s.frames))
        await until(lambda: s.gone == [1])
        s.plane.drop(2)
        assert s.gone == [1, 2]
        s.plane.open_epoch(1, 10, (0, 1))
        assert s.plane.num_epochs == 0


async def test_tcp_takes_a_commits_bytes_from_all_streams_and_then_no_more() -> None:
    """The commit was read first: its bytes are on two streams, or not sent yet."""
    async with streams() as s:
        with await s.connect() as one, await s.connect() as other:
            s.plane.open_epoch(1, 9, (0, 1, 2))
            assert not s.plane.close_epoch(1, 9, 3 * SIZE)
            s.send(one, 9, 0, 1, 2, 1, payload=b"c" * SIZE)
            s.send(other, 9, 0, 1, 1, 1, payload=b"b" * SIZE)
            one.sendall(tcp.FRAME.pack(9, 0, 1, 0, 1, SIZE) + b"a" * 100)
            await until(lambda: len(s.frames) == 2)
            assert s.quiet == [], "two of three are here, the third is coming in"
            one.sendall(b"a" * (SIZE - 100))
            await until(lambda: s.quiet == [9])
            s.send(other, 9, 1, 1, 0, 1, payload=b"x" * SIZE)
            await s.settled(other)
            assert len(s.frames) == 3, "beyond what was committed"
            for block, letter in enumerate(b"abc"):
                offset = LAYOUT.offset(0, block)
                assert (s.memory[offset : offset + SIZE] == letter).all()
            assert not s.memory[LAYOUT.offset(1, 0) :].any()


async def test_tcp_gives_a_committed_epoch_up_when_a_stream_breaks_before_its_last_byte() -> None:
    async with streams() as s:
        with await s.connect() as stream:
            s.plane.open_epoch(1, 9, (0, 1))
            assert not s.plane.close_epoch(1, 9, 2 * SIZE)
            s.send(stream, 9, 0, 1, 0, 1, payload=b"a" * SIZE)
            stream.sendall(tcp.FRAME.pack(9, 0, 1, 1, 1, SIZE) + b"b" * 100)
        await until(lambda: s.gone == [1])
        assert s.quiet == [], "never all of it"
        assert s.plane.close_epoch(1, 9, 0), "and nothing is being written"


async def test_tcp_data_that_overtakes_its_begin_waits_for_the_lease() -> None:
    async with streams() as s:
        s.expected[9] = (0, 1)
        with await s.connect() as stream:
            s.send(stream, 9, 0, 1, 0, 1, payload=b"a" * SIZE)
            s.send(stream, 9, 0, 1, 1, 1, payload=b"b" * SIZE)
            s.send(stream, 8, 0, 1, 0, 1, payload=b"x" * SIZE)
            await s.settled(stream)
            assert s.early[:2] == [(1, 9), (1, 8)], "asked once, and about a stale epoch"
            assert s.frames == [(9, 0, 0, 1), (9, 0, 1, 1)]
            assert s.plane.close_epoch(1, 9, 2 * SIZE)


async def test_tcp_channels_cannot_write_into_each_others_leases() -> None:
    async with streams() as s:
        s.plane.offer(2, b"2" * 32)
        s.plane.open_epoch(2, 9, (0,))
        with await s.connect() as stream:
            assert await asyncio.to_thread(stream.recv, 1) == b"\1"
            s.send(stream, 9, 0, 1, 0, 1, payload=b"x" * SIZE)
            await s.settled(stream)
        assert not s.memory.any()


async def test_tcp_refuses_streams_without_a_live_token() -> None:
    async with streams() as s:
        for token in (b"\0" * 32, TOKEN):
            if token == TOKEN:
                s.plane.drop(1)
            with await s.connect(token) as stream:
                assert await asyncio.to_thread(stream.recv, 1) == b""
        with await s.connect(b"short"[:5].ljust(32)) as stream:
            assert await asyncio.to_thread(stream.recv, 1) == b""
        assert s.gone == [1]


async def test_shm_hands_the_arena_to_the_token_once() -> None:
    gone: list[int] = []
    with HostMemory.create(4096) as memory:
        hints: list[object] = []

        def ignore(*_: object) -> None:
            pass

        events = PlaneEvents(gone.append, lambda *hint: hints.append(hint), ignore, ignore, ignore, None)
        plane = shm.ShmPlane(memory, events)
        await plane.start()
        plane.offer(1, TOKEN)
        name = plane.endpoint
        with contextlib.ExitStack() as stack:
            for token, is_welcome in ((b"\0" * 32, False), (TOKEN, True), (TOKEN, False)):
                peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                peer.connect(f"\0{name}")
                peer.sendall(token)
                data, fds, _, _ = await asyncio.to_thread(socket.recv_fds, peer, 1, 1)
                assert (len(fds) == 1) == is_welcome == bool(data)
                for fd in fds:
                    os.close(fd)
                if is_welcome:
                    raw = local_wire.HINT.pack(7, 1, 2, 2, 3, 4) + local_wire.HINT.pack(8, 2, 0, 1, 0, 1)
                    for part in (raw[:5], raw[5:]):
                        peer.sendall(part)
                        await asyncio.sleep(0.02)
            first = (1, 7, 1, [WrittenRange(2, 3, 4), WrittenRange(3, 3, 4)])
            assert hints == [first, (1, 8, 2, [WrittenRange(0, 0, 1)])], "hints may come in pieces"
            assert gone == []
        await until(lambda: bool(gone))
        assert gone == [1], "end-of-file on the one that was let in"
        plane.offer(2, TOKEN)
        plane.drop(2)
        assert gone == [1, 2], "no sender ever came"
        await plane.close()


@pytest.mark.parametrize(("host", "is_same"), [("127.0.0.1", True), ("127.0.0.2", False)])
def test_little_is_in_flight_between_ends_of_one_host(host: str, is_same: bool) -> None:
    with (
        socket.create_server((host, 0)) as server,
        socket.create_connection(server.getsockname()[:2], source_address=("127.0.0.1", 0)) as left,
    ):
        right, _ = server.accept()
        with right:
            before = left.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            for end in (left, right):
                tcp.tune(end)
            sizes = [end.getsockopt(socket.SOL_SOCKET, option) for end in (left, right) for option in BUFFERS]
            assert (len(set(sizes)) == 1 and sizes[0] <= 2 * (208 << 10)) == is_same
            assert is_same or left.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before, "the kernel's to tune"
            if is_same:
                left.setblocking(False)
                num_bytes = 0
                with contextlib.suppress(BlockingIOError):
                    while num_bytes < 8 << 20:
                        num_bytes += left.send(bytes(64 << 10))
                assert num_bytes < 1 << 20, "less than a core's cache"


def test_mischief_is_read_and_checked() -> None:
    found = FaultPlan.parse("fake:corrupt=1,seed=7,over=tcp,delay_s=0.5")
    assert (found.corrupt, found.seed, found.over, found.delay_s) == (1, 7, "tcp", 0.5)
    assert FaultPlan.parse("fake") == FaultPlan()


@pytest.mark.parametrize("sizes", [[10], [3, 4, 5], [1] * 600])
def test_partial_sends_and_receives_lose_nothing(sizes: list[int]) -> None:
    left, right = socket.socketpair()
    with left, right:
        data = np.random.default_rng(1).integers(0, 256, sum(sizes), dtype=np.uint8)
        cuts = np.cumsum([0, *sizes])
        views = [data.data[a:b] for a, b in itertools.pairwise(cuts)]
        tcp.send_all(left, views)
        target = np.zeros(len(data), dtype=np.uint8)
        assert tcp.receive_all(right, [target.data[: len(data) // 2], target.data[len(data) // 2 :]])
        assert np.array_equal(target, data)
        left.shutdown(socket.SHUT_WR)
        assert not tcp.receive_all(right, [target.data[:1]])
