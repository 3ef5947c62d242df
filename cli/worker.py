"""Wires one worker: a model replica, both ends of KV transfer, and every node service, in one process. Wiring only.

The start is all or nothing: the worker answers Describe once its model is loaded and everything else runs. SIGTERM and
SIGINT stop it: nothing new is accepted, what runs may end within the grace time, the rest is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from baton import PROTOCOL_VERSION, __version__
from baton.clock import MonotonicClock
from baton.errors import BadConfig, InternalError
from baton.server import GrpcServer
from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role
from baton.v1 import node_pb2_grpc, transfer_pb2_grpc
from cli.node import NodeService
from decode_node.service import DecodeConfig, DecodeService
from engine.blocks import BlockPool
from engine.replica import Replica, RunnerLike
from engine.schedule import Scheduler, SchedulerConfig
from kvtransfer.arena import Arena
from kvtransfer.config import TransferConfig
from kvtransfer.host import host_id
from kvtransfer.receiver import Arrived, Quarantined, Receiver, ReceiverNotice, Released
from kvtransfer.sender import Sender
from prefill_node.service import PrefillService

# Fresh pages of shared memory come at 0.25 to 1.8 GB/s, 10 to 50 times slower than a copy.
_PREFAULT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything a worker can be told. ``transports`` is best first; ``num_blocks`` wins over ``kv_bytes``."""

    model: Path
    role: Role
    # Empty: made from role, host and port.
    node_id: str = ""
    listen: str = "127.0.0.1:0"
    # Host that others reach this worker at, if it is not the one it listens on.
    advertise_host: str = ""
    # Empty: the model folder's name.
    model_name: str = ""
    dtype: str = "auto"
    kernels: str = "auto"
    kv_bytes: int = 1 << 30
    num_blocks: int | None = None
    block_tokens: int = 64
    max_batch_tokens: int = 2048
    max_num_seqs: int = 256
    max_waiting: int = 1024
    max_preemptions: int = 3
    watermark: float = 0.01
    # 0: torch's own choice.
    num_threads: int = 0
    transports: tuple[str, ...] = ("shm", "tcp")
    # Off gives up the check of what arrived; the whole cluster must agree.
    digest: bool = True
    # None: as measured for each transport.
    layerwise_from_bytes: int | None = None
    lease_ttl_s: float = 30.0
    max_lease_ttl_s: float = 600.0
    # How long running sequences may go on after SIGTERM.
    grace_s: float = 10.0
    # Health turns NOT_SERVING when the engine makes no progress for this long.
    stall_limit_s: float = 30.0
    # Gets {node_id, role, pid, address} once all is served.
    ready_file: Path | None = None
    ready_fd: int | None = None

    def __post_init__(self) -> None:
        for name in ("grace_s", "lease_ttl_s", "stall_limit_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise BadConfig(f"{name} is {value}, expected a positive number of seconds", param=name)
        if self.num_blocks is not None and self.num_blocks < 1:
            raise BadConfig(f"num_blocks is {self.num_blocks}, expected at least 1", param="num_blocks")


class LoadedModel(RunnerLike, Protocol):
    """A runner that says what it runs."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def description(self) -> ModelDescription: ...

    @property
    def device(self) -> str: ...

    @property
    def kernels(self) -> str: ...


# Gives the bytes of the KV cache, in memory that peers on this host can map.
Allocate = Callable[[int], memoryview]
Load = Callable[[WorkerConfig, Allocate], LoadedModel]


def load_model(config: WorkerConfig, allocate: Allocate) -> LoadedModel:
    """The model in ``config.model``. Raises UnsupportedModel, BadConfig. Takes seconds: call it off the event loop."""
    # Torch takes seconds to import; nobody but a worker with a model should pay for it.
    from engine.config import EngineConfig
    from engine.runner import Runner

    engine = EngineConfig(
        dtype=config.dtype,
        block_tokens=config.block_tokens,
        num_blocks=config.num_blocks,
        kv_bytes=config.kv_bytes,
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        kernels=config.kernels,
        num_threads=config.num_threads,
    )
    return Runner.load(config.model, engine, allocate=allocate)


async def serve(config: WorkerConfig, *, load: Load = load_model, stop: asyncio.Event | None = None) -> None:
    """Run a worker until SIGTERM, SIGINT or ``stop``. Raises InternalError if its engine dies."""
    arenas: list[Arena] = []

    def allocate(num_bytes: int) -> memoryview:
        arenas.append(Arena.create(num_bytes))
        return arenas[-1].buffer

    try:
        model = await asyncio.to_thread(load, config, allocate)
        if len(arenas) != 1:
            raise InternalError(f"the model's KV cache lies in {len(arenas)} arenas, expected 1")
        arenas[0].prefault_in_background(_first_pages(model.layout))
        worker = _Worker(config, model, arenas[0])
        async with _stop_signals(stop or asyncio.Event()) as stopped:
            await worker.run(stopped)
    finally:
        for arena in arenas:
            arena.close()


def _first_pages(layout: KvLayout) -> list[tuple[int, int]]:
    """The leading blocks of each layer, which the pool hands out first. Not all: a generous default costs no memory."""
    num_blocks = min(layout.num_blocks, _PREFAULT_BYTES // (layout.num_layers * layout.block_bytes))
    return [(layout.offset(i, 0), layout.offset(i, num_blocks)) for i in range(layout.num_layers)]


@contextlib.asynccontextmanager
async def _stop_signals(stop: asyncio.Event) -> AsyncIterator[asyncio.Event]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class _Worker:
    """All parts of one worker, and the order in which they start and stop."""

    def __init__(self, config: WorkerConfig, model: LoadedModel, arena: Arena) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._died: asyncio.Future[None] = self._loop.create_future()
        clock = MonotonicClock()
        transfer = TransferConfig(transports=config.transports, digest=config.digest)
        if config.layerwise_from_bytes is not None:
            at = dict.fromkeys(transfer.transport_names, config.layerwise_from_bytes)
            transfer = replace(transfer, layerwise_from_bytes=at)
        layout = model.layout
        self._server = GrpcServer()
        address = self._server.bind(config.listen, advertise_host=config.advertise_host or None)
        self.node = _describe(config, model, address, transfer)
        self._replica = Replica(
            model,
            Scheduler(_scheduler_config(config, model), BlockPool(layout.num_blocks)),
            num_layers=layout.num_layers,
            clock=clock,
            on_fatal=self._from_dying_engine,
        )
        self._sender = Sender(self.node, layout, arena, config=transfer, clock=clock)
        self._receiver = Receiver(self.node, layout, arena, on_event=self._from_receiver, config=transfer, clock=clock)
        self._prefill = PrefillService(
            replica=self._replica,
            sender=self._sender,
            describe=lambda: self.node,
            status=self._status,
            node_id=self.node.node_id,
            clock=clock,
        )
        self._decode = DecodeService(
            replica=self._replica,
            receiver=self._receiver,
            describe=lambda: self.node,
            status=self._status,
            node_id=self.node.node_id,
            clock=clock,
            config=DecodeConfig(config.lease_ttl_s, max(config.lease_ttl_s, config.max_lease_ttl_s)),
        )
        add = self._server.add
        node_service = NodeService(self.node, self._status, self._replica)
        add(node_pb2_grpc.add_NodeServicer_to_server, node_service, "baton.v1.Node")
        add(node_pb2_grpc.add_PrefillNodeServicer_to_server, self._prefill, "baton.v1.PrefillNode")
        add(node_pb2_grpc.add_DecodeNodeServicer_to_server, self._decode, "baton.v1.DecodeNode")
        add(transfer_pb2_grpc.add_KvTransferServicer_to_server, self._receiver, "baton.v1.KvTransfer")

    async def run(self, stop: asyncio.Event) -> None:
        await self._receiver.start()
        await self._sender.start()
        self._replica.start()
        try:
            await self._server.start()
            self._announce()
            await self._serve(stop)
        finally:
            closing = asyncio.ensure_future(self._close())
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                await closing
                raise

    async def _serve(self, stop: asyncio.Event) -> None:
        """Until ``stop``, then until all work is done or the grace time is over."""
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch_health())
            stopping = tasks.create_task(stop.wait())
            ends: set[asyncio.Future[Any]] = {stopping, self._died}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            watching.cancel()
            stopping.cancel()
        if self._died.done():
            self._died.result()
        self._replica.drain()
        await self._server.set_serving(False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.grace_s):
                await self._prefill.drained()
                await self._decode.drained()

    async def _close(self) -> None:
        await self._prefill.close(self._config.grace_s)
        self._decode.close()
        await self._sender.close()
        await self._receiver.close()
        await self._server.stop(1.0)
        if not await asyncio.to_thread(self._replica.stop, self._config.grace_s):
            logging.getLogger(__name__).error("the engine's last step did not end in %s s", self._config.grace_s)

    async def _watch_health(self) -> None:
        """Readiness is about oneself: red while the engine is wedged."""
        is_serving = True
        while True:
            await asyncio.sleep(min(1.0, self._config.stall_limit_s / 4))
            if is_serving != (self._replica.stalled_s < self._config.stall_limit_s):
                is_serving = not is_serving
                await self._server.set_serving(is_serving)

    def _status(self) -> NodeStatus:
        return self._replica.status(self.node.role)

    def _from_receiver(self, notice: ReceiverNotice) -> None:
        match notice:
            case Arrived(sequence_id, _, first_token):
                self._decode.arrived(sequence_id, first_token)
            case Quarantined(sequence_id, _, reason):
                self._decode.quarantined(sequence_id, reason)
            case Released(sequence_id, _, reason):
                self._decode.released(sequence_id, reason)

    def _from_dying_engine(self, error: BaseException) -> None:
        """Called in the engine thread."""
        self._loop.call_soon_threadsafe(self._engine_died, error)

    def _engine_died(self, error: BaseException) -> None:
        if not self._died.done():
            self._died.set_exception(InternalError(f"the engine died: {type(error).__name__}: {error}"))

    def _announce(self) -> None:
        node = self.node
        text = json.dumps({"node_id": node.node_id, "role": node.role.value, "pid": node.pid, "address": node.address})
        if self._config.ready_file is not None:
            # Whoever waits for the file must never read half of it.
            partial = self._config.ready_file.with_name(f"{self._config.ready_file.name}.{os.getpid()}")
            partial.write_text(text + "\n")
            partial.replace(self._config.ready_file)
        if self._config.ready_fd is not None:
            with os.fdopen(self._config.ready_fd, "w") as pipe:
                pipe.write(text + "\n")


def _describe(config: WorkerConfig, model: LoadedModel, address: str, transfer: TransferConfig) -> NodeDescription:
    return NodeDescription(
        node_id=config.node_id or f"{config.role.value}-{address}",
        incarnation=secrets.randbits(63) | 1,
        role=config.role,
        home_role=config.role,
        address=address,
        model=replace(model.description, name=config.model_name) if config.model_name else model.description,
        kv_layout=model.layout,
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        host_id=host_id(),
        transports=transfer.transport_names,
        device=model.device,
        kernels=model.kernels,
        software_version=__version__,
    )


def _scheduler_config(config: WorkerConfig, model: LoadedModel) -> SchedulerConfig:
    return SchedulerConfig(
        block_tokens=model.layout.block_tokens,
        max_model_tokens=model.description.max_model_tokens,
        vocab_size=model.description.vocab_size,
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_waiting=config.max_waiting,
        max_preemptions=config.max_preemptions,
        watermark=config.watermark,
    )
