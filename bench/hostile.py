"""Measures the effect of large inputs on other requests: 16 streams with known answers beside one sender of huge
bodies.

Each kind of body is sent in two sizes: so large that it is refused by its length, and just small enough to be read.

Three processes run beside the cluster: this one sends the bodies, which were made before; one asks ``/health`` every 20
ms on a connection of its own; one holds 16 recall streams open, checks each answer and records each gap between two
chunks. The first window has no hostile input, so its row shows the noise of the machine. The ``own`` figures leave out
the time in which a thread was ready to run while another one had the core: for the router its event loop, for a node
the thread that waited longest, and the watchers themselves.

    python -m bench hostile
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import psutil

import demo
from baton.v1 import router_pb2, router_pb2_grpc
from bench.cluster import NO_PREFIX_CACHE, Cluster, cluster
from demo.tasks import recall_prompts
from loadgen.samples import Samples

_NUM_STREAMS = 16
_HEALTH_EVERY_S = 0.02
_SEND_TIMEOUT_S = 60.0
_MB = 10**6
# The router reads bodies of up to 4 MiB whatever the model, and refuses those of over 32 MiB.
_SIZES = (int(3.9 * _MB), 30 * _MB)


def run(quick: bool) -> dict[str, Any]:
    """One window for each kind of input and size."""
    return asyncio.run(_measure(1.5 if quick else 4.0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["health", "streams"])
    parser.add_argument("ready_file", type=Path)
    options = parser.parse_args()
    ready = json.loads(options.ready_file.read_text())
    if options.part == "health":
        _ask_health(ready["http"], ready["router_pid"])
    else:
        pids = {node["role"]: node["pid"] for node in ready["nodes"]}
        asyncio.run(_stream(ready["http"], ready["router_pid"], pids["prefill"], pids["decode"]))


# ── Inputs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def inputs(size: int) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Name, path and a maker of each hostile body of about ``size`` bytes."""

    def completion(**fields: Any) -> Callable[[], bytes]:
        return lambda: json.dumps({"max_tokens": 1, **fields}).encode()

    def chat(**fields: Any) -> Callable[[], bytes]:
        return lambda: json.dumps({"max_tokens": 1, **fields}).encode()

    completions, chats = "/v1/completions", "/v1/chat/completions"
    yield "prompt", completions, completion(prompt="Ada likes plums. " * (size // 17))
    yield "prompt of escapes", completions, completion(prompt="\x01" * (size // 6))
    yield "prompt ids", completions, completion(prompt=[100] * (size // 5))
    yield "prompts, empty", completions, completion(prompt=[""] * (size // 4))
    yield "stop_token_ids", completions, completion(prompt="a", stop_token_ids=[100] * (size // 5))
    yield "stop", completions, completion(prompt="a", stop=["x"] * (size // 5))
    yield "logit_bias", completions, completion(prompt="a", logit_bias={str(i): 1 for i in range(size // 13)})
    yield "metadata", completions, completion(prompt="a", metadata={f"k{i}": "v" for i in range(size // 15)})
    yield "unknown keys", completions, completion(prompt="a", **{f"k{i}": 0 for i in range(size // 12)})
    yield "model name", completions, completion(prompt="a", model="m" * size)
    yield "nested", completions, lambda: b'{"prompt": ' + b"[" * (size // 2) + b"]" * (size // 2) + b"}"
    yield "long number", completions, lambda: b'{"prompt": "a", "seed": ' + b"9" * size + b"}"
    yield "message", chats, chat(messages=[{"role": "user", "content": "Ada likes plums. " * (size // 17)}])
    yield "messages", chats, chat(messages=[{"role": "user", "content": "a"}] * (size // 35))
    part = {"type": "text", "text": "a"}
    yield "content parts", chats, chat(messages=[{"role": "user", "content": [part] * (size // 30)}])
    yield "not JSON", completions, lambda: b"\xff" * size


# The watchers


def _ask_health(url: str, router_pid: int) -> None:
    """Prints a line for each call until the input closes: (when, its seconds, seconds of those in which this process
    or the router waited for a core)."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    stop = threading.Event()

    def until_input_closes() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=until_input_closes, daemon=True).start()
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30.0)
    while not stop.wait(_HEALTH_EVERY_S):
        waited_s = _waited_s(os.getpid()) + _waited_s(router_pid)
        started = time.monotonic()
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        took_s = time.monotonic() - started
        assert response.status == 200, response.status
        waited_s = _waited_s(os.getpid()) + _waited_s(router_pid) - waited_s
        print(json.dumps([started, took_s, min(took_s, waited_s)]), flush=True)


def _waited_s(pid: int) -> float:
    """Seconds in which a process's first thread (the router's event loop) has been ready to run without a core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


@dataclass(frozen=True, slots=True)
class _Arrival:
    """When a chunk came, and how long each thread on its way had waited for a core until then, in seconds."""

    at_s: float
    loops: tuple[float, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def gap_since(self, earlier: _Arrival, with_prefill: bool) -> tuple[float, float, float]:
        """Start and length of the gap, and the part of it spent waiting for a core. The second token also waits for
        prefill."""
        length_s = self.at_s - earlier.at_s
        waited_s = sum(self.loops) - sum(earlier.loops) + _longest(earlier.decode, self.decode)
        if with_prefill:
            waited_s += _longest(earlier.prefill, self.prefill)
        return earlier.at_s, length_s, min(length_s, waited_s)


def _longest(earlier: tuple[float, ...], later: tuple[float, ...]) -> float:
    return max(after - before for before, after in zip(earlier, later, strict=True))


class _Clock:
    """Stamps arrivals. Chunks of one step come together, so the threads' waiting time is read at most once a
    millisecond."""

    def __init__(self, router_pid: int, prefill_pid: int, decode_pid: int) -> None:
        self._loops = [os.getpid(), router_pid]
        self._prefill, self._decode = _threads(prefill_pid), _threads(decode_pid)
        self._read_s = 0.0
        self._last = self.arrival()

    def arrival(self) -> _Arrival:
        now_s = time.monotonic()
        if now_s - self._read_s > 1e-3:
            self._read_s = now_s
            loops, prefill, decode = (
                tuple(map(_waited_s, tids)) for tids in (self._loops, self._prefill, self._decode)
            )
            self._last = _Arrival(now_s, loops, prefill, decode)
        return replace(self._last, at_s=now_s)


def _threads(pid: int) -> list[int]:
    """The threads of a process: ids under /proc. A node's threads stay the same while it serves."""
    return [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]


async def _stream(url: str, router_pid: int, prefill_pid: int, decode_pid: int) -> None:
    """Runs recall streams one after the other on 16 lanes; prints for each its gaps and whether the answer was
    right."""
    stop = asyncio.Event()
    clock = _Clock(router_pid, prefill_pid, decode_pid)
    tasks = recall_prompts(seed=41, count=256, num_pairs=(20, 120), num_questions=(8, 12))

    async def until_input_closes() -> None:
        await asyncio.to_thread(sys.stdin.read)
        stop.set()

    async def lane(client: httpx.AsyncClient, number: int) -> None:
        index = number
        while not stop.is_set():
            task = tasks[index % len(tasks)]
            index += _NUM_STREAMS
            body = {"prompt": task.prompt, "max_tokens": task.num_output_tokens + 4, "temperature": 0, "stream": True}
            text, arrivals = "", list[_Arrival]()
            async with client.stream("POST", "/v1/completions", json=body) as response:
                error = "" if response.status_code == 200 else f"{response.status_code}"
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[len("data: ") :])
                        arrivals.append(clock.arrival())
                        error = error or chunk.get("error", {}).get("message", "")
                        text += "".join(choice["text"] for choice in chunk.get("choices", []))
            pairs = enumerate(itertools.pairwise(arrivals))
            gaps = [later.gap_since(earlier, with_prefill=index == 0) for index, (earlier, later) in pairs]
            print(json.dumps({"gaps": gaps, "error": error, "right": task.accepts(text)}), flush=True)

    limits = httpx.Limits(max_connections=_NUM_STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client, asyncio.TaskGroup() as group:
        group.create_task(until_input_closes())
        for number in range(_NUM_STREAMS):
            group.create_task(lane(client, number))


class _Watcher:
    """A child that prints JSON lines until its input closes; into a file, since a full pipe would block it."""

    def __init__(self, part: str, ready_file: Path) -> None:
        command = [sys.executable, "-m", "bench.hostile", part, str(ready_file)]
        self._path = ready_file.with_name(f"{part}.jsonl")
        with self._path.open("wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output)

    def rows(self) -> list[Any]:
        """All lines of a child that has ended."""
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(timeout=180.0)
        if code:
            raise RuntimeError(f"a watcher ended with {code}")


# Measurement


async def _measure(window_s: float) -> dict[str, Any]:
    folder = Path(demo.__file__).parent / "model"
    # The streams send their prompts again and again.
    options = ["--prefill", "1", "--decode", "1", "--mixed", "0", *NO_PREFIX_CACHE]
    with tempfile.TemporaryDirectory() as run_dir:
        async with cluster("hostile", options, folder, Path(run_dir)) as where:
            return await asyncio.to_thread(_watch, where, Path(run_dir), window_s)


def _watch(where: Cluster, run_dir: Path, window_s: float) -> dict[str, Any]:
    router = psutil.Process(json.loads((run_dir / "hostile.json").read_text())["router_pid"])
    rss_before = router.memory_info().rss
    losses_before = _node_losses(where.http)
    windows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        health, streams = (_Watcher(part, run_dir / "hostile.json") for part in ("health", "streams"))
        stack.callback(streams.close)
        stack.callback(health.close)
        time.sleep(2.0)  # connections, first answers
        windows.append(_window("none", lambda: time.sleep(window_s), window_s, router))
        for size in _SIZES:
            for name, path, make in inputs(size):
                send = partial(_post, where.http, path, make())
                windows.append(_window(f"{name}, {size / _MB:.0f} MB", send, window_s, router))
            # gRPC has no escapes: half the size is accepted.
            send = partial(_generate, where, run_dir, "Ada likes plums. " * (size // 34))
            windows.append(_window(f"gRPC prompt, {size / 2 / _MB:.0f} MB", send, window_s, router))
    asked_rows, stream_rows = health.rows(), streams.rows()
    rows = [_row(window, asked_rows, stream_rows) for window in windows]
    late = [(took, took - waited) for at, took, waited in asked_rows if at >= windows[1]["from_s"]]
    all_gaps = [gap for stream in stream_rows for gap in stream["gaps"] if gap[0] >= windows[1]["from_s"]]
    gaps = Samples.of(length for _, length, _ in all_gaps)
    own_gaps = Samples.of(length - waited for _, length, waited in all_gaps)
    asked, own = Samples.of(took for took, _ in late), Samples.of(own for _, own in late)
    return {
        "windows": rows,
        "health_p99_ms": 1e3 * asked.percentile(0.99),
        "health_max_ms": 1e3 * max(asked.values),
        "health_own_p99_ms": 1e3 * own.percentile(0.99),
        "health_own_max_ms": 1e3 * max(own.values),
        "longest_gap_ms": max(row["longest_gap_ms"] for row in rows[1:]),
        "gap_p99_ms": 1e3 * gaps.percentile(0.99),
        "gap_own_p99_ms": 1e3 * own_gaps.percentile(0.99),
        "gap_own_p999_ms": 1e3 * own_gaps.percentile(0.999),
        "longest_own_gap_ms": 1e3 * max(own_gaps.values),
        "nodes_lost": _node_losses(where.http) - losses_before,
        "streams": len(stream_rows),
        "streams_failed": sum(bool(row["error"]) for row in stream_rows),
        "streams_wrong": sum(not row["right"] for row in stream_rows),
        "rss_before_mib": rss_before / 2**20,
        "rss_after_mib": router.memory_info().rss / 2**20,
        "rss_peak_mib": _peak_rss(router.pid) / 2**20,
    }


def _window(name: str, send: Callable[[], str | None], window_s: float, router: psutil.Process) -> dict[str, Any]:
    """Send repeatedly during the window; returns the answers and the start and end."""
    from_s = time.monotonic()
    answers: list[str] = []
    while time.monotonic() - from_s < window_s:
        answers.append(send() or "")
    time.sleep(1.0)  # left over from the window before
    return {
        "name": name,
        "from_s": from_s,
        "to_s": time.monotonic(),
        "sent": len(answers),
        "answer": answers[-1],
        "rss_mib": router.memory_info().rss / 2**20,
    }


def _row(window: dict[str, Any], health: list[Any], streams: list[Any]) -> dict[str, Any]:
    first, last = window["from_s"], window["to_s"]
    took = Samples.of(took for at, took, _ in health if first <= at <= last)
    own = Samples.of(took - waited for at, took, waited in health if first <= at <= last)
    gaps = [gap for stream in streams for gap in stream["gaps"] if gap[0] <= last and gap[0] + gap[1] >= first]
    return {
        "input": window["name"],
        "sent": window["sent"],
        "answer": window["answer"],
        "health_p50_ms": 1e3 * took.median,
        "health_p99_ms": 1e3 * took.percentile(0.99),
        "health_max_ms": 1e3 * max(took.values),
        "health_own_p99_ms": 1e3 * own.percentile(0.99),
        "health_own_max_ms": 1e3 * max(own.values),
        "longest_gap_ms": 1e3 * max((length for _, length, _ in gaps), default=0.0),
        "longest_own_gap_ms": 1e3 * max((length - waited for _, length, waited in gaps), default=0.0),
        "rss_mib": window["rss_mib"],
    }


def _post(url: str, path: str, body: bytes) -> str:
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_SEND_TIMEOUT_S)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read()
        return str(response.status)
    except (BrokenPipeError, ConnectionResetError):
        # Refused before the body was read: the server answered and closed.
        return "closed"
    finally:
        connection.close()


def _generate(where: Cluster, run_dir: Path, prompt: str) -> str:
    address = json.loads((run_dir / "hostile.json").read_text())["grpc"]
    with grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel:
        try:
            for _ in router_pb2_grpc.RouterStub(channel).Generate(
                router_pb2.GenerateRequest(prompt=prompt), timeout=_SEND_TIMEOUT_S
            ):
                pass
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def _node_losses(url: str) -> int:
    text = httpx.get(f"{url}/metrics", timeout=30.0).text
    return int(sum(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith("baton_node_losses_total")))


def _peak_rss(pid: int) -> int:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
