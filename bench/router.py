"""The cost of the router: added time to first token, CPU per streamed token, memory per open stream.

Four processes: fake nodes that compute nothing, the router, a bare gRPC server, and this one as the client. Added TTFT
is the median through one face of the router minus the median of asking a fake prefill node over an open session,
interleaved. So it consists of the client's own call, the round trip of the reservation, and the router. The cost of the
gRPC call itself is measured with the bare server: the same two messages, sent at once. HTTP is measured over kept
connections, as clients use it, and over new ones. Throughput is per CPU second of the router process, so that load of
other processes affects it little. Placement is measured alone (`bench.placement`), by the number of nodes.

    python -m bench router
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tokenizers
from grpc import aio
from tokenizers import decoders, models, pre_tokenizers, trainers

from baton import AsyncClient, codec
from baton.client import Delta
from baton.types import SamplingParams, SequenceSpec
from baton.v1 import node_pb2, node_pb2_grpc, router_pb2, router_pb2_grpc
from bench import placement
from router.config import LimitsConfig, RouterConfig
from router.nodes.sessions import hello
from router.serve import serve

_VOCAB_SIZE = 512
_PROMPT = list(range(100, 228))
_LAST_CHUNK = b"0\r\n\r\n"


def run(quick: bool) -> dict[str, Any]:
    """All measurements; quick uses a tenth of the load."""
    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(Path(folder) / "model")
        return asyncio.run(_measure(Path(folder), 0.1 if quick else 1.0))


def main() -> None:
    """The child processes of this bench: the router, or a server that only answers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve")
    parser.add_argument("--bare", action="store_true")
    options = parser.parse_args()
    asyncio.run(_serve_bare() if options.bare else _serve(json.loads(options.serve)))


# ── Processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def _serve(settings: dict[str, Any]) -> None:
    """The router process."""
    limits = LimitsConfig(max_queued=4096)
    config = RouterConfig(
        nodes=tuple(settings["nodes"]), model_folder=Path(settings["folder"]), ready_needs_nodes=True,
        ready_file=Path(settings["ready_file"]), limits=limits,
    )  # fmt: skip
    stop = asyncio.Event()

    async def until_input_closes() -> None:
        await asyncio.to_thread(sys.stdin.read)
        stop.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(until_input_closes())
        await serve(config, stop)


class _BareService(router_pb2_grpc.RouterServicer):
    """Answers Generate at once: the cost of any gRPC answer."""

    async def Generate(  # noqa: N802
        self, request: router_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        accepted = router_pb2.GenerateResponse.Accepted(
            request_id="bare", model="bare", prompt_token_ids=request.prompt_token_ids.token_ids
        )
        yield router_pb2.GenerateResponse(accepted=accepted)
        yield router_pb2.GenerateResponse(delta=router_pb2.GenerateResponse.Delta(text="a", token_ids=[1]))


async def _serve_bare() -> None:
    server = aio.server()
    router_pb2_grpc.add_RouterServicer_to_server(_BareService(), server)  # type: ignore[abstract]
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


@contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A child that ends when its input closes."""
    child = subprocess.Popen(
        [sys.executable, "-m", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.close()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


class _Cluster:
    """Fake nodes, a router and a bare server, as processes."""

    def __init__(self, http: str, grpc: str, bare: str, nodes: list[str], router: psutil.Process) -> None:
        self.host, port = http.removeprefix("http://").split(":")
        self.port = int(port)
        self.grpc = grpc
        self.bare = bare
        self.nodes = nodes
        self.router = router

    def cpu_s(self) -> float:
        times = self.router.cpu_times()
        return float(times.user + times.system)


@contextmanager
def _cluster(folder: Path, step_s: float) -> Iterator[_Cluster]:
    fake = ("worker.fake", "--prefill", "2", "--decode", "2", "--step-s", str(step_s), "--vocab-size", str(_VOCAB_SIZE))
    with _process(*fake) as nodes, _process("bench.router", "--bare") as bare:
        assert nodes.stdout is not None
        assert bare.stdout is not None
        addresses = json.loads(nodes.stdout.readline())
        ready = folder / "ready.json"
        ready.unlink(missing_ok=True)
        settings = {"nodes": addresses, "folder": str(folder / "model"), "ready_file": str(ready)}
        with _process("bench.router", "--serve", json.dumps(settings)) as router:
            _wait_for(ready, router)
            found = json.loads(ready.read_text())
            yield _Cluster(
                found["http"], found["grpc"], bare.stdout.readline().strip(), addresses, psutil.Process(found["pid"])
            )


def _wait_for(ready: Path, router: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not ready.exists():
        if router.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the router did not start")
        time.sleep(0.02)


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    words = [f"{a}{b}ing the {b}{a}er" for a in ("read", "walk", "speak", "write") for b in ("on", "over", "under")]
    tokenizer.train_from_iterator(words * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


# ── Measures ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _measure(folder: Path, scale: float) -> dict[str, Any]:
    with _cluster(folder, step_s=0.002) as cluster:
        # One request at a time shows its own cost, also on a busy machine.
        ttft = [await _added_ttft(cluster, None, 1000), await _added_ttft(cluster, 200, int(2500 * max(scale, 0.2)))]
    with _cluster(folder, step_s=1.0) as cluster:
        memory = await _memory_per_stream(cluster, count=max(300, int(1000 * scale)))
    counts = [c for c in (1, 64, 256, 1000) if c <= 1000 * max(scale, 0.3)]
    with _cluster(folder, step_s=0.005) as cluster:
        streamed = [await _streamed(cluster, count, min(400, int(80_000 * scale / count) + 20)) for count in counts]
    return {"cpus": psutil.cpu_count(), "load_average": psutil.getloadavg()[0], "added_ttft": ttft, "memory": memory,
            "sse": streamed, "placement": placement.rows(scale < 1.0)}  # fmt: skip


class _Ways:
    """The ways to a first token, measured in turn, with their times."""

    def __init__(self, cluster: _Cluster, client: AsyncClient, bare: AsyncClient, direct: _Direct) -> None:
        self._cluster = cluster
        self._client = client
        self._bare = bare
        self._direct = direct
        self._kept: list[_Connection] = []
        self.direct: list[float] = []
        self.bare: list[float] = []
        self.inside: list[float] = []
        self.grpc: list[float] = []
        self.http: list[float] = []
        self.http_new: list[float] = []

    async def one(self, number: int) -> None:
        match number % 5:
            case 0:
                self.direct.append(await self._direct.ttft_s(number))
            case 1:
                ttft_s, inside_s = await _grpc_ttft_s(self._client, number)
                self.grpc.append(ttft_s)
                self.inside.append(inside_s)
            case 2:
                self.bare.append((await _grpc_ttft_s(self._bare, number))[0])
            case 3:
                connection = self._kept.pop() if self._kept else await _Connection.open(self._cluster)
                self.http.append(await connection.ttft_s(number))
                self._kept.append(connection)
            case _:
                start_s = time.perf_counter()
                connection = await _Connection.open(self._cluster)
                opened_s = time.perf_counter() - start_s
                self.http_new.append(opened_s + await connection.ttft_s(number))
                connection.close()

    def clear(self) -> None:
        for samples in (self.direct, self.bare, self.inside, self.grpc, self.http, self.http_new):
            samples.clear()

    def close(self) -> None:
        for connection in self._kept:
            connection.close()

    def row(self) -> dict[str, Any]:
        base = statistics.median(self.direct)
        row: dict[str, Any] = {
            "samples": len(self.direct),
            "direct_p50_ms": _ms(base),
            "direct_p99_ms": _ms(_quantile(self.direct, 0.99)),
            "call_p50_ms": _ms(statistics.median(self.bare)),
            "inside_p50_ms": _ms(statistics.median(self.inside)),
        }
        for name, samples in (("grpc", self.grpc), ("http", self.http), ("http_new", self.http_new)):
            row[f"{name}_p50_ms"] = _ms(statistics.median(samples) - base)
            row[f"{name}_p99_ms"] = _ms(_quantile(samples, 0.99) - base)
        row["grpc_net_p50_ms"] = _ms(statistics.median(self.grpc) - base - statistics.median(self.bare))
        return row


async def _added_ttft(cluster: _Cluster, rate_per_s: float | None, count: int) -> dict[str, Any]:
    """None: requests one after the other. Else an open loop: requests start at fixed times, whether earlier ones
    have ended or not."""
    async with (
        AsyncClient(cluster.grpc) as client,
        AsyncClient(cluster.bare) as bare,
        aio.insecure_channel(cluster.nodes[0]) as channel,
    ):
        direct = await _Direct.open(channel)
        ways = _Ways(cluster, client, bare, direct)
        for number in range(80):  # warm-up of connections and caches
            await ways.one(number)
        ways.clear()
        start_s, before_s = time.monotonic(), cluster.cpu_s()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                if rate_per_s is None:
                    await ways.one(number)
                    await asyncio.sleep(0.003)  # the request has ended as well
                else:
                    await asyncio.sleep(max(0.0, start_s + number / rate_per_s - time.monotonic()))
                    group.create_task(ways.one(number))
        cpu_s = cluster.cpu_s() - before_s
        ways.close()
        await direct.close()
    load = "one at a time" if rate_per_s is None else f"{rate_per_s:.0f}/s"
    return {"load": load, **ways.row(), "cpu_ms": _ms(cpu_s / (count * 3 / 5))}


class _Direct:
    """A node's prefill session without a router: the base time to a first token."""

    def __init__(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        self._call = call
        self._waiting: dict[str, asyncio.Future[float]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, channel: aio.Channel) -> _Direct:
        call = node_pb2_grpc.NodeStub(channel).Session()
        await call.write(node_pb2.SessionRequest(hello=hello("bench", 1)))
        await call.read()
        return cls(call)

    async def _read(self) -> None:
        while isinstance(message := await self._call.read(), node_pb2.SessionResponse):
            for tokens in message.tokens:
                waiter = self._waiting.pop(tokens.sequence_id, None)
                if waiter is not None:
                    waiter.set_result(time.perf_counter())

    async def ttft_s(self, number: int) -> float:
        spec = SequenceSpec(
            f"direct/{number}/{time.time_ns()}", tuple(_PROMPT), SamplingParams(max_tokens=1, seed=number)
        )
        self._waiting[spec.sequence_id] = waiter = asyncio.get_running_loop().create_future()
        start_s = time.perf_counter()
        run = node_pb2.SessionRequest.Run(sequence=codec.sequence_to_pb(spec))
        await self._call.write(node_pb2.SessionRequest(run=run))
        ended_s = await waiter
        return float(ended_s - start_s)

    async def close(self) -> None:
        self._call.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


async def _grpc_ttft_s(client: AsyncClient, number: int) -> tuple[float, float]:
    start_s = time.perf_counter()
    first_s = math.nan
    inside_s = math.nan
    async for part in client.generate(_PROMPT, max_tokens=8, seed=number, ignore_eos=True):
        if isinstance(part, Delta) and math.isnan(first_s):
            first_s = time.perf_counter() - start_s
        relay = getattr(part, "relay", None)
        if relay is not None:
            inside_s = relay.ttft_s
    return first_s, inside_s


class _Connection:
    """A minimal HTTP client: the measured process is another one."""

    def __init__(self, cluster: _Cluster, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._host = cluster.host
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, cluster: _Cluster) -> _Connection:
        return cls(cluster, *await asyncio.open_connection(cluster.host, cluster.port))

    async def post(self, number: int, max_tokens: int) -> None:
        """Returns when the answer has begun, which is with its first token."""
        body = {"prompt": _PROMPT, "max_tokens": max_tokens, "seed": number, "stream": True, "ignore_eos": True}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-length: {len(content)}\r\n\r\n"
        self.writer.write(head.encode() + content)
        await self.reader.readuntil(b"\r\n\r\n")

    async def ttft_s(self, number: int) -> float:
        start_s = time.perf_counter()
        await self.post(number, 8)
        await self.reader.readuntil(b"data: ")
        first_s = time.perf_counter() - start_s
        await self.reader.readuntil(_LAST_CHUNK)
        return first_s

    def close(self) -> None:
        self.writer.close()


async def _streamed(cluster: _Cluster, count: int, max_tokens: int) -> dict[str, Any]:
    """Parallel streams; the cost of starting them is measured with short ones and subtracted."""
    await _stream_all(cluster, count, 2)
    short = await _stream_all(cluster, count, 2)
    whole = await _stream_all(cluster, count, max_tokens)
    num_tokens = count * max_tokens
    cpu_s = whole.cpu_s - short.cpu_s
    return {
        "streams": count,
        "tokens": num_tokens,
        "tokens_per_s": round(num_tokens / whole.wall_s),
        "tokens_per_core_s": round((num_tokens - 2 * count) / cpu_s) if cpu_s > 0 else None,
        "start_cpu_ms": _ms(short.cpu_s / count),
        "tokens_per_chunk": round(num_tokens / max(whole.num_chunks, 1), 2),
        "router_cpu_share": round(whole.cpu_s / whole.wall_s, 2),
    }


class _Streamed(NamedTuple):
    wall_s: float
    cpu_s: float
    num_chunks: int


async def _stream_all(cluster: _Cluster, count: int, max_tokens: int) -> _Streamed:
    num_chunks = 0

    async def one(number: int) -> None:
        nonlocal num_chunks
        connection = await _Connection.open(cluster)
        await connection.post(number, max_tokens)
        block = b""
        while not block.endswith(_LAST_CHUNK):
            block = await connection.reader.read(1 << 16)
            assert block, "a stream broke off"
            num_chunks += block.count(b"data: {")
        connection.close()

    before_s, start_s = cluster.cpu_s(), time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))
    return _Streamed(time.monotonic() - start_s, cluster.cpu_s() - before_s, num_chunks)


async def _memory_per_stream(cluster: _Cluster, count: int) -> dict[str, Any]:
    """Streams that have begun and then wait: the router's resident set before and with them."""
    before_bytes = cluster.router.memory_info().rss
    connections = [await _Connection.open(cluster) for _ in range(count)]
    for connection in connections:
        await connection.post(1, 30000)
    with_bytes = cluster.router.memory_info().rss
    for connection in connections:
        connection.close()
        await connection.writer.wait_closed()
    return {"streams": count, "bytes_per_stream": round((with_bytes - before_bytes) / count)}


def _quantile(samples: list[float], fraction: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * fraction))]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


if __name__ == "__main__":
    main()
