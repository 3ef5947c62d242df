"""Compares a cluster with all of its observability on and off: tokens/s, and processor time per token of each process.

One cluster does the same work in short blocks and is switched in between (bench.switchable), so that only the switch
differs: two clusters, or two starts of one, differ by more than the effect. Eight alternating blocks of each kind make
a ratio; the result is the median of the ratios with its bootstrap interval.

On means: counting, stamps, relays, log lines, the nodes' timelines, and in every eighth block one scrape of every
process and two polls of the status page's data. Spans are optional and measured on top, sent to a collector that
discards them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import operator
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import grpc
import httpx

from baton.v1 import common_pb2, router_pb2, router_pb2_grpc
from bench import model as bench_model
from bench import switchable
from bench.cluster import NO_PREFIX_CACHE
from bench.measure import percent_more

_DEMO = Path(__file__).resolve().parents[1] / "demo" / "model"
_START_TIMEOUT_S = 120.0
_REQUEST_TIMEOUT_S = 120.0
# Export interval of spans; processor time is read when the last spans of a block are sent.
_EXPORT_EVERY_S = 0.2
_NUM_POLLS = 2
# One block in so many contains a scrape (about 4 s of work), and a ratio consists of so many blocks of either kind.
_GROUP = 8
# Time for every process to run its signal handler and to finish the work of the block before.
_PAUSE_S = 0.03
_MODES = {"off": switchable.OFF, "on": switchable.ON, "on and spans": switchable.SPANS}


@dataclass(frozen=True, slots=True)
class Load:
    """The work of a block."""

    num_clients: int
    requests_each: int
    prompt_tokens: int
    output_tokens: int
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        return self.num_clients * self.requests_each * self.output_tokens


@dataclass(frozen=True, slots=True)
class Block:
    """The cost of one block, or of several in a row."""

    num_tokens: int
    seconds: float
    # Processor time by process.
    cpu_s: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def cpu_us(self) -> dict[str, float]:
        """Processor time per token."""
        found = {name: seconds / self.num_tokens * 1e6 for name, seconds in self.cpu_s.items()}
        return {**found, "all three": sum(found.values())}

    def __add__(self, other: Block) -> Block:
        cpu_s = {name: seconds + other.cpu_s[name] for name, seconds in self.cpu_s.items()}
        return Block(self.num_tokens + other.num_tokens, self.seconds + other.seconds, cpu_s)


class _Collector(BaseHTTPRequestHandler):
    """Accepts spans and discards them."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


@contextlib.contextmanager
def _collector() -> Any:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Cluster:
    """One prefill and one decode worker behind a router; each process can be switched."""

    def __init__(self, pids: dict[str, int], metrics: Sequence[str], http: str, channel: grpc.aio.Channel) -> None:
        self._pids = pids
        self._scraped = (f"{http}/metrics", *(f"http://{address}/metrics" for address in metrics))
        self._status = f"{http}/status/data"
        self._stub = router_pb2_grpc.RouterStub(channel)

    async def block(self, mode: str, load: Load, seed: int, *, is_watched: bool) -> Block:
        for pid in self._pids.values():
            os.kill(pid, _MODES[mode])
        await asyncio.sleep(_PAUSE_S)
        tokens_before = await self._generated_tokens()
        before, began_s = self._cpu_s(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(self._watch()) if is_watched else None
            clients = [group.create_task(self._client(load, seed * 1000 + i)) for i in range(load.num_clients)]
            for client in clients:
                await client
            seconds = time.perf_counter() - began_s
            if watcher is not None:
                await watcher
        await asyncio.sleep(_PAUSE_S if mode != "on and spans" else 2 * _EXPORT_EVERY_S)
        after = self._cpu_s()
        counted = await self._generated_tokens() - tokens_before
        if counted != (0 if mode == "off" else load.num_tokens):
            raise RuntimeError(f"{mode}: the router counted {counted} tokens of {load.num_tokens}")
        return Block(load.num_tokens, seconds, {name: after[name] - before[name] for name in before})

    async def _watch(self) -> None:
        """Imitates a Prometheus and a user with an open status page."""
        for _ in range(_NUM_POLLS):
            await _get(self._status)
        for url in self._scraped:
            await _get(url)

    async def _client(self, load: Load, seed: int) -> None:
        rng = Random(seed)
        for _ in range(load.requests_each):
            request = router_pb2.GenerateRequest(
                prompt_token_ids=router_pb2.TokenIds(
                    token_ids=[rng.randrange(1, load.vocab_size) for _ in range(load.prompt_tokens)]
                ),
                sampling=common_pb2.SamplingParams(temperature=0.0, max_tokens=load.output_tokens, ignore_eos=True),
            )
            num_tokens = 0
            async for response in self._stub.Generate(request, timeout=_REQUEST_TIMEOUT_S):
                num_tokens += len(response.delta.token_ids)
            if num_tokens != load.output_tokens:
                raise RuntimeError(f"got {num_tokens} tokens of {load.output_tokens}")

    async def _generated_tokens(self) -> int:
        text = await _get(self._scraped[0])
        line = next(x for x in text.splitlines() if x.startswith("baton_generated_tokens_total"))
        return round(float(line.split()[-1]))

    def _cpu_s(self) -> dict[str, float]:
        """Processor time of all threads in nanoseconds: the clock that clock_getcpuclockid(3) names."""
        return {name: time.clock_gettime((~pid << 3) | 2) for name, pid in self._pids.items()}


@contextlib.asynccontextmanager
async def _cluster(folder: Path, kv_mib: int) -> AsyncIterator[_Cluster]:
    with contextlib.ExitStack() as stack:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": stack.enter_context(_collector()),
            "OTEL_BSP_SCHEDULE_DELAY": str(int(_EXPORT_EVERY_S * 1000)),
        }

        def start(name: str, *options: str, stdout: Any = subprocess.DEVNULL) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "bench.switchable", *options, "--model", str(folder)]
            log = stack.enter_context((run_dir / f"{name}.log").open("w"))
            process = subprocess.Popen(command, stdout=stdout, stderr=log, env=environment, text=True)
            stack.callback(_end, process)
            return process

        workers = {
            role: start(
                role,
                *(
                    "worker",
                    "--role",
                    role,
                    "--node-id",
                    role,
                    "--threads",
                    "1",
                    "--kv-mib",
                    str(kv_mib),
                    *NO_PREFIX_CACHE,
                ),
                stdout=subprocess.PIPE,
            )
            for role in ("prefill", "decode")
        }
        ready = [await asyncio.to_thread(_ready, process) for process in workers.values()]
        ports = _free_ports(2)
        nodes = [word for found in ready for word in ("--node", found["address"])]
        faces = ("--http", f"127.0.0.1:{ports[0]}", "--grpc", f"127.0.0.1:{ports[1]}")
        router = start("router", "router", "--otel", *faces, *nodes)
        http = f"http://127.0.0.1:{ports[0]}"
        await asyncio.to_thread(_until_ready, http, router, run_dir / "router.log")
        pids = {"router": router.pid, **{role: process.pid for role, process in workers.items()}}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
            yield _Cluster(pids, [found["metrics"] for found in ready], http, channel)


async def _get(url: str) -> str:
    """A minimal HTTP client: this process shares the cores with the measured ones."""
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.rpartition(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    try:
        writer.write(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await asyncio.wait_for(reader.read(-1), 30)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"{url}: {head[:200]!r}")
    return body.decode()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [found.getsockname()[1] for found in taken]


def _ready(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended with {process.wait()}")
    found: dict[str, str] = json.loads(line)
    return found


def _until_ready(http: str, process: subprocess.Popen[str], log: Path) -> None:
    gives_up_at_s = time.monotonic() + _START_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{http}/ready", timeout=5)
            if answer.status_code == 200 and len(answer.json()["nodes"]) == 2:
                return
        if process.poll() is not None or time.monotonic() > gives_up_at_s:
            raise RuntimeError(f"the router is not ready; its log ends\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


async def _measure(folder: Path, load: Load, seconds: dict[str, float], kv_mib: int) -> dict[str, Any]:
    """``seconds`` by the mode that is compared with off."""
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    async with _cluster(folder, kv_mib) as cluster:
        for mode in _MODES:
            await cluster.block(mode, load, 0, is_watched=mode != "off")
        for mode, for_s in seconds.items():
            on, off = await _groups(cluster, mode, load, for_s)
            rows += _rows(mode, on, off)
            samples[mode] = [
                {which: {"tokens/s": g.tokens_per_s, **g.cpu_us} for which, g in ((mode, a), ("off", b))}
                for a, b in zip(on, off, strict=True)
            ]
    return {
        "load": f"{load.num_clients} clients, {load.requests_each} requests each a block, {load.prompt_tokens} + "
        f"{load.output_tokens} tokens, 1 prefill + 1 decode",
        "rows": rows,
        "samples": samples,
    }


async def _groups(cluster: _Cluster, mode: str, load: Load, for_s: float) -> tuple[list[Block], list[Block]]:
    on: list[Block] = []
    off: list[Block] = []
    gives_up_at_s, seed = time.monotonic() + for_s, 0
    while time.monotonic() < gives_up_at_s:
        taken: dict[str, list[Block]] = {mode: [], "off": []}
        for i in range(_GROUP):
            seed += 1
            # The same prompts for the same work; the order alternates.
            for which in (mode, "off") if i % 2 else ("off", mode):
                watched = which != "off" and i == 0
                taken[which].append(await cluster.block(which, load, seed, is_watched=watched))
        on.append(functools.reduce(operator.add, taken[mode]))
        off.append(functools.reduce(operator.add, taken["off"]))
    return on, off


def _rows(mode: str, on: Sequence[Block], off: Sequence[Block]) -> Iterator[dict[str, Any]]:
    def row(what: str, value: Callable[[Block], float]) -> dict[str, Any]:
        with_it, without = [value(b) for b in on], [value(b) for b in off]
        more, low, high = percent_more(with_it, without)
        return {
            "what": what,
            "mode": mode,
            "off": statistics.median(without),
            "on": statistics.median(with_it),
            "more %": more,
            "from %": low,
            "to %": high,
            "ratios": len(on),
        }

    yield row("cluster, tokens/s", lambda b: b.tokens_per_s)
    for name in off[0].cpu_us:
        yield row(f"{name}, us of CPU a token", lambda b, name=name: b.cpu_us[name])  # type: ignore[misc]


def run(quick: bool) -> dict[str, Any]:
    """On the demo's model, whose steps are very short, and on the bench model."""
    scale = 0.3 if quick else 1.0
    many = Load(num_clients=8, requests_each=2, prompt_tokens=128, output_tokens=96, vocab_size=1000)
    one = Load(num_clients=1, requests_each=3, prompt_tokens=128, output_tokens=96, vocab_size=1000)
    large = Load(num_clients=4, requests_each=1, prompt_tokens=128, output_tokens=32, vocab_size=bench_model.VOCAB_SIZE)
    return {
        name: asyncio.run(_measure(folder, load, {k: v * scale for k, v in seconds.items()}, kv_mib))
        for name, folder, load, seconds, kv_mib in (
            ("demo model", _DEMO, many, {"on": 110.0, "on and spans": 35.0}, 256),
            ("demo model, one client", _DEMO, one, {"on": 30.0}, 256),
            (bench_model.NAME, bench_model.bench_model(), large, {"on": 200.0}, 512),
        )
    }
