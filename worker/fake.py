"""Workers without a model, all in one process: the real service and real sessions over a FakeRunner.

For tests and for benchmarks of the router. A hand-over copies the blocks inside the process. Tokens are drawn from the
KV that a sequence reads, so a lost or misplaced block and a wrong continuation change the answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton import PROTOCOL_VERSION
from baton.defects import Defects
from baton.errors import BatonError, InvalidRequest, TransferFailed, described
from baton.server import GrpcServer
from baton.timeline import Timeline, Transfer
from baton.types import (
    KvLayout,
    Lease,
    ModelDescription,
    NodeDescription,
    NodeStatus,
    Role,
    SamplingParams,
    SequenceSpec,
    TokenChunk,
    TransferReport,
)
from baton.v1 import node_pb2_grpc
from engine import fake
from engine.blocks import BlockPool
from engine.grammars import Grammars, load_tokenizer
from engine.replica import Replica
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan
from kvtransfer.protocol.receiver_events import Arrived, LeaseNotice, Released, WriterBegan
from worker.admin import NodeServicer
from worker.roles import RoleChanged, RolesConfig
from worker.service import NodeService
from worker.session import SessionConfig

# A step or a transfer that was under way when its node died ends within this.
_DEATH_S = 5.0


@dataclass(frozen=True, slots=True)
class FakeConfig:
    vocab_size: int = 512
    max_model_tokens: int = 4096
    num_blocks: int = 1024
    block_tokens: int = 16
    model_name: str = "fake"
    # Where its metrics would be; no server listens there.
    metrics_address: str = ""
    fingerprint: str = "fake-fingerprint"
    # Time of a step that decodes, and of a prompt token.
    step_s: float = 0.001
    prefill_token_s: float = 0.0
    transfer_s: float = 0.0
    status_s: float = 0.05
    # Prompt tokens of one step.
    max_batch_tokens: int = 1 << 16
    # What its clock shows beyond ours.
    clock_skew_s: float = 0.0
    roles: RolesConfig = field(default_factory=RolesConfig)
    # Without it requests with grammars are refused.
    tokenizer_file: Path | None = None

    @property
    def layout(self) -> KvLayout:
        return KvLayout(1, self.num_blocks, 1, 1, self.block_tokens, "float32")

    @property
    def scheduler(self) -> SchedulerConfig:
        return SchedulerConfig(
            block_tokens=self.block_tokens, max_model_tokens=self.max_model_tokens, vocab_size=self.vocab_size,
            max_batch_tokens=self.max_batch_tokens, max_num_seqs=1 << 12, max_waiting=1 << 14, watermark=0.0,
        )  # fmt: skip


def expected_tokens(
    prompt: Sequence[int], seed: int, max_tokens: int, vocab_size: int, stop_ids: Sequence[int] = ()
) -> list[int]:
    """The oracle: what an undisturbed run generates."""
    sampling = SamplingParams(seed=seed, max_tokens=max_tokens, stop_token_ids=tuple(stop_ids))
    return fake.expected_tokens(SequenceSpec("oracle", tuple(prompt), sampling), FakeConfig().layout, vocab_size)


class _SkewedClock:
    def __init__(self, skew_s: float) -> None:
        self._skew_s = skew_s

    def now(self) -> float:
        return time.monotonic() + self._skew_s


class PacedRunner(fake.FakeRunner):
    """Takes its time for each step, and makes none while it is held."""

    def __init__(self, config: FakeConfig, memory: memoryview) -> None:
        super().__init__(
            config.layout, buffer=memory, vocab_size=config.vocab_size, max_model_tokens=config.max_model_tokens
        )
        self.step_s = config.step_s
        self._prefill_token_s = config.prefill_token_s
        self._may_step = threading.Event()
        self._may_step.set()
        self._is_over = threading.Event()

    def hold(self) -> None:
        self._may_step.clear()

    def resume(self) -> None:
        self._may_step.set()

    def end(self) -> None:
        """No step waits any more."""
        self._is_over.set()
        self._may_step.set()

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> fake.Computed:
        prompts = [p.num_tokens for p in plan.pieces if p.start < p.sequence.spec.num_known_tokens]
        decodes = len(prompts) < len(plan.pieces)
        self._is_over.wait(sum(prompts) * self._prefill_token_s + (self.step_s if decodes else 0.0))
        self._may_step.wait()
        return super().launch(plan, on_layer)


class Push:
    """What `kvtransfer.sender.Push` is, without a wire: everything is copied at the commit."""

    def __init__(self, node: FakeNode, lease: Lease, block_ids: Sequence[int]) -> None:
        self.lease = lease
        self.node = node
        self.block_ids = tuple(block_ids)
        # None if decode took over, else the error.
        self._outcome: asyncio.Future[BatonError | None] = asyncio.get_running_loop().create_future()

    @property
    def num_bytes(self) -> int:
        return len(self.lease.block_ids) * self.node.config.layout.block_bytes

    def layer_ready(self, layer: int, num_blocks: int) -> None:
        pass

    def add_failure_callback(self, callback: Callable[[BatonError], None]) -> None:
        def on_done(outcome: asyncio.Future[BatonError | None]) -> None:
            if not outcome.cancelled() and (error := outcome.result()) is not None:
                callback(error)

        self._outcome.add_done_callback(on_done)

    def call_when_caught_up(self, callback: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(callback)

    def end(self, error: BatonError | None) -> None:
        if not self._outcome.done():
            self._outcome.set_result(error)

    async def commit(self, first_token: TokenChunk, num_blocks: int) -> TransferReport:
        room = self.lease.num_cached_blocks + min(len(self.block_ids), len(self.lease.block_ids))
        if num_blocks > room:
            raise InvalidRequest(f"{num_blocks} blocks to push, expected at most {room}")
        node, loop = self.node, asyncio.get_running_loop()
        asked_s, transfer_s = node.clock.now(), node.config.transfer_s
        loop.call_later(transfer_s, self._deliver, first_token)
        error = await asyncio.shield(self._outcome)
        if error is not None:
            raise error
        lease = self.lease
        node.timeline.transfer(
            Transfer(lease.sequence_id, lease.node_id, "fake", False, self.num_bytes, asked_s, asked_s,
                     node.clock.now())
        )  # fmt: skip
        return TransferReport("fake", False, self.num_bytes, len(lease.block_ids), transfer_s, transfer_s)

    def _deliver(self, first_token: TokenChunk) -> None:
        if not self._outcome.done():
            self.node.deliver(self, first_token)

    async def abort(self, reason: str) -> None:
        self.end(TransferFailed(f"aborted: {reason}"))
        self.node.give_back(self.lease, reason)


class Sender:
    def __init__(self, node: FakeNode) -> None:
        self._node = node

    def begin(self, lease: Lease, source_blocks: Sequence[int], *, num_known_tokens: int | None) -> Push:
        self._node.tell_begun(lease)
        return Push(self._node, lease, source_blocks[lease.num_cached_blocks :])


class Receiver:
    """What `kvtransfer.receiver.Receiver` is, without a wire. No writer is ever in the middle of something."""

    def __init__(self, node: FakeNode, on_event: Callable[[LeaseNotice], None]) -> None:
        self._node = node
        self._on_event = on_event
        self._num_granted = 0
        self._leases: dict[str, tuple[Lease, asyncio.TimerHandle]] = {}

    def grant(
        self,
        sequence_id: str,
        block_ids: Sequence[int],
        ttl_s: float,
        *,
        min_blocks: int = 1,
        num_cached_blocks: int = 0,
    ) -> Lease:
        self._num_granted += 1
        node = self._node
        lease = Lease(
            sequence_id, self._num_granted, node.node_id, node.incarnation, node.address, tuple(block_ids), ttl_s,
            num_cached_blocks,
        )  # fmt: skip
        expiry = asyncio.get_running_loop().call_later(ttl_s, self.end, lease, "the lease expired")
        self._leases[sequence_id] = lease, expiry
        return lease

    def revoke(self, sequence_id: str, reason: str) -> None:
        if sequence_id in self._leases:
            lease, _ = self._leases[sequence_id]
            asyncio.get_running_loop().call_soon(self.end, lease, reason)

    def end(self, lease: Lease, reason: str, is_given_back: bool = False) -> None:
        """A lease that is over already is ignored."""
        if self._pop(lease):
            self._on_event(Released(lease.sequence_id, lease.epoch, reason, is_given_back))

    def begun(self, lease: Lease) -> None:
        """Its writer computes. A lease that is over already is ignored."""
        found = self._leases.get(lease.sequence_id)
        if found is not None and found[0].epoch == lease.epoch:
            self._on_event(WriterBegan(lease.sequence_id, lease.epoch))

    def take(self, push: Push, first_token: TokenChunk) -> None:
        """Raises the error that the sender is to hear."""
        lease = push.lease
        if not self._pop(lease):
            raise TransferFailed(f"{self._node.node_id} has no such lease")
        size, source, target = self._node.config.layout.block_bytes, push.node.memory, self._node.memory
        for here, there in zip(push.block_ids, lease.block_ids, strict=False):
            target[there * size : (there + 1) * size] = source[here * size : (here + 1) * size]
        try:
            self._on_event(Arrived(lease.sequence_id, lease.epoch, first_token))
        except Exception as error:
            reason = f"not taken over: {described(error)}"
            asyncio.get_running_loop().call_soon(
                self._on_event, Released(lease.sequence_id, lease.epoch, reason, False)
            )
            raise TransferFailed(reason) from error

    def _pop(self, lease: Lease) -> bool:
        found = self._leases.get(lease.sequence_id)
        if found is None or found[0].epoch != lease.epoch:
            return False
        del self._leases[lease.sequence_id]
        found[1].cancel()
        return True


class FakeNode:
    """One worker. It may `die` and `start` again, at its old address and as another incarnation."""

    def __init__(self, node_id: str, role: Role, cluster: FakeCluster, config: FakeConfig) -> None:
        self.node_id = node_id
        self.role = role
        self.config = config
        self.clock = _SkewedClock(config.clock_skew_s)
        self.timeline = Timeline()
        # Of all its lives.
        self.role_changes: list[RoleChanged] = []
        self.address = ""
        self.incarnation = 0
        self._cluster = cluster
        self._server: GrpcServer | None = None
        self._build()

    def _build(self) -> None:
        """The parts that a process has before it serves."""
        self.memory = memoryview(bytearray(self.config.layout.total_bytes))
        self.runner = self.new_runner()
        self._grammars = self._new_grammars()
        mask_of = None if self._grammars is None else self._grammars.mask
        scheduler = Scheduler(self.config.scheduler, BlockPool(self.config.num_blocks), mask_of=mask_of)
        self.replica = self.new_replica(scheduler)

    def _new_grammars(self) -> Grammars | None:
        file, vocab_size = self.config.tokenizer_file, self.config.vocab_size
        if file is None:
            return None
        tokenizer = load_tokenizer(file, vocab_size)
        return Grammars(tokenizer, vocab_size, num_threads=1, on_ready=lambda: self.replica.wake())

    # ── What tests script ───────────────────────────────────────────────────────────────────────────────────────────

    replica_type: type[Replica] = Replica
    service_type: type[NodeService] = NodeService
    servicer_type: type[NodeServicer] = NodeServicer

    def new_runner(self) -> PacedRunner:
        return PacedRunner(self.config, self.memory)

    def new_replica(self, scheduler: Scheduler) -> Replica:
        return self.replica_type(self.runner, scheduler, num_layers=1, clock=self.clock, timeline=self.timeline)

    def new_service(self, sender: Sender, receiver: Receiver) -> NodeService:
        return self.service_type(
            self.description,
            self.replica,
            sender,  # type: ignore[arg-type]
            receiver,  # type: ignore[arg-type]
            clock=self.clock,
            defects=Defects(logging.getLogger("baton.worker.fake"), self.clock),
            session_config=SessionConfig(status_interval_s=self.config.status_s),
            roles_config=self.config.roles,
            on_role=self.role_changes.append,
        )

    def new_servicer(self) -> NodeServicer:
        return self.servicer_type(self.service, self.drain, self.timeline, self.clock)

    def tell_begun(self, lease: Lease) -> None:
        """Later, as the node that leased its blocks may be in the middle of something."""

        def tell() -> None:
            with contextlib.suppress(TransferFailed):  # with its node the lease is gone
                self._cluster.receiver_of(lease).begun(lease)

        asyncio.get_running_loop().call_soon(tell)

    def deliver(self, push: Push, first_token: TokenChunk) -> None:
        """Hand a computed sequence over to the node that leased its blocks."""
        try:
            self._cluster.receiver_of(push.lease).take(push, first_token)
        except BatonError as error:
            push.end(error)
        else:
            push.end(None)

    # ── Life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        if self.incarnation:
            self._build()
        self.incarnation = time.time_ns()
        self._server = GrpcServer()
        self.address = self._server.bind(self.address or "127.0.0.1:0")
        self.receiver = Receiver(self, lambda notice: self.service.on_lease(notice))
        self.service = self.new_service(Sender(self), self.receiver)
        self._server.add(node_pb2_grpc.add_NodeServicer_to_server, self.new_servicer(), "baton.v1.Node")
        self.replica.start()
        await self._server.start()

    async def die(self) -> None:
        """Streams break, and everything is forgotten."""
        server, self._server = self._server, None
        if server is None:
            return
        await server.stop(0.0)
        # Not before: it would end all sequences at once, and tell.
        self.runner.end()
        await self.service.close(_DEATH_S)
        await asyncio.to_thread(self.replica.stop, _DEATH_S)
        if self._grammars is not None:
            self._grammars.close()

    def drain(self, grace_s: float) -> float:
        """It says that it drains, and never leaves by itself."""
        self.replica.drain()
        self.service.sessions.tell_status()
        return grace_s

    # ── What it says of itself ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def description(self) -> NodeDescription:
        c = self.config
        return NodeDescription(
            node_id=self.node_id,
            incarnation=self.incarnation,
            home_role=self.role,
            address=self.address,
            model=ModelDescription(c.model_name, c.fingerprint, "float32", c.max_model_tokens, c.vocab_size),
            kv_layout=c.layout,
            protocol_version=PROTOCOL_VERSION,
            pid=0,
            host_id="fake",
            transports=("fake",),
            device="none",
            kernels="none",
            software_version="fake",
            metrics_address=c.metrics_address,
        )

    @property
    def is_down(self) -> bool:
        return self._server is None

    def status(self) -> NodeStatus:
        return self.replica.status(self.role)

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold; none of a node that is down."""
        status = self.status()
        return 0 if self.is_down else status.total_blocks - status.free_blocks

    # ── For the other nodes ─────────────────────────────────────────────────────────────────────────────────────────

    def give_back(self, lease: Lease, reason: str) -> None:
        try:
            self._cluster.receiver_of(lease).end(lease, reason, is_given_back=True)
        except TransferFailed:
            return  # With its node the lease is gone.


class FakeCluster:
    """Nodes that can hand over to each other."""

    def __init__(self, config: FakeConfig | None = None, *, prefill: int = 0, decode: int = 0, mixed: int = 0) -> None:
        self.config = config or FakeConfig()
        self.nodes: dict[str, FakeNode] = {}
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode), (Role.MIXED, mixed)):
            for i in range(count):
                self.add(f"{role.value}-{i}", role)

    def add(self, node_id: str, role: Role, config: FakeConfig | None = None) -> FakeNode:
        self.nodes[node_id] = self.new_node(node_id, role, config or self.config)
        return self.nodes[node_id]

    def new_node(self, node_id: str, role: Role, config: FakeConfig) -> FakeNode:
        return FakeNode(node_id, role, self, config)

    def __getitem__(self, node_id: str) -> FakeNode:
        return self.nodes[node_id]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(n.address for n in self.nodes.values())

    @property
    def used_blocks(self) -> int:
        return sum(n.used_blocks for n in self.nodes.values())

    def receiver_of(self, lease: Lease) -> Receiver:
        """Raises TransferFailed if the node that granted the lease is gone."""
        node = self.nodes[lease.node_id]
        if node.is_down or node.incarnation != lease.incarnation:
            raise TransferFailed(f"{lease.node_id} is gone")
        return node.receiver

    async def __aenter__(self) -> FakeCluster:
        for node in self.nodes.values():
            await node.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        async with asyncio.TaskGroup() as tasks:
            for node in self.nodes.values():
                tasks.create_task(node.die())


async def _serve(arguments: argparse.Namespace) -> None:
    config = FakeConfig(
        step_s=arguments.step_s, vocab_size=arguments.vocab_size, num_blocks=arguments.num_blocks,
        prefill_token_s=arguments.prefill_token_s, max_model_tokens=65536, status_s=0.25,
    )  # fmt: skip
    cluster = FakeCluster(config, prefill=arguments.prefill, decode=arguments.decode, mixed=arguments.mixed)
    async with cluster:
        sys.stdout.write(json.dumps(list(cluster.addresses)) + "\n")
        sys.stdout.flush()
        # The parent process ends this one by closing its input.
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fake nodes in one process; prints their addresses as JSON")
    for name in ("prefill", "decode", "mixed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.001)
    parser.add_argument("--prefill-token-s", type=float, default=0.0)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--num-blocks", type=int, default=1 << 16)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
