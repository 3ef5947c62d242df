"""What the router costs: added time to first token, CPU per streamed token, memory per open stream.

Three processes: fake nodes that compute nothing, the router, and this one as the client. Added TTFT is the time through
the router minus the time of the same call made straight to a fake node, interleaved. Throughput is per CPU second of
the router process, so that a busy machine distorts it little.

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
from collections.abc import Iterator
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
from baton.v1 import node_pb2, node_pb2_grpc
from router.config import LimitsConfig, RouterConfig
from router.serve import serve
from router.sessions import hello

_VOCAB_SIZE = 512
_PROMPT = list(range(100, 228))


def run(quick: bool) -> dict[str, Any]:
    """All measures; quick takes a tenth of the load."""
    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(Path(folder) / "model")
        return asyncio.run(_measure(Path(folder), 0.1 if quick else 1.0))


def main() -> None:
    """The router process of this bench."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", required=True)
    asyncio.run(_serve(json.loads(parser.parse_args().serve)))


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
    """Fake nodes and a router, as processes."""

    def __init__(self, http: str, grpc: str, nodes: list[str], router: psutil.Process) -> None:
        self.host, port = http.removeprefix("http://").split(":")
        self.port = int(port)
        self.grpc = grpc
        self.nodes = nodes
        self.router = router

    def cpu_s(self) -> float:
        times = self.router.cpu_times()
        return float(times.user + times.system)


@contextmanager
def _cluster(folder: Path, step_s: float) -> Iterator[_Cluster]:
    fake = ("router.fake", "--prefill", "2", "--decode", "2", "--step-s", str(step_s), "--vocab-size", str(_VOCAB_SIZE))
    with _process(*fake) as nodes:
        assert nodes.stdout is not None
        addresses = json.loads(nodes.stdout.readline())
        ready = folder / "ready.json"
        ready.unlink(missing_ok=True)
        settings = {"nodes": addresses, "folder": str(folder / "model"), "ready_file": str(ready)}
        with _process("bench.router", "--serve", json.dumps(settings)) as router:
            _wait_for(ready, router)
            found = json.loads(ready.read_text())
            yield _Cluster(found["http"], found["grpc"], addresses, psutil.Process(found["pid"]))


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
        # The lower rate shows the cost of a request alone, also on a machine that others use.
        ttft = [await _added_ttft(cluster, rate, max(1.0, 6 * scale)) for rate in (20, 200)]
    with _cluster(folder, step_s=1.0) as cluster:
        memory = await _memory_per_stream(cluster, count=int(1000 * scale))
    counts = [c for c in (1, 64, 256, 1000) if c <= 1000 * max(scale, 0.3)]
    with _cluster(folder, step_s=0.005) as cluster:
        streamed = [await _streamed(cluster, count, min(400, int(80_000 * scale / count) + 20)) for count in counts]
    return {"cpus": psutil.cpu_count(), "load_average": psutil.getloadavg()[0], "added_ttft": ttft, "memory": memory,
            "sse": streamed}  # fmt: skip


async def _added_ttft(cluster: _Cluster, rate_per_s: float, seconds: float) -> dict[str, float]:
    """Open loop: requests start on the clock, whatever became of the ones before; direct ones in between."""
    through_grpc: list[float] = []
    through_http: list[float] = []
    straight: list[float] = []
    inside: list[float] = []
    async with AsyncClient(cluster.grpc) as client, aio.insecure_channel(cluster.nodes[0]) as channel:
        direct = await _Direct.open(channel)

        async def one(number: int) -> None:
            match number % 10:
                case 0:
                    straight.append(await direct.ttft_s(number))
                case 1 | 2:
                    through_http.append(await _http_ttft_s(cluster, number))
                case _:
                    ttft_s, relay_s = await _grpc_ttft_s(client, number)
                    through_grpc.append(ttft_s)
                    inside.append(relay_s)

        for number in range(50):  # connections and caches
            await one(number)
        for samples in (through_grpc, through_http, straight, inside):
            samples.clear()
        start_s = time.monotonic()
        before_s = cluster.cpu_s()
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate_per_s * seconds)):
                await asyncio.sleep(max(0.0, start_s + number / rate_per_s - time.monotonic()))
                group.create_task(one(number))
        cpu_s = cluster.cpu_s() - before_s
        await direct.close()
    base = statistics.median(straight)
    num_requests = len(through_grpc) + len(through_http)
    return {
        "rate_per_s": rate_per_s,
        "num_requests": num_requests,
        "direct_p50_ms": _ms(base),
        "direct_p99_ms": _ms(_quantile(straight, 0.99)),
        "inside_router_p50_ms": _ms(statistics.median(inside)),
        "added_grpc_p50_ms": _ms(statistics.median(through_grpc) - base),
        "added_grpc_p99_ms": _ms(_quantile(through_grpc, 0.99) - base),
        "added_http_p50_ms": _ms(statistics.median(through_http) - base),
        "added_http_p99_ms": _ms(_quantile(through_http, 0.99) - base),
        "router_cpu_ms_per_request": _ms(cpu_s / num_requests),
    }


class _Direct:
    """A node's prefill session without a router in between: what the first token costs anyway."""

    def __init__(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        self._call = call
        self._waiting: dict[str, asyncio.Future[float]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, channel: aio.Channel) -> _Direct:
        call = node_pb2_grpc.PrefillNodeStub(channel).Session()
        await call.write(node_pb2.PrefillSessionRequest(hello=hello("bench", 1)))
        await call.read()
        return cls(call)

    async def _read(self) -> None:
        while isinstance(message := await self._call.read(), node_pb2.PrefillSessionResponse):
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
        run = node_pb2.PrefillSessionRequest.Run(sequence=codec.sequence_to_pb(spec))
        await self._call.write(node_pb2.PrefillSessionRequest(run=run))
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


async def _post(cluster: _Cluster, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare client: the measured process is not this one."""
    reader, writer = await asyncio.open_connection(cluster.host, cluster.port)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def _http_ttft_s(cluster: _Cluster, number: int) -> float:
    start_s = time.perf_counter()
    body = {"prompt": _PROMPT, "max_tokens": 8, "seed": number, "stream": True, "ignore_eos": True}
    reader, writer = await _post(cluster, body)
    await reader.readuntil(b"data: ")
    first_s = time.perf_counter() - start_s
    await reader.read()
    writer.close()
    return first_s


async def _streamed(cluster: _Cluster, count: int, max_tokens: int) -> dict[str, Any]:
    """Streams beside each other; what starting them costs is measured with short ones and taken off."""
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
        body = {"prompt": _PROMPT, "max_tokens": max_tokens, "seed": number, "stream": True, "ignore_eos": True}
        reader, writer = await _post(cluster, body)
        while block := await reader.read(1 << 16):
            num_chunks += block.count(b"data: {")
        writer.close()

    before_s, start_s = cluster.cpu_s(), time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))
    return _Streamed(time.monotonic() - start_s, cluster.cpu_s() - before_s, num_chunks)


async def _memory_per_stream(cluster: _Cluster, count: int) -> dict[str, Any]:
    """Streams that have begun and now wait: the router's resident set before and with them."""
    body = {"prompt": _PROMPT, "max_tokens": 30000, "stream": True, "ignore_eos": True, "seed": 1}
    before_bytes = cluster.router.memory_info().rss
    streams = [await _post(cluster, body) for _ in range(count)]
    with_bytes = cluster.router.memory_info().rss
    for _, writer in streams:
        writer.close()
        await writer.wait_closed()
    return {"streams": count, "bytes_per_stream": round((with_bytes - before_bytes) / count)}


def _quantile(samples: list[float], fraction: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * fraction))]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


if __name__ == "__main__":
    main()
