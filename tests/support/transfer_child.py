"""One end of a transfer in a process of its own, to be killed. Speaks JSON lines on stdin and stdout.

``sender WHERE SPEC`` reads one lease and writes into it for ever; ``receiver WHERE TRANSPORT PORT INCARNATION``
grants a lease for every line and reports what arrived. WHERE the KV lies: ``host`` or ``device``.
``stopped`` stops itself while a stream's thread waits for its event loop, and reports whether the stream lives on.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from dataclasses import asdict

import grpc.aio

from baton.server import ErrorMappingInterceptor
from baton.types import Lease
from kvtransfer.config import TransferConfig
from kvtransfer.protocol.receiver_events import LeaseNotice, WriterBegan
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.transports import tcp_socket as tcp
from kvtransfer.transports.interface import PlaneEvents, PlaneSite
from kvtransfer.transports.tcp_receiver import TcpPlane
from tests.support.transfer import LAYOUT, describe, make_memory, token, until


def say(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def read_line() -> str:
    return await asyncio.to_thread(sys.stdin.readline)


async def run_sender(spec: str, *, on_device: bool) -> None:
    with make_memory(LAYOUT.total_bytes, on_device=on_device) as memory:
        config = TransferConfig(transports=(spec,), layerwise_from_bytes={})
        sender = Sender(describe("prefill-0", LAYOUT), LAYOUT, memory, config=config)
        await sender.start()
        values = json.loads(await read_line())
        values["block_ids"] = tuple(values["block_ids"])
        lease = Lease(**values)
        push = sender.begin(lease, range(len(lease.block_ids)), num_known_tokens=LAYOUT.block_tokens * 2)
        for layer in range(LAYOUT.num_layers):
            push.layer_ready(layer, 2)
        async with asyncio.TaskGroup() as group:
            group.create_task(push.commit(token(lease.sequence_id)))
            while push._started_s is None:  # noqa: ASYNC110 - a look from outside
                await asyncio.sleep(0.01)
            say(state="writing")


async def run_receiver(transport: str, port: int, incarnation: int, *, on_device: bool) -> None:
    def on_event(notice: LeaseNotice) -> None:
        if not isinstance(notice, WriterBegan):
            say(event=type(notice).__name__, sequence_id=notice.sequence_id)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)], interceptors=[ErrorMappingInterceptor()])
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    with make_memory(LAYOUT.total_bytes, on_device=on_device) as memory:
        node = describe("decode-0", LAYOUT, f"127.0.0.1:{port}", incarnation)
        config = TransferConfig(transports=(transport,))
        receiver = Receiver(node, LAYOUT, memory, on_event=on_event, config=config)
        receiver.add_to(server)
        await receiver.start()
        await server.start()
        say(state="ready", port=port)
        number = 0
        while await read_line():
            number += 1
            say(**asdict(receiver.grant(f"seq{number}", range(number * 2, number * 2 + 2), ttl_s=30)))
        await receiver.close()
        await server.stop(0)


async def run_stopped() -> None:
    gone, landed = list[int](), list[int]()
    events = PlaneEvents(
        writer_gone=gone.append,
        wrote=lambda *_: None,
        quiet=lambda _: None,
        data_came=lambda channel, epoch: plane.open_epoch(channel, epoch, (0,)),
        strayed=lambda *_: None,
        landed=lambda epoch, *_: landed.append(epoch),
    )
    with make_memory(LAYOUT.total_bytes, on_device=False) as memory:
        plane = TcpPlane(PlaneSite(memory, LAYOUT, "127.0.0.1", "", events), open_timeout_s=1.0)
        await plane.start()
        plane.offer(1, b"t" * 32)
        host, port = plane.endpoint.split(":")
        with await asyncio.to_thread(socket.create_connection, (host, int(port)), 5) as stream:
            stream.sendall(tcp.PREAMBLE.pack(tcp.MAGIC, b"t" * 32, 0))
            assert await asyncio.to_thread(stream.recv, 1) == tcp.READY
            payload = bytes(LAYOUT.block_bytes)
            stream.sendall(tcp.FRAME.pack(9, 0, 1, 0, 1, len(payload)) + payload)
            # The event loop does not turn; the thread that has the frame waits for it.
            time.sleep(0.2)  # noqa: ASYNC251
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.3)  # noqa: ASYNC251
            await until(lambda: bool(gone or landed))
            say(gone=gone, landed=landed)
        await plane.close()


if __name__ == "__main__":
    if sys.argv[1] == "stopped":
        asyncio.run(run_stopped())
    elif sys.argv[1] == "sender":
        asyncio.run(run_sender(sys.argv[3], on_device=sys.argv[2] == "device"))
    else:
        port, incarnation = int(sys.argv[4]), int(sys.argv[5])
        asyncio.run(run_receiver(sys.argv[3], port, incarnation, on_device=sys.argv[2] == "device"))
