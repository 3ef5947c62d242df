"""Transfer figures: GB/s per transport beside its limit, cost of the digest, exposed tail of layer-wise pushes.

    python -m bench transfer [--quick]

Sender and receiver are two processes; a push is timed until the receiver has verified it and taken it over. Every round
runs each contender once, next to a memcpy of the same bytes, next to the same copy with a digest of source and target
by two threads without a protocol ("bound"), and (for tcp) next to a bare sendmsg/recv_into loop over as many streams.
"tcp, TLS" is the same over encrypted streams.
Figures are medians over the rounds and ratios are medians of the per-round ratios, because memory bandwidth drifts from
minute to minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc.aio
import numpy as np

from baton import PROTOCOL_VERSION
from baton.access import AccessConfig
from baton.channels import peer_credentials
from baton.server import ErrorMappingInterceptor
from baton.types import KvLayout, Lease, ModelDescription, NodeDescription, Role, TokenChunk, TransferReport
from bench.transfer_trips import small
from cli import certs
from kvtransfer.config import TransferConfig
from kvtransfer.digest import LayerDigests
from kvtransfer.hashing import ByteArray
from kvtransfer.host import host_id, keep_apart
from kvtransfer.memory import HostMemory
from kvtransfer.plan import Copy
from kvtransfer.protocol.receiver_events import Arrived, LeaseNotice, Released, WriterBegan
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.transports.tcp_socket import receive_all, send_all

# The bench model in bfloat16: 64 KiB a block and layer, 16 KiB a token.
LAYOUT = KvLayout(num_layers=16, num_blocks=160, num_kv_heads=4, head_dim=64, block_tokens=64, dtype="bfloat16")
BULK_TOKENS = 8192
BULK_BYTES = BULK_TOKENS // LAYOUT.block_tokens * LAYOUT.block_bytes * LAYOUT.num_layers
STREAMS = 2
BARE_MESSAGE_BYTES = 2 << 20
# The rate of the CPU engine on the bench model; sets the duration of a layer in the layer-wise runs.
PREFILL_TOKENS_PER_S = 1500
PLAIN = {
    "shm": TransferConfig(transports=("shm",), digest=True),
    "shm, no digest": TransferConfig(transports=("shm",), digest=False),
    "tcp": TransferConfig(transports=("tcp",), digest=True, tcp_streams=STREAMS),
    "tcp, no digest": TransferConfig(transports=("tcp",), digest=False, tcp_streams=STREAMS),
}
SERIALIZED = {"shm": 1 << 60, "tcp": 1 << 60}
LAYERWISE = {"shm": 0, "tcp": 0}


def variants(folder: Path) -> Mapping[str, TransferConfig]:
    """With the encrypted one, by the certificates in the folder."""
    cert = folder / "127.0.0.1.pem"
    access = AccessConfig(tls_cert=cert, tls_key=cert.with_suffix(".key"), tls_ca=folder / certs.CA_CERT)
    return {**PLAIN, "tcp, TLS": replace(PLAIN["tcp"], access=access)}


def describe(name: str, address: str) -> NodeDescription:
    return NodeDescription(
        node_id=name.replace(", ", "-").replace(" ", "-"),
        incarnation=1,
        home_role=Role.MIXED,
        address=address,
        model=ModelDescription("bench", "bench", LAYOUT.dtype, 32768, 32000),
        kv_layout=LAYOUT,
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        host_id=host_id(),
        transports=("shm", "tcp"),
        device="cpu",
        kernels="cpu",
        software_version="bench",
    )


def as_bytes(memory: HostMemory) -> ByteArray:
    return np.frombuffer(memory.buffer, dtype=np.uint8)


# --- the receiving process --------------------------------------------------------------------------------------------


def serve_bare(listener: socket.socket, target: memoryview) -> None:
    """Fill the target from STREAMS connections, a part each, repeatedly; acknowledge each part."""
    part = len(target) // STREAMS

    def fill(connection: socket.socket, number: int) -> None:
        mine = target[number * part : (number + 1) * part]
        while receive_all(connection, [mine[i : i + BARE_MESSAGE_BYTES] for i in range(0, part, BARE_MESSAGE_BYTES)]):
            connection.sendall(b"\1")
        connection.close()

    for number in range(STREAMS):
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=fill, args=(connection, number), daemon=True).start()


async def receive(folder: Path) -> None:
    """A receiver for every variant over one memory; a line "variant num_tokens" on stdin grants a lease."""
    with (
        HostMemory.create(LAYOUT.total_bytes, prefault_pages=True) as memory,
        socket.create_server(("127.0.0.1", 0)) as bare,
    ):
        threading.Thread(target=serve_bare, args=(bare, memory.buffer[:BULK_BYTES]), daemon=True).start()
        receivers: dict[str, Receiver] = {}
        servers = []

        def on_event(notice: LeaseNotice) -> None:
            assert isinstance(notice, WriterBegan | Arrived | Released), notice

        for name, config in variants(folder).items():
            server = grpc.aio.server(interceptors=[ErrorMappingInterceptor()])
            credentials = peer_credentials(config.access)
            if credentials is None:
                address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            else:
                address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
            receiver = Receiver(describe(name, address), LAYOUT, memory, on_event=on_event, config=config)
            receiver.add_to(server)
            await receiver.start()
            await server.start()
            receivers[name] = receiver
            servers.append(server)
        print(json.dumps(bare.getsockname()[1]), flush=True)
        number = 0
        while line := await asyncio.to_thread(sys.stdin.readline):
            name, num_tokens = line.rsplit(" ", 1)
            number += 1
            lease = receivers[name].grant(f"seq{number}", range(LAYOUT.blocks_for(int(num_tokens))), ttl_s=120)
            print(json.dumps(asdict(lease)), flush=True)
        for receiver in receivers.values():
            await receiver.close()
        for server in servers:
            await server.stop(0)


# --- the sending process ----------------------------------------------------------------------------------------------


class Peer:
    """The receiving process as the sender sees it."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.transfer", "--receive", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.bare_port = int(self._read())
        self.bare = [socket.create_connection(("127.0.0.1", self.bare_port)) for _ in range(STREAMS)]
        for connection in self.bare:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def lease(self, variant: str, num_tokens: int) -> Lease:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{variant} {num_tokens}\n")
        self.process.stdin.flush()
        values = json.loads(self._read())
        return Lease(**{**values, "block_ids": tuple(values["block_ids"])})

    def bare_send(self, source: memoryview) -> float:
        part = len(source) // STREAMS

        def push(number: int) -> None:
            mine = source[number * part : (number + 1) * part]
            send_all(self.bare[number], [mine[i : i + BARE_MESSAGE_BYTES] for i in range(0, part, BARE_MESSAGE_BYTES)])
            self.bare[number].recv(1)

        threads = [threading.Thread(target=push, args=(i,)) for i in range(STREAMS)]
        started_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started_s

    def close(self) -> None:
        for connection in self.bare:
            connection.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Bench:
    def __init__(
        self, peer: Peer, memory: HostMemory, copy_target: ByteArray, senders: dict[str, dict[str, Sender]]
    ) -> None:
        self.peer, self.senders = peer, senders
        self.source = as_bytes(memory)[:BULK_BYTES]
        self.copy_target = copy_target

    def memcpy(self) -> float:
        started_s = time.perf_counter()
        np.copyto(self.copy_target, self.source)
        return time.perf_counter() - started_s

    def bound(self) -> float:
        """Copy, digest of the source and, on the other thread, of the target: the minimum work of two cores."""
        layout = replace(LAYOUT, num_blocks=BULK_TOKENS // LAYOUT.block_tokens)
        blocks = range(layout.num_blocks)
        host = HostMemory(self.source.data)
        source = LayerDigests(host, layout, blocks)
        target = LayerDigests(HostMemory(self.copy_target.data), layout, blocks)
        is_copied = threading.Barrier(2)

        def work(number: int, mine: range, others: range) -> None:
            keep_apart(number)
            for layer in mine:
                offset, stop = layout.offset(layer, 0), layout.offset(layer, layout.num_blocks)
                whole = Copy(offset, offset, stop - offset)
                if not source.copy(host, layer, 0, layout.num_blocks, [whole], self.copy_target):
                    np.copyto(self.copy_target[offset:stop], self.source[offset:stop])
                    source.update(layer, 0, layout.num_blocks)
            is_copied.wait()
            for layer in others:
                target.update(layer, 0, layout.num_blocks)

        halves = range(layout.num_layers // 2), range(layout.num_layers // 2, layout.num_layers)
        threads = [threading.Thread(target=work, args=(i, halves[i], halves[1 - i])) for i in range(2)]
        started_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started_s

    async def push(
        self, variant: str, mode: str, num_tokens: int, compute: Callable[[], None] | None = None
    ) -> tuple[float, TransferReport]:
        """Seconds from the first layer's computation to the acknowledgement, and the report."""
        lease = self.peer.lease(variant, num_tokens)
        num_blocks = LAYOUT.blocks_for(num_tokens)
        push = self.senders[mode][variant].begin(lease, range(num_blocks), num_known_tokens=num_tokens)
        await asyncio.sleep(0.02)  # Begun comes while the prompt is computed.

        def engine() -> None:
            for layer in range(LAYOUT.num_layers):
                if compute is not None:
                    compute()
                push.layer_ready(layer, num_blocks)

        started_s = time.perf_counter()
        if compute is None:
            engine()
        else:
            await asyncio.to_thread(engine)
        report = await push.commit(TokenChunk(lease.sequence_id, 0, (1,)))
        return time.perf_counter() - started_s, report


@dataclass(frozen=True)
class Row:
    name: str
    gb_per_s: float
    # Ratios to memcpy, to copy with both digests, and to the bare loop of the same round.
    ratio_memcpy: float
    ratio_bound: float
    ratio_bare: float | None


async def bulk(bench: Bench, rounds: int) -> tuple[list[Row], dict[str, float]]:
    names = list(bench.senders["layerwise"])
    seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", "bound", "bare tcp", *names)}
    for index in range(rounds + 1):
        found = {"memcpy": bench.memcpy(), "bound": bench.bound()}
        found["bare tcp"] = await asyncio.to_thread(bench.peer.bare_send, bench.source.data)
        turn = index % len(names)
        for variant in names[turn:] + names[:turn]:  # The order rotates.
            found[variant], _ = await bench.push(variant, "layerwise", BULK_TOKENS)
        if index:  # The first round warms up pages and connections.
            for name, value in found.items():
                seconds[name].append(value)

    def ratio(name: str, to: str) -> float:
        return statistics.median(limit / value for limit, value in zip(seconds[to], seconds[name], strict=True))

    rows = []
    for name, values in seconds.items():
        rate = BULK_BYTES / statistics.median(values) / 1e9
        bare = ratio(name, "bare tcp") if "tcp" in name else None
        rows.append(Row(name, rate, ratio(name, "memcpy"), ratio(name, "bound"), bare))
    cost = {}
    for name in ("shm", "tcp"):
        pairs = zip(seconds[name], seconds[f"{name}, no digest"], strict=True)
        cost[name] = statistics.median(1 - without / with_digest for with_digest, without in pairs)
    return rows, cost


def make_compute(seconds: float) -> Callable[[], None]:
    """Matrix products on one core that take as long as a layer of this many tokens."""
    a = np.ones((256, 256), dtype=np.float32)
    out = np.empty_like(a)
    np.matmul(a, a, out=out)
    started_s = time.perf_counter()
    for _ in range(50):
        np.matmul(a, a, out=out)
    count = max(1, round(seconds / ((time.perf_counter() - started_s) / 50)))

    def compute() -> None:
        for _ in range(count):
            np.matmul(a, a, out=out)

    return compute


async def layerwise(bench: Bench, rounds: int, sizes: list[int]) -> list[dict[str, float | str]]:
    """Layer-wise beside serialized beside no transfer, per prompt length."""
    rows: list[dict[str, float | str]] = []
    for variant in ("shm", "tcp"):
        for num_tokens in sizes:
            compute = make_compute(num_tokens / PREFILL_TOKENS_PER_S / LAYOUT.num_layers)
            found: dict[str, list[float]] = {key: [] for key in ("alone", "total", "exposed", "total 1", "exposed 1")}
            for _ in range(rounds):
                started_s = time.perf_counter()
                for _ in range(LAYOUT.num_layers):
                    await asyncio.to_thread(compute)
                found["alone"].append(time.perf_counter() - started_s)
                for mode, suffix in (("layerwise", ""), ("serialized", " 1")):
                    total_s, report = await bench.push(variant, mode, num_tokens, compute)
                    found["total" + suffix].append(total_s)
                    found["exposed" + suffix].append(report.exposed_s)
            median = {key: statistics.median(values) * 1e3 for key, values in found.items()}
            rows.append(
                {
                    "transport": variant,
                    "num_tokens": num_tokens,
                    "num_bytes": LAYOUT.blocks_for(num_tokens) * LAYOUT.block_bytes * LAYOUT.num_layers,
                    "compute_alone_ms": median["alone"],
                    "layerwise_total_ms": median["total"],
                    "serialized_total_ms": median["total 1"],
                    "layerwise_exposed_ms": median["exposed"],
                    "serialized_exposed_ms": median["exposed 1"],
                }
            )
    return rows


async def measured(rounds: int, sizes: list[int], folder: Path) -> dict[str, object]:
    certs.make(folder, ["127.0.0.1"], 1)
    peer = Peer(folder)
    senders: dict[str, dict[str, Sender]] = {"layerwise": {}, "serialized": {}}
    with HostMemory.create(LAYOUT.total_bytes, prefault_pages=True) as memory:
        as_bytes(memory)[:] = np.random.default_rng(0).integers(0, 256, memory.num_bytes, dtype=np.uint8)
        for mode, table in (("layerwise", LAYERWISE), ("serialized", SERIALIZED)):
            for name, config in variants(folder).items():
                node = describe(f"sender-{mode}-{name}", "")
                sender = Sender(node, LAYOUT, memory, config=replace(config, layerwise_from_bytes=table))
                await sender.start()
                senders[mode][name] = sender
        with HostMemory.create(BULK_BYTES, prefault_pages=True) as copy_memory:
            bench = Bench(peer, memory, as_bytes(copy_memory), senders)
            try:
                bulk_rows, digest_cost = await bulk(bench, rounds)
                tails = await layerwise(bench, max(3, rounds // 2), sizes)
            finally:
                for senders_of_mode in senders.values():
                    for sender in senders_of_mode.values():
                        await sender.close()
                peer.close()
                del bench
    return {
        "layout": asdict(LAYOUT),
        "rounds": rounds,
        "bulk_bytes": BULK_BYTES,
        "streams": STREAMS,
        "bulk": [asdict(row) for row in bulk_rows],
        "digest_cost_of_bulk": digest_cost,
        "layerwise": tails,
        "one block over tcp": await small(3 * rounds),
    }


def run(quick: bool) -> dict[str, object]:
    """The entry for ``python -m bench transfer``."""
    sizes = [64, 512] if quick else [64, 128, 256, 512, 1024, 2048]
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        return asyncio.run(measured(3 if quick else 9, sizes, Path(folder)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--receive"]:
        asyncio.run(receive(Path(sys.argv[2])))
    else:
        print(json.dumps(run("--quick" in sys.argv), indent=1))
