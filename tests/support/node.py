"""A node in this process for tests: real grpc.aio on a free port, real engine thread, no model, steerable transfers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from baton import PROTOCOL_VERSION, codec
from baton.clock import MonotonicClock
from baton.defects import Defects
from baton.errors import BatonError, TransferFailed
from baton.faults.faults import Faults
from baton.prefix import PrefixScheme
from baton.server import GrpcServer
from baton.timeline import Timeline
from baton.types import (
    KvLayout,
    Lease,
    ModelDescription,
    NodeDescription,
    Role,
    SamplingParams,
    SequenceSpec,
    TokenChunk,
    TransferReport,
)
from baton.v1 import node_pb2, node_pb2_grpc
from engine.blocks import BlockPool
from engine.fake import FakeRunner, expected_tokens
from engine.replica import Replica
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from kvtransfer.protocol.receiver_events import Arrived
from worker.admin import NodeServicer, add_sessions_of_protocol_1
from worker.roles import RolesConfig
from worker.service import NodeService
from worker.session import SessionConfig

LAYOUT = KvLayout(2, 64, 1, 1, 4, "float32")
VOCAB = 1000
WAIT_S = 10.0
REPORT = TransferReport("fake", True, 1, 1, 0.1, 0.05)


def spec(name: str, num_prompt: int = 9, max_tokens: int = 6, **sampling: Any) -> SequenceSpec:
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, **sampling)
    return SequenceSpec(name, tuple(range(1, num_prompt + 1)), params)


def lease_for(name: str) -> Lease:
    return Lease(name, 3, "other", 7, "127.0.0.1:1", (0, 1, 2, 3), 30.0)


class SteeredPush:
    """A push that ends when the test says so."""

    def __init__(self, block_ids: tuple[int, ...]) -> None:
        self.block_ids = block_ids
        self.told: list[tuple[int, int]] = []
        self.layer_error: Exception | None = None
        self.committed: asyncio.Future[TokenChunk] = asyncio.get_running_loop().create_future()
        self.outcome: asyncio.Future[BatonError | None] = asyncio.get_running_loop().create_future()
        self.aborted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        # Abort returns once this is set.
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.num_committed = 0
        # Of a sequence that moves: says that it is time to stop it.
        self.caught_up: Callable[[], None] = lambda: None

    def layer_ready(self, layer: int, num_blocks: int) -> None:
        if self.layer_error is not None:
            raise self.layer_error
        self.told.append((layer, num_blocks))

    def call_when_caught_up(self, callback: Callable[[], None]) -> None:
        self.caught_up = callback

    async def commit(self, first_token: TokenChunk, num_blocks: int) -> TransferReport:
        self.num_committed = num_blocks
        self.committed.set_result(first_token)
        error = await asyncio.shield(self.outcome)
        if error is not None:
            raise error
        return REPORT

    def add_failure_callback(self, callback: Callable[[BatonError], None]) -> None:
        def on_done(outcome: asyncio.Future[BatonError | None]) -> None:
            if not outcome.cancelled() and (error := outcome.result()) is not None:
                callback(error)

        self.outcome.add_done_callback(on_done)

    async def abort(self, reason: str) -> None:
        if not self.aborted.done():
            self.aborted.set_result(reason)
        await self.quiet.wait()
        if not self.outcome.done():
            self.outcome.set_result(TransferFailed(f"aborted: {reason}"))


class SteeredSender:
    def __init__(self) -> None:
        self.pushes: dict[str, SteeredPush] = {}
        self.begun: asyncio.Queue[SteeredPush] = asyncio.Queue()
        self.error: Exception | None = None
        self.layer_error: Exception | None = None

    def begin(self, lease: Lease, source_blocks: Sequence[int], *, num_known_tokens: int | None) -> SteeredPush:
        if self.error is not None:
            raise self.error
        push = self.pushes[lease.sequence_id] = SteeredPush(tuple(source_blocks))
        push.layer_error = self.layer_error
        self.begun.put_nowait(push)
        return push


class SteeredReceiver:
    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}
        self.revoked: asyncio.Queue[str] = asyncio.Queue()
        self.ttls_s: list[float] = []
        self.error: Exception | None = None

    def grant(
        self,
        sequence_id: str,
        block_ids: Sequence[int],
        ttl_s: float,
        *,
        min_blocks: int = 1,
        num_cached_blocks: int = 0,
    ) -> Lease:
        if self.error is not None:
            raise self.error
        self.ttls_s.append(ttl_s)
        epoch = len(self.ttls_s)
        lease = Lease(sequence_id, epoch, "n0", 5, "127.0.0.1:1", tuple(block_ids), ttl_s, num_cached_blocks)
        self.leases[sequence_id] = lease
        return lease

    def revoke(self, sequence_id: str, reason: str) -> None:
        self.revoked.put_nowait(sequence_id)


class Node:
    def __init__(
        self,
        step_delay_s: float,
        session_config: SessionConfig,
        num_blocks: int,
        has_prefix_cache: bool,
        role: Role,
        roles_config: RolesConfig | None,
        max_model_tokens: int,
        max_batch_tokens: int,
        faults: Faults | None,
    ) -> None:
        clock = MonotonicClock()
        layout = KvLayout(LAYOUT.num_layers, num_blocks, 1, 1, LAYOUT.block_tokens, "float32")
        self.runner = FakeRunner(layout, vocab_size=VOCAB, step_delay_s=step_delay_s)
        config = SchedulerConfig(
            block_tokens=LAYOUT.block_tokens,
            max_model_tokens=max_model_tokens,
            vocab_size=VOCAB,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=8,
            watermark=0.0,
        )
        self.sender = SteeredSender()
        self.receiver = SteeredReceiver()
        self.server = GrpcServer()
        self.address = self.server.bind("127.0.0.1:0")
        model = ModelDescription("fake", "f", "float32", max_model_tokens, VOCAB)
        self.description = NodeDescription(
            "n0",
            5,
            role,
            self.address,
            model,
            layout,
            PROTOCOL_VERSION,
            1,
            "h",
            (),
            "cpu",
            "fake",
            "0",
            prefix_cache=self.runner.prefix_caching if has_prefix_cache else None,
        )
        scheduler = Scheduler(config, BlockPool(num_blocks), PrefixScheme.of(self.description))
        self.replica = Replica(self.runner, scheduler, num_layers=layout.num_layers, clock=clock)
        self.service = NodeService(
            self.description,
            self.replica,
            self.sender,  # type: ignore[arg-type]
            self.receiver,  # type: ignore[arg-type]
            clock=clock,
            defects=Defects(logging.getLogger("test"), clock),
            session_config=session_config,
            roles_config=roles_config,
            faults=faults,
        )
        admin = NodeServicer(self.service, lambda grace_s: grace_s, Timeline(), clock)
        self.server.add(node_pb2_grpc.add_NodeServicer_to_server, admin, "baton.v1.Node")
        self.server.add(add_sessions_of_protocol_1, admin)

    @property
    def num_used(self) -> int:
        total, free, _ = self.replica.ledger()
        return total - free

    def states(self) -> dict[str, str]:
        return {line.owner: line.state.value for line in self.replica.ledger()[2]}

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that the engine thread or a peer does; fails after WAIT_S."""
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110 - what is watched belongs to another thread
                await asyncio.sleep(0.002)


@asynccontextmanager
async def running_node(
    *,
    step_delay_s: float = 0.0,
    session_config: SessionConfig | None = None,
    num_blocks: int = 64,
    has_prefix_cache: bool = False,
    role: Role = Role.MIXED,
    roles_config: RolesConfig | None = None,
    max_model_tokens: int = 200,
    max_batch_tokens: int = 16,
    faults: Faults | None = None,
) -> AsyncIterator[Node]:
    session_config = session_config or SessionConfig()
    node = Node(
        step_delay_s,
        session_config,
        num_blocks,
        has_prefix_cache,
        role,
        roles_config,
        max_model_tokens,
        max_batch_tokens,
        faults,
    )
    node.replica.start()
    await node.server.start()
    try:
        yield node
        node.replica.check()
    finally:
        await node.service.close(WAIT_S)
        await node.server.stop(1.0)
        assert await asyncio.to_thread(node.replica.stop, WAIT_S)


class Router:
    """The router's end of one session; every message is split into the items of the wanted kinds."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.inbox: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.messages: list[Any] = []
        self.statuses: list[float] = []
        self._opened = asyncio.Event()

    async def send(self, **message: Any) -> None:
        await self._call.write(node_pb2.SessionRequest(**message))

    async def hello(self, router_id: str = "r0", version: int = PROTOCOL_VERSION) -> Any:
        await self.send(
            hello=node_pb2.SessionHello(router_id=router_id, router_incarnation=1, protocol_version=version)
        )
        return await self.welcome()

    async def welcome(self) -> Any:
        async with asyncio.timeout(WAIT_S):
            await self._opened.wait()
        return self.messages[0] if self.messages else None

    async def read(self) -> None:
        """Runs beside the test: in grpc.aio a read that times out would end the call."""
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self.messages.append(message)
                self._opened.set()
                for field, value in message.ListFields():
                    if field.name == "status":
                        self.statuses.append(asyncio.get_running_loop().time())
                    elif field.name not in ("welcome", "cache"):
                        for item in value:
                            self.inbox.put_nowait((field.name, item))
        except grpc.aio.AioRpcError:
            pass
        finally:
            self._opened.set()

    async def run(self, sequence: SequenceSpec, lease: Lease | None = None) -> None:
        message = node_pb2.SessionRequest.Run(sequence=codec.sequence_to_pb(sequence))
        if lease is not None:
            message.lease.CopyFrom(codec.lease_to_pb(lease))
        await self.send(run=message)

    async def reserve(self, sequence: SequenceSpec, ttl_s: float = 20.0, prefill_node_id: str = "p9") -> None:
        await self.send(
            reserve=node_pb2.SessionRequest.Reserve(
                sequence=codec.sequence_to_pb(sequence), ttl_s=ttl_s, prefill_node_id=prefill_node_id
            )
        )

    async def cancel(self, name: str) -> None:
        await self.send(cancel=node_pb2.Cancel(sequence_id=name, reason="test"))

    async def next(self, kind: str) -> Any:
        """The next item; fails if it is of another kind."""
        async with asyncio.timeout(WAIT_S):
            found, item = await self.inbox.get()
        assert found == kind, f"{found} came, {kind} was expected: {item}"
        return item

    async def until(self, kind: str, timeout_s: float = WAIT_S) -> Any:
        """The next item of this kind, whatever comes before it."""
        async with asyncio.timeout(timeout_s):
            while True:
                found, item = await self.inbox.get()
                if found == kind:
                    return item

    async def tokens(self) -> list[int]:
        found: list[int] = []
        async with asyncio.timeout(WAIT_S):
            while True:
                kind, item = await self.inbox.get()
                if kind == "tokens":
                    found += item.token_ids
                    if item.finish_reason:
                        return found

    async def silence(self, seconds: float) -> None:
        """Asserts that nothing but status comes for a while."""
        try:
            async with asyncio.timeout(seconds):
                item = await self.inbox.get()
        except TimeoutError:
            return
        raise AssertionError(f"expected silence, {item} came")

    def drop(self) -> None:
        """As if the router's process had died."""
        self._call.cancel()

    async def ended(self) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
        async with asyncio.timeout(WAIT_S):
            code = await self._call.code()
            return code, await self._call.details(), dict(await self._call.trailing_metadata() or ())


@asynccontextmanager
async def session(address: str, *, reads: bool = True, path: str = "/baton.v1.Node/Session") -> AsyncIterator[Router]:
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(
            path,
            request_serializer=node_pb2.SessionRequest.SerializeToString,
            response_deserializer=node_pb2.SessionResponse.FromString,
        )()
        router = Router(call)
        reader = asyncio.create_task(router.read()) if reads else None
        try:
            yield router
        finally:
            call.cancel()
            if reader is not None:
                await asyncio.wait([reader])


def fill(node: Node, sequence: SequenceSpec) -> TokenChunk:
    """Write what prefill would have written, and give its first token."""
    blocks = node.receiver.leases[sequence.sequence_id].block_ids
    for layer in range(LAYOUT.num_layers):
        for position, token in enumerate(sequence.prompt_token_ids):
            cell = node.runner.layout.offset(layer, blocks[position // 4]) // 4 + position % 4
            node.runner._cells[cell] = token + 1 + layer
    return TokenChunk(sequence.sequence_id, 0, (expected_tokens(sequence, LAYOUT, VOCAB)[0],))


def arrive(node: Node, first_token: TokenChunk) -> None:
    node.service.on_lease(Arrived(first_token.sequence_id, 1, first_token))


async def to_running(node: Node, router: Router, sequence: SequenceSpec) -> None:
    await router.reserve(sequence)
    await router.next("reserved")
    arrive(node, fill(node, sequence))
    await router.next("joined")
