"""Two processes, one of them killed: the other hears of it in less than a second and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict

import pytest

from baton.errors import NodeLost, TransferFailed
from baton.types import Lease
from kvtransfer.config import TransferConfig
from kvtransfer.protocol.lease import LeaseState
from kvtransfer.protocol.receiver import ReceiverConfig
from kvtransfer.protocol.receiver_events import Quarantined, Released
from kvtransfer.sender import Push, Sender
from tests.support.figures import figure
from tests.support.root import ROOT
from tests.support.transfer import LAYOUT, describe, make_memory, pair, token, until

WAYS = [("shm", "host"), ("tcp", "host"), ("tcp", "device"), ("cuda_ipc", "device")]
CHILD = "tests.support.transfer_child"
WITHIN_S = 1.0


class Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def read(self) -> dict[str, object]:
        assert self.process.stdout is not None
        async with asyncio.timeout(20):
            return json.loads(await self.process.stdout.readline())

    async def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        await self.process.stdin.drain()

    async def lease(self) -> Lease:
        await self.write("grant")
        while "block_ids" not in (values := await self.read()):
            pass  # An event of the lease before.
        return Lease(**{**values, "block_ids": tuple(values["block_ids"])})

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


@contextlib.asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[Child]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", CHILD, *arguments), stdin=pipe, stdout=pipe, cwd=ROOT
    )
    try:
        yield Child(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        process._transport.close()


@contextlib.asynccontextmanager
async def local_sender(config: TransferConfig, where: str) -> AsyncIterator[Sender]:
    with make_memory(LAYOUT.total_bytes, on_device=where == "device") as memory:
        sender = Sender(describe("prefill-0", LAYOUT), LAYOUT, memory, config=config)
        await sender.start()
        try:
            yield sender
        finally:
            await sender.close()


def begin(sender: Sender, lease: Lease) -> Push:
    push = sender.begin(lease, [3, 4], num_known_tokens=LAYOUT.block_tokens * 2)
    for layer in range(LAYOUT.num_layers):
        push.layer_ready(layer, 2)
    return push


@pytest.mark.parametrize(("transport", "where"), WAYS)
async def test_a_killed_sender_releases_its_lease(transport: str, where: str) -> None:
    async with pair(
        receiver_config=TransferConfig(transports=(transport,)),
        target_layout=LAYOUT,
        target_on_device=where == "device",
    ) as p:
        async with child("sender", where, f"fake:delay_s=30,over={transport}") as sender:
            await sender.write(json.dumps(asdict(p.receiver.grant("r", [1, 2], ttl_s=30))))
            assert await sender.read() == {"state": "writing"}
            await until(lambda: p.receiver._machine.state("r") is LeaseState.WRITING)
            killed_s = time.monotonic()
            await sender.kill()
            await p.inbox.wait(Released, "r", within_s=WITHIN_S)
            assert time.monotonic() - killed_s < WITHIN_S
        assert p.inbox.of("r") == ["Quarantined", "Released"]
        async with asyncio.timeout(WITHIN_S):
            await p.receiver._until(lambda: not p.receiver._machine.num_channels)


@pytest.mark.parametrize(("transport", "where"), WAYS)
async def test_a_stopped_writer_keeps_its_blocks_quarantined_until_it_is_gone(transport: str, where: str) -> None:
    """SIGSTOP: the process lives and could write on. Only what the receiver itself writes is safe to release."""
    config = TransferConfig(
        transports=(transport,), receiver=ReceiverConfig(revoke_timeout_s=0.2, heartbeat_s=0.1, max_missed_heartbeats=3)
    )
    slow = f"fake:delay_s=30,over={transport}"
    async with (
        pair(receiver_config=config, target_layout=LAYOUT, target_on_device=where == "device") as p,
        child("sender", where, slow) as sender,
    ):
        await sender.write(json.dumps(asdict(p.receiver.grant("r", [1, 2], ttl_s=30))))
        assert await sender.read() == {"state": "writing"}
        await until(lambda: p.receiver._machine.state("r") is LeaseState.WRITING)
        sender.process.send_signal(signal.SIGSTOP)
        p.receiver.revoke("r", "client left")
        await p.inbox.wait(Quarantined, "r")
        await asyncio.sleep(1.0)
        if transport != "tcp":
            assert p.inbox.of("r") == ["Quarantined"]
            await sender.kill()
        gone_s = time.monotonic()
        await p.inbox.wait(Released, "r", within_s=WITHIN_S)
        if transport != "tcp":
            figure(11, "end of a writer that could not be asked to its blocks free", time.monotonic() - gone_s)


@pytest.mark.parametrize(("transport", "where"), WAYS)
async def test_a_killed_receiver_fails_the_commit(transport: str, where: str) -> None:
    config = TransferConfig(transports=(f"fake:delay_s=0.3,over={transport}",))
    async with local_sender(config, where) as sender, child("receiver", where, transport, "0", "1") as receiver:
        await receiver.read()
        push = begin(sender, await receiver.lease())
        committing = asyncio.create_task(push.commit(token("seq1")))
        await asyncio.sleep(0.1)
        killed_s = time.monotonic()
        await receiver.kill()
        with pytest.raises((NodeLost, TransferFailed)):
            await committing
        assert time.monotonic() - killed_s < WITHIN_S


@pytest.mark.parametrize(("transport", "where"), WAYS)
async def test_a_restarted_receiver_on_the_same_port_is_another_node(transport: str, where: str) -> None:
    async with local_sender(TransferConfig(transports=(transport,)), where) as sender:
        async with child("receiver", where, transport, "0", "1") as receiver:
            port = str((await receiver.read())["port"])
            assert (await begin(sender, await receiver.lease()).commit(token("seq1"))).transport == transport
            stale = await receiver.lease()
            await receiver.kill()
        async with child("receiver", where, transport, port, "2") as receiver:
            await receiver.read()
            await asyncio.sleep(0.1)
            with pytest.raises(NodeLost, match="granted by incarnation 1 of decode-0, which is now 2"):
                await begin(sender, stale).commit(token("seq2"))
            fresh = await receiver.lease()
            assert fresh.incarnation == 2
            assert (await begin(sender, fresh).commit(token("seq1"))).transport == transport


async def test_a_stream_of_a_process_that_was_stopped_waits_for_its_event_loop_once_more() -> None:
    async with child("stopped") as stopped:
        # Stopped by itself; asyncio's watcher is told of the end alone.
        await asyncio.to_thread(os.waitid, os.P_PID, stopped.process.pid, os.WSTOPPED | os.WNOWAIT)
        await asyncio.sleep(3.0)
        stopped.process.send_signal(signal.SIGCONT)
        assert await stopped.read() == {"gone": [], "landed": [9]}
