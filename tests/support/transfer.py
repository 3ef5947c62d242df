"""A sender and a receiver joined by real sockets in one process, and small caches with known bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Self

import grpc.aio
import numpy as np

from baton import PROTOCOL_VERSION
from baton.access import OPEN
from baton.channels import peer_credentials
from baton.faults.faults import Faults
from baton.server import ErrorMappingInterceptor
from baton.types import KvLayout, ModelDescription, NodeDescription, Role, TokenChunk
from kvtransfer.config import TransferConfig
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.devices.fake import FakeDevice
from kvtransfer.hashing import ByteArray
from kvtransfer.host import host_id
from kvtransfer.memory import HostMemory, Memory
from kvtransfer.protocol.receiver_events import Arrived, LeaseNotice, WriterBegan
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Push, Sender

LAYOUT = KvLayout(num_layers=3, num_blocks=40, num_kv_heads=2, head_dim=16, block_tokens=8, dtype="float32")


def describe(node_id: str, layout: KvLayout, address: str = "", incarnation: int = 1) -> NodeDescription:
    return NodeDescription(
        node_id=node_id,
        incarnation=incarnation,
        home_role=Role.MIXED,
        address=address,
        model=ModelDescription("demo", "fingerprint-1", layout.dtype, 4096, 1000),
        kv_layout=layout,
        protocol_version=PROTOCOL_VERSION,
        pid=1,
        host_id=host_id(),
        transports=("shm", "tcp"),
        device="cpu",
        kernels="reference",
        software_version="0",
    )


def token(sequence_id: str, token_id: int = 7) -> TokenChunk:
    return TokenChunk(sequence_id, 0, (token_id,))


class Inbox:
    """Collects a receiver's events and lets a test wait for one."""

    def __init__(self) -> None:
        # How leases ended, and the sequences of those that a writer began to fill.
        self.notices: list[LeaseNotice] = []
        self.began: list[str] = []
        self.refuse_with: Exception | None = None
        self._changed = asyncio.Event()

    def __call__(self, notice: LeaseNotice) -> None:
        if isinstance(notice, WriterBegan):
            self.began.append(notice.sequence_id)
            return
        self.notices.append(notice)
        self._changed.set()
        if isinstance(notice, Arrived) and self.refuse_with is not None:
            raise self.refuse_with

    async def wait(self, kind: type[LeaseNotice], sequence_id: str, within_s: float = 5.0) -> LeaseNotice:
        async with asyncio.timeout(within_s):
            while True:
                for notice in self.notices:
                    if isinstance(notice, kind) and notice.sequence_id == sequence_id:
                        return notice
                self._changed.clear()
                await self._changed.wait()

    def of(self, sequence_id: str) -> list[str]:
        return [type(n).__name__ for n in self.notices if n.sequence_id == sequence_id]


def fake_device(memory: Memory) -> FakeDevice:
    assert isinstance(memory.device, FakeDevice)
    return memory.device


def as_bytes(memory: HostMemory) -> ByteArray:
    return np.frombuffer(memory.buffer, dtype=np.uint8)


def host_memory(array: ByteArray) -> HostMemory:
    """A test's own array, as transfers see a cache."""
    return HostMemory(array.data)


def look_into(memory: Memory) -> ByteArray:
    """Its bytes, as only a test may see those of a device."""
    if isinstance(memory, HostMemory):
        return as_bytes(memory)
    assert isinstance(memory, DeviceMemory)
    return fake_device(memory).bytes_at(memory.address, memory.num_bytes)


@contextlib.contextmanager
def make_memory(num_bytes: int, *, on_device: bool, seed: int = 0) -> Iterator[HostMemory | DeviceMemory]:
    """Memory that leaves nothing behind, on a device whose copies come up to half a millisecond late."""
    if not on_device:
        with HostMemory.create(num_bytes) as host:
            yield host
        return
    device = FakeDevice(seed=seed, max_delay_s=0.0005)
    with DeviceMemory.create(num_bytes, device) as memory:
        yield memory
    device.shut_down()


def needs_device(config: TransferConfig | None) -> bool:
    return config is not None and config.transport_names == ("cuda_ipc",)


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """What another thread or process brings about, looked at from outside."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def begun(push: Push) -> None:
    """The receiver has taken the writer in: from now on it has a part in how the lease ends."""
    await until(lambda: push._started_s is not None)


class Valve:
    """A TCP relay whose two directions can be held and let go: what is sent meanwhile waits."""

    def __init__(self) -> None:
        self.port = 0
        # Towards the server, and back.
        self.up, self.down = asyncio.Event(), asyncio.Event()
        self.up.set()
        self.down.set()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, is_open: asyncio.Event) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                await is_open.wait()
                target.write(data)
                await target.drain()
        target.close()

    @classmethod
    @contextlib.asynccontextmanager
    async def before(cls, address: str) -> AsyncIterator[Self]:
        """In front of a server, until the block is left; connections through it break then."""
        valve, tasks, writers = cls(), list[asyncio.Task[None]](), list[asyncio.StreamWriter]()
        host, port = address.rsplit(":", 1)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            from_server, to_server = await asyncio.open_connection(host, int(port))
            writers.extend((writer, to_server))
            for pump in (valve._pump(reader, to_server, valve.up), valve._pump(from_server, writer, valve.down)):
                tasks.append(asyncio.get_running_loop().create_task(pump))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        valve.port = server.sockets[0].getsockname()[1]
        try:
            yield valve
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            for writer in writers:
                writer.close()
            await asyncio.gather(*tasks, *(w.wait_closed() for w in writers), return_exceptions=True)


class Pair:
    def __init__(self, sender: Sender, receiver: Receiver, inbox: Inbox, source: Memory, target: Memory) -> None:
        self.sender, self.receiver, self.inbox = sender, receiver, inbox
        # Of the receiver's gRPC server.
        self.address = ""
        self.source_memory, self.target_memory = source, target
        self.source, self.target = look_into(source), look_into(target)

    def check_copied(
        self, source_layout: KvLayout, source_blocks: list[int], target_layout: KvLayout, target_blocks: tuple[int, ...]
    ) -> None:
        """The pairs of blocks are equal and every other target byte still is 0xEE."""
        size = source_layout.block_bytes
        touched = np.zeros(target_layout.total_bytes, dtype=bool)
        for layer in range(source_layout.num_layers):
            for src, dst in zip(source_blocks, target_blocks, strict=False):
                a, b = source_layout.offset(layer, src), target_layout.offset(layer, dst)
                assert np.array_equal(self.source[a : a + size], self.target[b : b + size]), (layer, src, dst)
                touched[b : b + size] = True
        assert (self.target[~touched] == 0xEE).all()


@contextlib.asynccontextmanager
async def pair(
    *,
    faults: Faults | None = None,
    sender_config: TransferConfig | None = None,
    receiver_config: TransferConfig | None = None,
    source_layout: KvLayout = LAYOUT,
    target_layout: KvLayout | None = None,
    alter_sender: dict[str, object] | None = None,
    source_on_device: bool | None = None,
    target_on_device: bool | None = None,
) -> AsyncIterator[Pair]:
    """Memory lies on fake devices if told so, or if a side can do nothing but cuda_ipc. ``faults``: of both ends."""
    if source_on_device is None:
        source_on_device = needs_device(sender_config) or needs_device(receiver_config)
    if target_on_device is None:
        target_on_device = needs_device(receiver_config)
    target_layout = target_layout or replace(source_layout, num_blocks=source_layout.num_blocks + 11)
    inbox = Inbox()
    server = grpc.aio.server(interceptors=[ErrorMappingInterceptor()])
    credentials = peer_credentials(OPEN if receiver_config is None else receiver_config.access)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    with (
        make_memory(source_layout.total_bytes, on_device=source_on_device, seed=1) as source,
        make_memory(target_layout.total_bytes, on_device=target_on_device, seed=2) as target,
    ):
        look_into(source)[:] = np.random.default_rng(0).integers(0, 256, source.num_bytes, dtype=np.uint8)
        look_into(target)[:] = 0xEE
        receiver = Receiver(
            describe("decode-0", target_layout, f"127.0.0.1:{port}"),
            target_layout,
            target,
            on_event=inbox,
            config=receiver_config,
            faults=faults,
        )
        node = replace(describe("prefill-0", source_layout), **(alter_sender or {}))
        sender = Sender(node, source_layout, source, faults=faults, config=sender_config)
        receiver.add_to(server)
        await receiver.start()
        await server.start()
        await sender.start()
        joined = Pair(sender, receiver, inbox, source, target)
        joined.address = f"127.0.0.1:{port}"
        try:
            yield joined
        finally:
            await sender.close()
            await receiver.close()
            await server.stop(0)
            del joined.source, joined.target
