"""How long one block takes from begin to acknowledgement over tcp, by the round-trip time between the two nodes.

Both ends are in this process; what they say passes through relays that hold every byte for half a round trip, on the
control and on the data connections. The connection is warm, as it is between nodes that know each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace

import grpc.aio

from baton import PROTOCOL_VERSION
from baton.server import ErrorMappingInterceptor
from baton.types import KvLayout, ModelDescription, NodeDescription, Role, TokenChunk
from kvtransfer.config import TransferConfig
from kvtransfer.host import host_id
from kvtransfer.memory import HostMemory
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender

# 8 KiB a block and layer: a short prompt of a small model, far below what fits a congestion window.
LAYOUT = KvLayout(num_layers=4, num_blocks=64, num_kv_heads=2, head_dim=32, block_tokens=32, dtype="bfloat16")
ROUND_TRIPS_S = (0.0, 0.02, 0.2)
# Relays and nodes listen on the same ports of two loopback addresses, so that advertised ports hold for both.
_NODE_HOST, _RELAY_HOST = "127.0.0.1", "127.0.0.2"


class Relay:
    """Passes bytes on, each ``delay_s`` after it came."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    async def before(self, port: int) -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, to_node = await asyncio.open_connection(_NODE_HOST, port)
            self._spawn(self._pump(reader, to_node))
            self._spawn(self._pump(there, writer))

        self._servers.append(await asyncio.start_server(accept, _RELAY_HOST, port))

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                if self._delay_s:
                    loop.call_later(self._delay_s, target.write, data)
                else:
                    target.write(data)
        loop.call_later(self._delay_s, target.close)

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _describe(node_id: str, address: str) -> NodeDescription:
    return NodeDescription(
        node_id=node_id,
        incarnation=1,
        home_role=Role.MIXED,
        address=address,
        model=ModelDescription("bench", "bench", LAYOUT.dtype, 32768, 32000),
        kv_layout=LAYOUT,
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        host_id=host_id(),
        transports=("tcp",),
        device="cpu",
        kernels="cpu",
        software_version="bench",
    )


@contextlib.asynccontextmanager
async def _joined(delay_s: float) -> AsyncIterator[tuple[Sender, Receiver, str]]:
    config = TransferConfig(transports=("tcp",), tcp_listen_host=_NODE_HOST)
    server = grpc.aio.server(interceptors=[ErrorMappingInterceptor()])
    port = server.add_insecure_port(f"{_NODE_HOST}:0")
    relay = Relay(delay_s)
    with HostMemory.create(LAYOUT.total_bytes) as source, HostMemory.create(LAYOUT.total_bytes) as target:
        node = _describe("decode-0", f"{_RELAY_HOST}:{port}")
        receiver = Receiver(node, LAYOUT, target, on_event=lambda _: None, config=config)
        sender = Sender(_describe("prefill-0", ""), LAYOUT, source, config=config)
        receiver.add_to(server)
        await receiver.start()
        await server.start()
        await sender.start()
        await relay.before(port)
        await relay.before(int(receiver.endpoints["tcp"].rpartition(":")[2]))
        try:
            yield sender, receiver, node.address
        finally:
            await sender.close()
            await receiver.close()
            await server.stop(0)
            await relay.close()


async def small(rounds: int) -> list[dict[str, float]]:
    """Medians for one block, in ms."""
    rows = []
    for round_trip_s in ROUND_TRIPS_S:
        seconds = []
        async with _joined(round_trip_s / 2) as (sender, receiver, address):
            for number in range(rounds + 1):
                name = f"seq{number}"
                lease = replace(receiver.grant(name, [number % LAYOUT.num_blocks], ttl_s=60), address=address)
                started_s = time.perf_counter()
                push = sender.begin(lease, [0], num_known_tokens=1)
                for layer in range(LAYOUT.num_layers):
                    push.layer_ready(layer, 1)
                await push.commit(TokenChunk(name, 0, (1,)))
                if number:  # The first one connects.
                    seconds.append(time.perf_counter() - started_s)
        rows.append({"round_trip_ms": round_trip_s * 1e3, "one_block_ms": statistics.median(seconds) * 1e3})
    return rows
