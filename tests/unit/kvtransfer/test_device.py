"""KV on devices: fences of the computation, staging for sockets, and writers whose device outlives their socket."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from baton.errors import BadConfig, Incompatible, InternalError, NodeLost, TransferFailed
from kvtransfer import wire_codec
from kvtransfer.config import TransferConfig
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.devices.fake import FakeDevice, FakeEvent, FakeStream
from kvtransfer.devices.interface import Event
from kvtransfer.digest import LayerDigests
from kvtransfer.plan import ByteRange
from kvtransfer.protocol.receiver_events import Arrived, Released
from kvtransfer.sender import Sender
from kvtransfer.transports import cuda_ipc
from kvtransfer.transports.interface import PlaneEvents
from kvtransfer.transports.local_plane import TOKEN_BYTES
from tests.support.transfer import LAYOUT, Pair, describe, fake_device, host_memory, make_memory, pair, token, until

TOKEN = b"t" * TOKEN_BYTES
# Source and target on a device each, and tcp between a device and a host, which agree on the digest.
WAYS = [("cuda_ipc", True, True), ("tcp", True, True), ("tcp", True, False), ("tcp", False, True)]


def only(transport: str, **changes: object) -> TransferConfig:
    return TransferConfig(transports=(transport,), **changes)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> object:
    before = set(threading.enumerate())
    yield
    left = {t for t in threading.enumerate() if t.is_alive()} - before
    assert not {t.name for t in left if t.name.startswith("baton")}


async def hand_over(p: Pair, source_blocks: list[int], leased: list[int], *, num_tokens: int, name: str = "r") -> int:
    """Push and commit, part of each layer first; returns how many layers were sent again."""
    lease = p.receiver.grant(name, leased, ttl_s=30)
    push = p.sender.begin(lease, source_blocks, num_known_tokens=num_tokens)
    for num_blocks in (1, len(source_blocks)):
        for layer in range(LAYOUT.num_layers):
            await asyncio.to_thread(push.layer_ready, layer, num_blocks)
    report = await push.commit(token(name))
    await p.inbox.wait(Arrived, name)
    p.check_copied(p.sender._layout, source_blocks, p.receiver._layout, lease.block_ids)
    return report.retransmits


@pytest.mark.parametrize(("transport", "source_on_device", "target_on_device"), WAYS)
@pytest.mark.parametrize("layerwise_from_bytes", [0, 1 << 40])
@pytest.mark.parametrize("digest", [True, False])
async def test_bytes_arrive_in_the_leased_blocks_and_nowhere_else(
    transport: str, source_on_device: bool, target_on_device: bool, layerwise_from_bytes: int, digest: bool
) -> None:
    config = only(transport, layerwise_from_bytes={transport: layerwise_from_bytes}, digest=digest)
    async with pair(
        sender_config=config,
        receiver_config=config,
        source_on_device=source_on_device,
        target_on_device=target_on_device,
    ) as p:
        assert await hand_over(p, [5, 6, 7, 1, 30], [11, 10, 12, 13, 50], num_tokens=40) == 0


@pytest.mark.parametrize(("transport", "source_on_device", "target_on_device"), WAYS)
@pytest.mark.parametrize("mischief", ["corrupt=1", "corrupt=2,seed=5", "drop=1", "reorder=1,delay_s=0.01"])
async def test_damage_is_found_and_repaired(
    transport: str, source_on_device: bool, target_on_device: bool, mischief: str
) -> None:
    async with pair(
        sender_config=only(f"fake:{mischief},over={transport}", layerwise_from_bytes={transport: 0}),
        receiver_config=only(transport),
        source_on_device=source_on_device,
        target_on_device=target_on_device,
    ) as p:
        assert (await hand_over(p, [4, 2, 0], [1, 2, 3], num_tokens=24) > 0) == ("reorder" not in mischief)


# Two blocks make a segment: units begin inside one, and tcp has several to send while the next is gathered.
WIDE = replace(LAYOUT, num_kv_heads=16, head_dim=256, num_blocks=14)


@pytest.mark.parametrize(("transport", "source_on_device", "target_on_device"), WAYS)
async def test_several_segments(transport: str, source_on_device: bool, target_on_device: bool) -> None:
    config = only(transport, layerwise_from_bytes={transport: 0})
    async with pair(
        sender_config=config,
        receiver_config=config,
        source_layout=WIDE,
        source_on_device=source_on_device,
        target_on_device=target_on_device,
    ) as p:
        await hand_over(p, [9, 3, 4, 5, 13, 0, 1], [2, 1, 7, 8, 9, 11, 20], num_tokens=7 * WIDE.block_tokens)


@pytest.mark.parametrize("transport", ["cuda_ipc", "tcp"])
@pytest.mark.parametrize("is_waited_for", [True, False])
async def test_a_copy_waits_for_the_computation_of_its_layer(
    transport: str, is_waited_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys and values of a layer are queued on the device, held up, when the engine says that it is ready.

    Without the streams' waiting and the lanes' the same run has to give wrong bytes: shows that the test can fail.
    """
    gate = FakeEvent()
    if not is_waited_for:
        monkeypatch.setattr(FakeStream, "wait_for", lambda self, event: None)
        wait = FakeEvent.wait
        monkeypatch.setattr(FakeDevice, "fence", lambda self: _at_once())
    config = only(transport, layerwise_from_bytes={transport: 0})
    async with pair(sender_config=config, receiver_config=config, source_on_device=True, target_on_device=True) as p:
        device = fake_device(p.source_memory)
        compute = device.compute
        compute._put(lambda: wait(gate) if not is_waited_for else compute._wait_for(gate))
        lease = p.receiver.grant("r", [1, 2], ttl_s=30)
        push = p.sender.begin(lease, [4, 2], num_known_tokens=16)
        before = device.num_copies
        for layer in range(LAYOUT.num_layers):
            for block in (4, 2):
                address = p.source_memory.address + LAYOUT.offset(layer, block)
                compute.write(address, np.full(LAYOUT.block_bytes, 16 * layer + block, dtype=np.uint8))
            push.layer_ready(layer, 2)
        committing = asyncio.create_task(push.commit(token("r")))
        if is_waited_for:
            # Long enough for a lane to have queued its copies; the streams then stand still, or the test shows nothing.
            await until(lambda: device.num_asked > before)
            await asyncio.sleep(0.02)
            await asyncio.to_thread(lambda: [s.settle() for s in device._streams if s is not compute])
            assert device.num_copies == before, "a copy was carried out before its layer was computed"
            gate.set()
            await committing
            p.check_copied(LAYOUT, [4, 2], p.receiver._layout, lease.block_ids)
        else:
            await committing
            gate.set()
            await asyncio.to_thread(compute.settle)
            with pytest.raises(AssertionError):
                p.check_copied(LAYOUT, [4, 2], p.receiver._layout, lease.block_ids)


def _at_once() -> Event:
    event = FakeEvent()
    event.set()
    return event


@pytest.mark.parametrize("transport", ["cuda_ipc", "tcp"])
async def test_abort_returns_when_the_device_reads_no_more(transport: str) -> None:
    config = only(transport, layerwise_from_bytes={transport: 0})
    async with pair(sender_config=config, receiver_config=config, source_on_device=True, target_on_device=True) as p:
        device = fake_device(p.source_memory)
        gate = FakeEvent()
        device.compute.wait_for(gate)
        lease = p.receiver.grant("r", [1, 2], ttl_s=30)
        push = p.sender.begin(lease, [4, 2], num_known_tokens=16)
        for layer in range(LAYOUT.num_layers):
            push.layer_ready(layer, 2)
        await until(lambda: device.num_asked > 0)
        aborting = asyncio.create_task(push.abort("client left"))
        await asyncio.sleep(0.05)
        assert not aborting.done(), "copies are queued that will read the blocks"
        assert p.inbox.of("r") == [], "the lease may be written into"
        gate.set()
        await aborting
        copies = device.num_copies
        p.source[:] = 0
        await p.inbox.wait(Released, "r")
        await asyncio.to_thread(device.settle)
        assert device.num_copies == copies


@pytest.mark.parametrize(("transport", "source_on_device", "target_on_device"), WAYS[:2])
@pytest.mark.parametrize("end", ["source", "target"])
async def test_a_device_that_fails_fails_the_push(
    transport: str, source_on_device: bool, target_on_device: bool, end: str
) -> None:
    config = only(transport, layerwise_from_bytes={transport: 0})
    async with pair(sender_config=config, receiver_config=config, source_on_device=True, target_on_device=True) as p:
        memory = p.source_memory if end == "source" else p.target_memory
        fake_device(memory).fail_at = 2
        with pytest.raises((TransferFailed, InternalError, NodeLost)):
            await hand_over(p, [4, 2, 0], [1, 2, 3], num_tokens=24)
        await p.inbox.wait(Released, "r")
        assert "Arrived" not in p.inbox.of("r")


async def test_neighbours_whose_devices_reach_each_other_take_cuda_ipc_and_others_tcp() -> None:
    async with pair(source_on_device=True, target_on_device=True) as p:
        await hand_over(p, [4], [1], num_tokens=8)
        assert next(iter(p.sender._peers.values())).connection.transport.name == "cuda_ipc"
    async with pair(source_on_device=True, target_on_device=True) as p:
        fake_device(p.source_memory).reachable_ids = ("another",)
        await hand_over(p, [4], [1], num_tokens=8)
        assert next(iter(p.sender._peers.values())).connection.transport.name == "tcp"


def test_the_choice_of_transport() -> None:
    here, there = describe("a", LAYOUT), replace(describe("b", LAYOUT), host_id="elsewhere")
    both = TransferConfig(transports=("cuda_ipc", "tcp")).by_name
    choose = wire_codec.choose_transport
    assert choose(here, here, [*both], both, can_reach_memory=True).name == "cuda_ipc"
    assert choose(here, here, [*both], both).name == "tcp"
    assert choose(here, there, [*both], both, can_reach_memory=True).name == "tcp"
    with pytest.raises(Incompatible, match="none of them connects"):
        choose(here, here, ["cuda_ipc"], only("cuda_ipc").by_name)


def test_a_transport_that_does_not_reach_the_memory_is_refused_at_the_start() -> None:
    with make_memory(LAYOUT.total_bytes, on_device=True) as memory, pytest.raises(BadConfig, match="on a device"):
        Sender(describe("a", LAYOUT), LAYOUT, memory, config=only("shm"))
    with make_memory(LAYOUT.total_bytes, on_device=False) as memory, pytest.raises(BadConfig, match="in host memory"):
        Sender(describe("a", LAYOUT), LAYOUT, memory, config=only("cuda_ipc"))


def test_the_digest_of_a_device_is_that_of_the_same_bytes_on_the_host() -> None:
    blocks = [3, 9, 4, 5, 13]
    with make_memory(WIDE.total_bytes, on_device=True) as memory:
        seen = fake_device(memory).bytes_at(memory.address, memory.num_bytes)
        seen[:] = np.random.default_rng(5).integers(0, 256, seen.nbytes, dtype=np.uint8)
        for num_blocks in (1, 2, 5):
            on_device, on_host = (LayerDigests(m, WIDE, blocks) for m in (memory, host_memory(seen)))
            for layer in range(WIDE.num_layers):
                assert on_device.layer_digest(layer, num_blocks) == on_host.layer_digest(layer, num_blocks)


def test_staging_is_used_again_and_never_by_two_threads() -> None:
    device = FakeDevice(max_delay_s=0.001)
    with DeviceMemory.create(1 << 20, device) as memory:
        with memory.staging() as one, memory.staging() as other:
            assert one is not other
        with memory.staging() as again, memory.staging():
            assert again in (one, other)
            assert memory.hash(0, [[ByteRange(0, 10)]])
        num_regions = device.num_regions
        for _ in range(5):
            memory.hash(0, [[ByteRange(0, 1 << 20)]])
        assert device.num_regions == num_regions + 2, "one that is larger"
    device.shut_down()


def events(gone: list[int]) -> PlaneEvents:
    def ignore(*_: object) -> None:
        pass

    return PlaneEvents(gone.append, ignore, ignore, ignore, ignore, None)


class _Plane:
    """A receiver's plane, and a process that connects to it and then does as it is told."""

    SCRIPT = """
import socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.connect("\\0" + sys.argv[1])
connection.sendall(bytes.fromhex(sys.argv[2]))
print(len(connection.recv(1000)), flush=True)
connection.sendall(bytes.fromhex(sys.stdin.readline()))
connection.close()
print("closed", flush=True)
sys.stdin.readline()
"""

    def __init__(self, plane: cuda_ipc.CudaIpcPlane, gone: list[int], process: asyncio.subprocess.Process) -> None:
        self.plane, self.gone, self.process = plane, gone, process

    async def tell(self, line: bytes) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + b"\n")
        return await self.process.stdout.readline()


@pytest.fixture
async def plane() -> object:
    device = FakeDevice()
    memory = DeviceMemory.create(4096, device)
    gone: list[int] = []
    receiver = cuda_ipc.CudaIpcPlane(memory, events(gone))
    await receiver.start()
    receiver.offer(1, TOKEN)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _Plane.SCRIPT, receiver.endpoint, TOKEN.hex(), stdin=pipe, stdout=pipe
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"72\n"
    yield _Plane(receiver, gone, process)
    if process.returncode is None:
        process.kill()
        await process.wait()
    process._transport.close()
    await receiver.close()
    memory.close()
    device.shut_down()


async def test_a_writer_that_closed_its_socket_without_a_word_is_gone_only_when_its_process_is(plane: _Plane) -> None:
    assert await plane.tell(b"") == b"closed\n"
    await asyncio.sleep(0.1)
    assert plane.gone == [], "its device may still be writing"
    plane.plane.drop(1)
    await asyncio.sleep(0.05)
    assert plane.gone == [], "nor does the loss of its channel say anything"
    plane.process.kill()
    await until(lambda: bool(plane.gone))
    assert plane.gone == [1]
    assert not plane.plane._writers


async def test_a_writer_that_said_so_is_gone_with_its_socket(plane: _Plane) -> None:
    assert await plane.tell(cuda_ipc._LET_GO.hex().encode()) == b"closed\n"
    await until(lambda: bool(plane.gone))
    assert plane.gone == [1]


async def test_a_receiver_without_a_handle_hands_nothing_over() -> None:
    class Unshareable(FakeDevice):
        def export(self, address: int) -> bytes:
            raise TransferFailed("not supported here")

    device = Unshareable()
    memory = DeviceMemory.create(4096, device)
    gone: list[int] = []
    receiver = cuda_ipc.CudaIpcPlane(memory, events(gone))
    await receiver.start()
    receiver.offer(1, TOKEN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(f"\0{receiver.endpoint}")
        peer.sendall(TOKEN)
        assert await asyncio.to_thread(peer.recv, 10) == b""
    assert gone == [1]
    await receiver.close()
    memory.close()
    device.shut_down()


def test_a_fake_handle_opens_in_the_process_that_gave_it() -> None:
    device = FakeDevice()
    mine = device.allocate(4096)
    theirs = device.open(device.export(mine), 4096)
    device.bytes_at(theirs, 4096)[:] = 7
    assert (device.bytes_at(mine, 4096) == 7).all()
    with pytest.raises(InternalError, match="no allocation"):
        device.bytes_at(mine + 1, 4096)
    with pytest.raises(TransferFailed, match="cannot open"):
        device.open(os.urandom(0).ljust(64, b"\0"), 4096)
    device.close(theirs)
    device.free(mine)
    device.shut_down()
