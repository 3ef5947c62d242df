"""Whole workers in this process, without a model but with real engine threads, real gRPC and real KV transfer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from node_harness import WAIT_S, Router, session

from baton import codec
from baton.types import KvLayout, Role, SequenceSpec
from baton.v1 import node_pb2, node_pb2_grpc
from cli.worker import Allocate, LoadedModel, WorkerConfig, serve
from engine.fake import FakeRunner

LAYOUT = KvLayout(3, 48, 2, 8, 16, "float32")


def fake_load(step_delay_s: float = 0.0, num_blocks: int = LAYOUT.num_blocks) -> Any:
    layout = KvLayout(3, num_blocks, 2, 8, 16, "float32")

    def load(config: WorkerConfig, allocate: Allocate) -> LoadedModel:
        return FakeRunner(
            layout,
            buffer=allocate(layout.total_bytes),
            vocab_size=1000,
            max_model_tokens=600,
            step_delay_s=step_delay_s,
        )

    return load


@dataclass
class Worker:
    address: str
    node_id: str
    task: asyncio.Task[None]
    stop: asyncio.Event

    async def ledger(self) -> dict[str, str]:
        async with grpc.aio.insecure_channel(self.address) as channel:
            answer = await node_pb2_grpc.NodeStub(channel).Ledger(node_pb2.LedgerRequest())
        assert answer.free_blocks + sum(o.num_blocks for o in answer.owners) == answer.total_blocks
        return {owner.owner: owner.state for owner in answer.owners}

    async def until_ledger(self, expected: dict[str, str], timeout_s: float = WAIT_S) -> None:
        async with asyncio.timeout(timeout_s):
            while (found := await self.ledger()) != expected:  # noqa: ASYNC110 - another machine's state
                await asyncio.sleep(0.005)
        assert found == expected


@asynccontextmanager
async def worker(tmp_path: Path, node_id: str, role: Role = Role.MIXED, **settings: Any) -> AsyncIterator[Worker]:
    load = fake_load(settings.pop("step_delay_s", 0.0), settings.pop("num_blocks", LAYOUT.num_blocks))
    ready, stop = tmp_path / f"{node_id}.json", asyncio.Event()
    ready.unlink(missing_ok=True)
    settings = {"max_batch_tokens": 64, "max_num_seqs": 16, "grace_s": 5.0, **settings}
    config = WorkerConfig(model=Path("fake"), role=role, node_id=node_id, ready_file=ready, **settings)
    task = asyncio.create_task(serve(config, load=load, stop=stop))
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

    prefill_worker: Worker
    decode_worker: Worker
    prefill: Router
    decode: Router

    async def reserve(self, sequence: SequenceSpec, ttl_s: float = 20.0) -> Any:
        await self.decode.reserve(sequence, ttl_s, self.prefill_worker.node_id)
        return codec.lease_from_pb(await self.decode.next("reserved"))

    async def relay(self, sequence: SequenceSpec) -> list[int]:
        """Everything goes well: the tokens of one request, nothing else under way."""
        lease = await self.reserve(sequence)
        await self.prefill.run(sequence, lease)
        tokens = list((await self.prefill.next("tokens")).token_ids)
        await self.prefill.next("prefills")
        assert (await self.decode.next("joined")).sequence_id == sequence.sequence_id
        tokens += await self.decode.tokens()
        report = await self.prefill.next("handed_off")
        assert report.report.num_blocks == LAYOUT.blocks_for(sequence.num_known_tokens)
        return tokens

    async def settled(self, timeout_s: float = WAIT_S) -> None:
        await self.prefill_worker.until_ledger({}, timeout_s)
        await self.decode_worker.until_ledger({}, timeout_s)


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
        to_prefill = await stack.enter_async_context(session(p.address, "prefill"))
        to_decode = await stack.enter_async_context(session(d.address, "decode"))
        await to_prefill.hello()
        await to_decode.hello()
        yield Pair(p, d, to_prefill, to_decode)
