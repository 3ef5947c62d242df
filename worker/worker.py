"""Wires one worker: a model replica, both ends of KV transfer, and every node service, in one process. Wiring only.

The start is all or nothing: the worker answers Describe once its model is loaded and everything else runs. SIGTERM,
SIGINT and Node/Drain let it leave the way worker/departure says.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from baton import descriptors
from baton.access import PeerKey
from baton.channels import peer_credentials
from baton.clock import MonotonicClock
from baton.defects import Defects
from baton.errors import InternalError, UnsupportedModel, described
from baton.faults.faults import Faults
from baton.faults.kinds import Layer
from baton.files import is_there
from baton.guard import Guard, Refusals
from baton.metrics import exposition
from baton.metrics_server import MetricsServer
from baton.prefix import PrefixScheme
from baton.registry import NodeRecord, Registry
from baton.server import GrpcServer
from baton.timeline import Timeline
from baton.types import NodeDescription
from baton.v1 import node_pb2_grpc, transfer_pb2_grpc
from engine.blocks import BlockPool
from engine.grammars import Grammars, load_tokenizer
from engine.replica import Replica
from engine.schedule import Scheduler
from engine.step import StepPlan
from kvtransfer.devices.interface import Device
from kvtransfer.digest import block_digest
from kvtransfer.memory import Memory
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from worker import departure, energy
from worker.admin import NodeServicer, add_sessions_of_protocol_1
from worker.announce import announce, describe
from worker.config import WorkerConfig
from worker.health import Health
from worker.leaving import Leaving
from worker.loading import Load, LoadedModel, Loading, cuda_device, load_model
from worker.metrics import WorkerMetrics
from worker.registration import Registration
from worker.roles import RoleChanged
from worker.service import NodeService

_log = logging.getLogger("baton.worker")


async def serve(
    config: WorkerConfig,
    *,
    load: Load = load_model,
    stop: asyncio.Event | None = None,
    open_device: Callable[[str], Device] = cuda_device,
) -> bool:
    """Run a worker until it has drained (``stop`` does what a first signal does). Raises InternalError if it breaks.

    False if a thread of the model would not end in time, so that the process has to be ended without waiting for it.
    """
    descriptors.raise_limit()
    descriptors.say_less_of_accept(asyncio.get_running_loop())
    leaving = Leaving(config.drain, MonotonicClock())
    with leaving.on_signals():
        watching = asyncio.create_task(leaving.on_event(stop or asyncio.Event()))
        loading = Loading(functools.partial(load, config), open_device)
        try:
            model = await loading.unless(leaving)
            if model is None:
                _log.info("told to stop while the model was being loaded")
                return loading.abandon()
            return await _Worker(config, model, loading.memory, leaving).run()
        finally:
            watching.cancel()
            loading.close()


class _Worker:
    """All parts of one worker, and the order in which they start and stop."""

    def __init__(self, config: WorkerConfig, model: LoadedModel, memory: Memory, leaving: Leaving) -> None:
        self._config = config
        self._leaving = leaving
        self._loop = asyncio.get_running_loop()
        self._died: BaseException | None = None
        self._helpers: list[asyncio.Task[None]] = []
        self._registration: Registration | None = None
        clock, timeline, layout = MonotonicClock(), Timeline(), model.layout
        transfer = config.transfer_over(on_device=memory.device is not None)
        key = config.access.cluster_key
        refusals = Refusals(clock, lambda: self._metrics.access_refusals.add())
        self._server = GrpcServer(
            on_malformed=lambda: self._metrics.malformed.add(),
            guards=[Guard(PeerKey(key).check, refusals)] if key else [],
            credentials=peer_credentials(config.access),
        )
        address = self._server.bind(config.listen, advertise_host=config.advertise_host or None)
        self._metrics_server, metrics_address = self._bind_metrics(address)
        node = self.node = describe(config, model, address, metrics_address, transfer)
        metrics = self._metrics = WorkerMetrics(
            node, config.registry.cluster, model.cost, config.peaks, energy.sources(model.device)
        )
        count = metrics.defects.add
        defects = self._defects = Defects(_log, clock, count)
        faults = self._faults = Faults.of(config.faults, node.node_id, node.home_role.value, clock)
        grammars = self._grammars = _grammars(config, model, lambda: self._replica.wake())
        replica = self._replica = Replica(
            model,
            _scheduler(config, model, node, memory, grammars),
            num_layers=layout.num_layers,
            clock=clock,
            on_fatal=self._from_dying_engine,
            meter=metrics.engine,
            prepare=_before_steps(grammars, faults),
            timeline=timeline,
            # Of its own: it is written in the engine thread.
            defects=Defects(_log, clock, count),
        )
        self._sender = Sender(
            node,
            layout,
            memory,
            config=transfer,
            clock=clock,
            observer=metrics.transfers,
            timeline=timeline,
            defects=defects,
            faults=faults,
        )
        self._receiver = Receiver(
            node,
            layout,
            memory,
            on_event=lambda notice: self._service.on_lease(notice),
            config=transfer,
            clock=clock,
            defects=defects,
            faults=faults,
        )
        self._service = NodeService(
            node,
            replica,
            self._sender,
            self._receiver,
            clock=clock,
            defects=defects,
            config=config.lease,
            session_config=config.session,
            observer=metrics.leases,
            roles_config=config.roles,
            on_role=self._role_changed,
            faults=faults,
        )
        self._health = Health(self._server, replica, lambda: leaving.is_draining, config.stall_limit_s, defects)
        metrics.watch(replica, self._receiver, self._service.status, lambda: leaving.is_draining)
        admin = NodeServicer(self._service, leaving.ask, timeline, clock)
        add = self._server.add
        add(node_pb2_grpc.add_NodeServicer_to_server, admin, "baton.v1.Node")
        add(add_sessions_of_protocol_1, admin)
        add(transfer_pb2_grpc.add_KvTransferServicer_to_server, self._receiver, "baton.v1.KvTransfer")

    def _bind_metrics(self, address: str) -> tuple[MetricsServer, str]:
        """The server, and where others reach it (empty: nowhere)."""
        server = MetricsServer(lambda: exposition(self._metrics.metrics), self._config.metrics_server)
        if self._config.metrics_port is None:
            return server, ""
        port = server.bind(self._config.listen.rpartition(":")[0], self._config.metrics_port)
        return server, f"{address.rpartition(':')[0]}:{port}"

    async def run(self) -> bool:
        """Until it is time to go; False if the engine's thread would not end."""
        await self._receiver.start()
        await self._sender.start()
        self._replica.start()
        try:
            await self._server.start()
            if self.node.metrics_address:
                await self._metrics_server.start()
            await self._register()
            announce(self.node, self._config)
            self._leaving.feed(departure.Loaded())
            await self._serve()
        finally:
            closing = asyncio.ensure_future(self._close())
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                await closing
                raise
        return closing.result()

    async def _register(self) -> None:
        if not self._config.registry.is_used:
            return
        node = self.node
        record = NodeRecord(node.node_id, node.address, node.incarnation, node.home_role, node.model.fingerprint)
        self._registration = Registration(
            Registry(self._config.registry, faults=self._faults),
            record,
            self._config.registration,
            MonotonicClock(),
            self._defects,
        )
        await self._registration.start()

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._leaving.on_refuse_new = lambda: self._helpers.append(tasks.create_task(self._drain()))
            self._helpers.append(tasks.create_task(self._health.watch()))
            if self._faults is not None:
                self._helpers.append(tasks.create_task(self._faults.run()))
            closed = await self._leaving.closing()
            for helper in self._helpers:
                helper.cancel()
        if self._died is not None:
            raise InternalError(f"the engine died: {described(self._died)}")
        if closed.reason:
            num_left = self._service.num_sequences
            _log.warning("%s leaves, %s: %d sequences are cut off", self.node.node_id, closed.reason, num_left)
        else:
            _log.info("%s has drained and leaves", self.node.node_id)

    async def _drain(self) -> None:
        self._replica.drain()
        self._service.sessions.tell_status()
        _log.info("%s drains: %d sequences are here", self.node.node_id, self._replica.num_sequences)
        await self._server.set_serving(False)
        async with asyncio.TaskGroup() as tasks:
            # A Redis that does not answer delays nothing else.
            if self._registration is not None:
                tasks.create_task(self._registration.withdraw())
            await self._service.drained()
        self._leaving.feed(departure.Emptied())

    async def _close(self) -> bool:
        """Bounded by ``close_s``, twice if an engine step or a push does not end."""
        limit_s = self._config.close_s
        async with asyncio.TaskGroup() as tasks:
            if self._registration is not None:
                tasks.create_task(self._registration.close())
            await self._service.close(limit_s)
            await self._sender.close()
            await self._receiver.close()
            await self._server.stop(1.0)
            await self._metrics_server.close()
        if self._grammars is not None:
            self._grammars.close()
        if await asyncio.to_thread(self._replica.stop, limit_s):
            return True
        _log.error("the engine's last step did not end in %s s", limit_s)
        return False

    def _role_changed(self, change: RoleChanged) -> None:
        self._metrics.roles.changed(change)
        if self._registration is not None:
            self._registration.change_home(self._service.roles.home)

    def _from_dying_engine(self, error: BaseException) -> None:
        """Called in the engine thread."""
        self._loop.call_soon_threadsafe(self._engine_died, error)

    def _engine_died(self, error: BaseException) -> None:
        self._died = self._died or error
        self._leaving.feed(departure.EngineDied())


def _grammars(config: WorkerConfig, model: LoadedModel, on_ready: Callable[[], None]) -> Grammars | None:
    """None: there is no tokenizer, or one that the library does not know."""
    file = Path(config.tokenizer or config.model) / "tokenizer.json"
    if not is_there(file):
        return None
    vocab_size = model.description.vocab_size
    try:
        tokenizer = load_tokenizer(file, vocab_size)
    except UnsupportedModel as error:
        _log.warning("structured output is refused: %s", error.message)
        return None
    return Grammars(
        tokenizer, vocab_size, num_threads=config.engine.num_threads or os.cpu_count() or 1, on_ready=on_ready
    )


def _before_steps(grammars: Grammars | None, faults: Faults | None) -> Callable[[StepPlan], None] | None:
    """What the engine thread does before each step."""
    prepare = None if grammars is None else grammars.prepare
    if faults is None:
        return prepare

    def strike_and_prepare(plan: StepPlan) -> None:
        faults.pause(Layer.ENGINE, "step")
        if prepare is not None:
            prepare(plan)

    return strike_and_prepare


def _scheduler(
    config: WorkerConfig, model: LoadedModel, node: NodeDescription, memory: Memory, grammars: Grammars | None
) -> Scheduler:
    layout = model.layout
    limits = config.engine.scheduler.of_model(
        block_tokens=layout.block_tokens,
        max_model_tokens=model.description.max_model_tokens,
        vocab_size=model.description.vocab_size,
    )
    pool = BlockPool(layout.num_blocks, max_cached=int(limits.max_cached_share * layout.num_blocks))
    digest_of = functools.partial(block_digest, memory, layout) if limits.verifies_cache else None
    mask_of = None if grammars is None else grammars.mask
    return Scheduler(limits, pool, PrefixScheme.of(node), digest_of, mask_of)
