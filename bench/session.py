"""How long a token waits behind a neighbour's prompt: head-of-line blocking of a session.

A worker with a fake model, in a process of its own, generates one token each few milliseconds. Its gaps between tokens
are measured at the router's end of the session: alone, beside reservations of 100,000-token prompts in the session of
another router, and beside the same reservations in its own session. The second against the first is what a prompt costs
the worker's event loop, the third against the second is what the shared stream adds.

    python -m bench session
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from grpc import aio

from baton import codec
from baton.types import KvLayout, Role, SamplingParams, SequenceSpec
from baton.v1 import node_pb2
from engine.fake import FakeRunner
from router.nodes.sessions import hello
from worker.config import WorkerConfig
from worker.loading import Allocate, LoadedModel
from worker.worker import serve

_STEP_S = 0.004
_PROMPT_TOKENS = 100_000
_INTERVAL_S = 0.1
_LAYOUT = KvLayout(1, 8192, 1, 8, 16, "float32")
_MODES = ("alone", "another session", "the same session")


def run(quick: bool) -> dict[str, Any]:
    """Gaps between tokens by what runs beside them; quick takes a tenth of the time."""
    with tempfile.TemporaryDirectory() as folder:
        ready_file = Path(folder) / "ready.json"
        process = subprocess.Popen([sys.executable, "-m", "bench.session", str(ready_file)])
        try:
            while not ready_file.exists():
                assert process.poll() is None, "the worker did not start"
                time.sleep(0.05)
            address = json.loads(ready_file.read_text())["address"]
            return asyncio.run(_measure(address, num_rounds=1 if quick else 5))
        finally:
            process.terminate()
            process.wait(10.0)


def main() -> None:
    """The worker's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ready_file", type=Path)
    config = WorkerConfig(model=Path("fake"), role=Role.MIXED, ready_file=parser.parse_args().ready_file)
    asyncio.run(serve(config, load=_load))


def _load(config: WorkerConfig, allocate: Allocate) -> LoadedModel:
    buffer = allocate(_LAYOUT.total_bytes)
    assert isinstance(buffer, memoryview)
    return FakeRunner(_LAYOUT, buffer=buffer, vocab_size=512, max_model_tokens=2 * _PROMPT_TOKENS, step_delay_s=_STEP_S)


async def _measure(address: str, num_rounds: int) -> dict[str, Any]:
    gaps_ms: dict[str, list[float]] = {mode: [] for mode in _MODES}
    for number in range(num_rounds):
        for mode in _MODES:
            gaps_ms[mode] += await _round(address, mode, f"{number}-{mode}")
    rows = [_row(*row) for row in gaps_ms.items()]
    return {"prompt_tokens": _PROMPT_TOKENS, "prompts_per_s": 1 / _INTERVAL_S, "gaps": rows}


def _row(mode: str, gaps_ms: list[float]) -> dict[str, Any]:
    ordered = sorted(gaps_ms)
    return {
        "beside": mode,
        "num_gaps": len(ordered),
        "mean_ms": statistics.fmean(ordered),
        "p50_ms": ordered[len(ordered) // 2],
        "p99_ms": ordered[len(ordered) * 99 // 100],
        "max_ms": ordered[-1],
        "samples_ms": gaps_ms,
    }


async def _round(address: str, mode: str, name: str) -> list[float]:
    async with _session(address, "decoding") as own, _session(address, "neighbour") as other:
        beside = {"alone": None, "another session": other, "the same session": own}[mode]
        writer = None if beside is None else asyncio.create_task(_reserve(beside, name))
        arrivals: list[float] = []
        await own.write(_run_request(name))
        while not arrivals or len(arrivals) < 500:
            response = await own.read()
            assert response is not aio.EOF, "the worker ended the session"
            arrivals += [time.perf_counter() for tokens in response.tokens if tokens.sequence_id == name]
        if writer is not None:
            writer.cancel()
    return [1000 * (b - a) for a, b in itertools.pairwise(arrivals)]


async def _reserve(session: Any, name: str) -> None:
    prompt = tuple(range(512)) * (_PROMPT_TOKENS // 512)
    number = 0
    while True:
        number += 1
        request = _request(f"{name}-{number}", prompt)
        # As the router does: serialized ahead, so that it costs this loop next to nothing.
        await session.write(request)
        await asyncio.sleep(_INTERVAL_S)


def _request(sequence_id: str, prompt: tuple[int, ...]) -> bytes:
    spec = SequenceSpec(sequence_id, prompt, SamplingParams(seed=0, max_tokens=1))
    reserve = node_pb2.SessionRequest.Reserve(sequence=codec.sequence_to_pb(spec), ttl_s=0.05, prefill_node_id="p")
    return node_pb2.SessionRequest(reserve=reserve).SerializeToString()


def _run_request(sequence_id: str) -> bytes:
    spec = SequenceSpec(sequence_id, (1, 2, 3), SamplingParams(seed=0, temperature=0.0, max_tokens=1000))
    run = node_pb2.SessionRequest.Run(sequence=codec.sequence_to_pb(spec))
    return node_pb2.SessionRequest(run=run).SerializeToString()


@asynccontextmanager
async def _session(address: str, router_id: str) -> AsyncIterator[Any]:
    async with aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        open_session: aio.StreamStreamMultiCallable[bytes, node_pb2.SessionResponse] = channel.stream_stream(
            "/baton.v1.Node/Session", response_deserializer=node_pb2.SessionResponse.FromString
        )
        call = open_session()
        try:
            await call.write(node_pb2.SessionRequest(hello=hello(router_id, 1)).SerializeToString())
            welcome = await call.read()
            assert isinstance(welcome, node_pb2.SessionResponse)
            assert welcome.welcome.node.node_id
            yield call
        finally:
            call.cancel()


if __name__ == "__main__":
    main()
