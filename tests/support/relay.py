"""Whole workers in this process, without a model but with real engine threads, real gRPC and real KV transfer."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton import codec
from baton.types import KvLayout, Role, SequenceSpec
from baton.v1 import node_pb2, node_pb2_grpc
from engine.config import EngineConfig
from engine.fake import FakeRunner, expected_tokens
from engine.scheduler_config import SchedulerConfig
from kvtransfer.config import TransferConfig
from tests.support.node import WAIT_S, Router, session, spec
from tests.support.root import ROOT
from worker.config import WorkerConfig
from worker.departure import DrainConfig
from worker.loading import Allocate, LoadedModel, cuda_device
from worker.worker import serve

# A worker with a fake model, as a module to run.
CHILD = "tests.support.worker_child"
LAYOUT = KvLayout(3, 48, 2, 8, 16, "float32")
VOCAB = 1000


def oracle(sequence: SequenceSpec) -> list[int]:
    """The tokens of an undisturbed run."""
    return expected_tokens(sequence, LAYOUT, VOCAB)


def fake_load(step_delay_s: float = 0.0, num_blocks: int = LAYOUT.num_blocks) -> Any:
    layout = KvLayout(3, num_blocks, 2, 8, 16, "float32")

    def load(config: WorkerConfig, allocate: Allocate) -> LoadedModel:
        return FakeRunner(
            layout,
            buffer=allocate(layout.total_bytes),
            vocab_size=VOCAB,
            max_model_tokens=600,
            step_delay_s=step_delay_s,
        )

    return load


@dataclass
class Serving:
    """A worker, as others see it."""

    address: str
    node_id: str

    async def ledger(self) -> dict[str, str]:
        """State by owner; cached blocks have none."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            answer = await node_pb2_grpc.NodeStub(channel).Ledger(node_pb2.LedgerRequest())
        assert answer.free_blocks + sum(o.num_blocks for o in answer.owners) == answer.total_blocks
        return {owner.owner: owner.state for owner in answer.owners if owner.state != "cached"}

    async def until_ledger(self, expected: dict[str, str], timeout_s: float = WAIT_S) -> None:
        async with asyncio.timeout(timeout_s):
            while (found := await self.ledger()) != expected:  # noqa: ASYNC110 - another machine's state
                await asyncio.sleep(0.005)
        assert found == expected

    async def until_healthy(self, timeout_s: float = WAIT_S) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel, asyncio.timeout(timeout_s):
            health = health_pb2_grpc.HealthStub(channel)
            request, serving = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse.SERVING
            while (await health.Check(request)).status != serving:  # noqa: ASYNC110 - another machine's state
                await asyncio.sleep(0.01)

    async def serves(self) -> None:
        """It is healthy, and computes a sequence that stays with it: the right tokens."""
        await self.until_healthy()
        async with session(self.address) as router:
            await router.hello("probe")
            sequence = spec("probe", 40, max_tokens=6)
            await router.run(sequence)
            assert await router.tokens() == oracle(sequence)


@dataclass
class Worker(Serving):
    """One in this process."""

    task: asyncio.Task[bool]
    stop: asyncio.Event


@asynccontextmanager
async def worker(tmp_path: Path, node_id: str, role: Role = Role.MIXED, **settings: Any) -> AsyncIterator[Worker]:
    """``load`` and ``model`` in the settings make it a worker with a real model. Fields of WorkerConfig, and of its
    parts ``transports``, ``layerwise_from_bytes`` and ``grace_s``."""
    load = settings.pop("load", None)
    open_device = settings.pop("open_device", cuda_device)
    if load is None:
        load = fake_load(settings.pop("step_delay_s", 0.0), settings.pop("num_blocks", LAYOUT.num_blocks))
    ready, stop = tmp_path / f"{node_id}.json", asyncio.Event()
    ready.unlink(missing_ok=True)
    transfer = {name: settings.pop(name) for name in ("transports", "layerwise_from_bytes") if name in settings}
    settings = {
        "model": Path("fake"),
        "engine": EngineConfig(scheduler=SchedulerConfig(max_batch_tokens=64, max_num_seqs=16)),
        "transfer": TransferConfig(**transfer),
        "drain": DrainConfig(grace_s=settings.pop("grace_s", 5.0)),
        **settings,
    }
    config = WorkerConfig(role=role, node_id=node_id, ready_file=ready, **settings)
    task = asyncio.create_task(serve(config, load=load, stop=stop, open_device=open_device))
    try:
        async with asyncio.timeout(WAIT_S):
            while not ready.exists() and not task.done():  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.005)
        if task.done():
            await task
        found = json.loads(ready.read_text())
        assert (found["node_id"], found["role"]) == (node_id, role.value)
        yield Worker(found["address"], node_id, task, stop)
    finally:
        stop.set()
        async with asyncio.timeout(30):
            await task


@dataclass
class Pair:
    """What a router has of one prefill and one decode node."""

    prefill_worker: Serving
    decode_worker: Serving
    prefill: Router
    decode: Router

    async def reserve(self, sequence: SequenceSpec, ttl_s: float = 20.0) -> Any:
        await self.decode.reserve(sequence, ttl_s, self.prefill_worker.node_id)
        return codec.lease_from_pb(await self.decode.until("reserved"))

    async def relay(self, sequence: SequenceSpec) -> list[int]:
        """Everything goes well: the tokens of one request, nothing else under way."""
        lease = await self.reserve(sequence)
        await self.prefill.run(sequence, lease)
        tokens = list((await self.prefill.next("tokens")).token_ids)
        await self.prefill.next("prefills")
        assert (await self.decode.next("joined")).sequence_id == sequence.sequence_id
        tokens += await self.decode.tokens()
        report = await self.prefill.next("handed_off")
        assert report.report.num_blocks == LAYOUT.blocks_for(sequence.num_known_tokens) - lease.num_cached_blocks
        return tokens

    def forget(self) -> None:
        """Drop everything heard so far."""
        for router in (self.prefill, self.decode):
            while not router.inbox.empty():
                router.inbox.get_nowait()

    async def settled(self, timeout_s: float = WAIT_S) -> None:
        await self.prefill_worker.until_ledger({}, timeout_s)
        await self.decode_worker.until_ledger({}, timeout_s)

    async def unharmed(self, timeout_s: float = WAIT_S, *, moves: bool = True) -> None:
        await unharmed(self.prefill_worker, self.decode_worker, timeout_s, moves=moves)


@asynccontextmanager
async def pair(tmp_path: Path, **settings: Any) -> AsyncIterator[Pair]:
    """``prefill_`` and ``decode_`` before a setting's name give it to one of them."""

    def of(side: str) -> dict[str, Any]:
        mine = {k.removeprefix(side): v for k, v in settings.items() if k.startswith(side)}
        shared = {k: v for k, v in settings.items() if not k.startswith(("prefill_", "decode_"))}
        return {**shared, **mine}

    async with AsyncExitStack() as stack:
        p = await stack.enter_async_context(worker(tmp_path, "p0", Role.PREFILL, **of("prefill_")))
        d = await stack.enter_async_context(worker(tmp_path, "d0", Role.DECODE, **of("decode_")))
        to_prefill = await stack.enter_async_context(session(p.address))
        to_decode = await stack.enter_async_context(session(d.address))
        await to_prefill.hello()
        await to_decode.hello()
        yield Pair(p, d, to_prefill, to_decode)


async def unharmed(prefill: Serving, decode: Serving, timeout_s: float = WAIT_S, *, moves: bool = True) -> None:
    """Both have all blocks back and are healthy, and serve another router's sequence with the right tokens.

    ``moves``: also one that is handed over, where no fault of the transport stands against it.
    """
    for node in (prefill, decode):
        await node.until_ledger({}, timeout_s)
        await node.serves()
    if moves:
        async with session(prefill.address) as to_prefill, session(decode.address) as to_decode:
            await to_prefill.hello("probe")
            await to_decode.hello("probe")
            sequence = spec("probe moves", 50, max_tokens=6)
            assert await Pair(prefill, decode, to_prefill, to_decode).relay(sequence) == oracle(sequence)
    for node in (prefill, decode):
        await node.until_ledger({}, timeout_s)


class Load:
    """Many requests at once over one pair; what is refused is asked for again. Any failure fails the test."""

    def __init__(self, relay: Pair, sequences: list[SequenceSpec], *, at_once: int, limit_s: float = 60.0) -> None:
        self._relay = relay
        self._limit_s = limit_s
        self._todo = list(sequences)
        self._by_id = {s.sequence_id: s for s in sequences}
        # Not whole yet.
        self._left = set(self._by_id)
        self._slots = asyncio.Semaphore(at_once)
        self._tokens: dict[str, dict[int, list[int]]] = {s.sequence_id: {} for s in sequences}
        # How many tokens there will be, once the last is known.
        self._totals: dict[str, int] = {}
        self._news = asyncio.Event()
        self.num_refused = 0

    async def run(self) -> dict[str, list[int]]:
        """Every token of every request, in order."""
        async with asyncio.timeout(self._limit_s), asyncio.TaskGroup() as tasks:
            helpers = [
                tasks.create_task(self._listen(self._relay.prefill, self._from_prefill)),
                tasks.create_task(self._listen(self._relay.decode, self._from_decode)),
                tasks.create_task(self._ask()),
            ]
            while self._left:
                self._news.clear()
                await self._news.wait()
            for helper in helpers:
                helper.cancel()
        return {name: [t for i in sorted(parts) for t in parts[i]] for name, parts in self._tokens.items()}

    def _is_whole(self, name: str) -> bool:
        return name in self._totals and sum(map(len, self._tokens[name].values())) == self._totals[name]

    async def _ask(self) -> None:
        while True:
            await self._slots.acquire()
            while not self._todo:  # noqa: ASYNC110 - what was refused comes back here
                await asyncio.sleep(0.01)
            await self._relay.decode.reserve(self._todo.pop(0), 20.0, self._relay.prefill_worker.node_id)

    async def _listen(self, router: Router, hear: Any) -> None:
        while True:
            kind, item = await router.inbox.get()
            if kind == "tokens":
                self._hear_tokens(item)
            else:
                await hear(kind, item)

    def _hear_tokens(self, item: Any) -> None:
        parts = self._tokens[item.sequence_id]
        assert item.index not in parts, "a token came twice"
        parts[item.index] = list(item.token_ids)
        if item.finish_reason:
            self._totals[item.sequence_id] = item.index + len(item.token_ids)
            self._slots.release()
        if self._is_whole(item.sequence_id):
            self._left.discard(item.sequence_id)
            self._news.set()

    async def _from_prefill(self, kind: str, item: Any) -> None:
        assert kind in ("prefills", "handed_off"), item

    async def _from_decode(self, kind: str, item: Any) -> None:
        if kind == "reserved":
            lease = codec.lease_from_pb(item)
            await self._relay.prefill.run(self._by_id[lease.sequence_id], lease)
        elif kind == "refused":
            assert item.failure.retryable, item
            self.num_refused += 1
            self._todo.append(self._by_id[item.sequence_id])
            self._slots.release()
        elif kind == "failed":
            # A lease that went back because the first token was the last.
            assert self._by_id[item.sequence_id].sampling.max_tokens == 1, item


@dataclass
class ProcessWorker(Serving):
    """A worker in a process of its own, which can be stopped, killed and restarted."""

    process: asyncio.subprocess.Process

    @classmethod
    async def start(
        cls,
        tmp_path: Path,
        node_id: str,
        role: str,
        *,
        listen: str = "127.0.0.1:0",
        step_delay_s: float = 0.0,
        transports: tuple[str, ...] = (),
    ) -> ProcessWorker:
        ready = tmp_path / f"{node_id}.json"
        ready.unlink(missing_ok=True)
        arguments = (node_id, role, listen, str(ready), str(step_delay_s), *transports)
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", CHILD, *arguments, cwd=ROOT)
        async with asyncio.timeout(30):
            while not ready.exists() and process.returncode is None:  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.01)
        assert process.returncode is None, "the worker did not start"
        found = json.loads(ready.read_text())
        assert found["pid"] == process.pid
        return cls(found["address"], node_id, process)

    async def describe(self) -> node_pb2.DescribeResponse:
        async with grpc.aio.insecure_channel(self.address) as channel:
            return await node_pb2_grpc.NodeStub(channel).Describe(node_pb2.DescribeRequest())

    def stop(self) -> None:
        """SIGSTOP: it lives, holds its connections and says nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def terminate(self) -> int:
        self.process.terminate()
        async with asyncio.timeout(30):
            return await self.process.wait()


@asynccontextmanager
async def process_worker(tmp_path: Path, node_id: str, role: str, **settings: Any) -> AsyncIterator[ProcessWorker]:
    started = await ProcessWorker.start(tmp_path, node_id, role, **settings)
    try:
        yield started
    finally:
        await started.kill()


@asynccontextmanager
async def process_pair(
    tmp_path: Path,
    *,
    prefill: Mapping[str, Any] = MappingProxyType({}),
    decode: Mapping[str, Any] = MappingProxyType({}),
) -> AsyncIterator[tuple[Pair, ProcessWorker, ProcessWorker]]:
    """A prefill and a decode worker in processes of their own; each with its settings of ``ProcessWorker.start``."""
    async with (
        process_worker(tmp_path, "p0", "prefill", **prefill) as p,
        process_worker(tmp_path, "d0", "decode", **decode) as d,
        session(p.address) as to_prefill,
        session(d.address) as to_decode,
    ):
        await to_prefill.hello()
        await to_decode.hello()
        yield Pair(p, d, to_prefill, to_decode), p, d
