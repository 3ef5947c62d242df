"""The prefill node's end of every transfer: pushes a sequence's blocks into a lease and commits it.

Drives one PushMachine per receiver over gRPC and a data wire. Owns no block: the caller keeps the source blocks until
``commit`` or ``abort`` has returned.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence

from baton.clock import Clock, MonotonicClock
from baton.defects import Defects
from baton.driver import Driver
from baton.errors import BatonError, Cancelled, InternalError, InvalidRequest, Unavailable
from baton.faults.faults import Faults
from baton.machine import Tick
from baton.timeline import Timeline, Transfer
from baton.types import KvLayout, Lease, NodeDescription, TokenChunk, TransferReport
from kvtransfer.config import TransferConfig
from kvtransfer.connection import Connection
from kvtransfer.hashing import segment_blocks
from kvtransfer.memory import Memory
from kvtransfer.plan import End, TransferPlan, check_block_ids
from kvtransfer.protocol import sender_events as events
from kvtransfer.protocol.sender import PushMachine
from kvtransfer.writing import Lanes, WriteJob, write_unit

# Receivers remembered without a connection, for their back-off.
_MAX_IDLE_PEERS = 256


class SenderObserver:
    """Hears how transfers went, on the event loop. This one does not listen."""

    def pushed(self, report: TransferReport) -> None:
        """The receiver has taken over."""

    def failed(self, error: BatonError) -> None:
        """A transfer failed, and not because it was cancelled."""


class Push:
    """One sequence on its way to one lease. ``layer_ready`` from any thread, the rest on the event loop."""

    def __init__(
        self,
        number: int,
        lease: Lease,
        peer: _Peer,
        job_of: Callable[[Push], WriteJob],
        clock: Clock,
        observer: SenderObserver,
    ) -> None:
        self._number = number
        self._lease = lease
        self._peer = peer
        self._clock = clock
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        # Set once: None if the receiver took over, else the error.
        self._outcome: asyncio.Future[BatonError | None] = self._loop.create_future()
        # Blocks of the sequence before the lease's first: they are not pushed.
        self._num_skipped = lease.num_cached_blocks
        # When bytes could first be written: the lease is begun and a layer is ready.
        self._started_s: float | None = None
        self._first_ready_s: float | None = None
        self._num_rewritten_layers = 0
        self._transport = ""
        self._on_caught_up: Callable[[], None] = lambda: None
        self._job = job_of(self)

    @property
    def sequence_id(self) -> str:
        return self._lease.sequence_id

    @property
    def layerwise(self) -> bool:
        """Layers are pushed as they become ready; else all at commit."""
        return self._job.is_layerwise

    def layer_ready(self, layer: int, num_blocks: int) -> None:
        """The sequence's first ``num_blocks`` blocks hold final bytes in this layer. From any thread; never blocks."""
        num_blocks -= self._num_skipped
        if num_blocks <= 0:
            return
        if self._first_ready_s is None:
            self._first_ready_s = self._clock.now()
        self._job.layer_ready(layer, num_blocks)

    def call_when_caught_up(self, callback: Callable[[], None]) -> None:
        """Of a sequence that goes on meanwhile: called once, on the event loop, when little is left to be pushed, or
        the lease is nearly full. Then it is time to stop the sequence and commit."""
        self._on_caught_up = callback
        self._job.catch_up()

    async def commit(self, first_token: TokenChunk, num_blocks: int | None = None) -> TransferReport:
        """Push what is left and hand the sequence over; when this returns or raises, the source blocks are free.

        ``num_blocks`` of the sequence hold its KV; None: all that were to be pushed. Call it after the last
        ``layer_ready``. If the receiver has all blocks, the first token alone is sent. Raises TransferFailed,
        Incompatible or NodeLost; InvalidRequest for more blocks than there is room for, and InternalError: call
        ``abort`` then, as after a cancellation, before the blocks are freed.
        """
        asked_s = self._clock.now()
        if num_blocks is not None:
            self._job.end_at(num_blocks - self._num_skipped)
        unready = self._job.first_unready_layer
        if unready is not None:
            raise InternalError(f"{self.sequence_id}: commit before layer {unready} was ready")
        self._peer.handle(events.CommitAsked(self._number, first_token))
        error = await asyncio.shield(self._outcome)
        if error is not None:
            raise error
        now = self._clock.now()
        plan, num_pushed = self._job.plan, self._job.num_blocks
        assert plan is not None
        num_bytes, started_s = plan.bytes_of(num_pushed), asked_s
        if self.layerwise and self._first_ready_s is not None:
            assert self._started_s is not None
            started_s = min(asked_s, max(self._started_s, self._first_ready_s))
        self._peer.timeline.transfer(
            Transfer(
                self.sequence_id, self._lease.node_id, self._transport, self.layerwise, num_bytes, started_s,
                asked_s, now,
            )
        )  # fmt: skip
        report = TransferReport(
            transport=self._transport,
            layerwise=self.layerwise,
            num_bytes=num_bytes,
            num_blocks=num_pushed,
            total_s=now - started_s,
            exposed_s=now - asked_s,
            retransmits=self._num_rewritten_layers,
        )
        with self._peer.defects.contained("record"):
            self._observer.pushed(report)
        return report

    async def abort(self, reason: str) -> None:
        """Give the lease back. When this returns no write is under way: the source blocks may be freed."""
        self._peer.handle(events.AbortAsked(self._number, reason))
        await asyncio.shield(self._outcome)

    def add_failure_callback(self, callback: Callable[[BatonError], None]) -> None:
        """Called on the event loop if the push ends without arriving: there is no point in computing on."""

        def on_done(outcome: asyncio.Future[BatonError | None]) -> None:
            error = outcome.result()
            if error is not None:
                callback(error)

        self._outcome.add_done_callback(on_done)

    # What the peer tells us.

    def start(self, connection: Connection, plan_of: Callable[[KvLayout], TransferPlan]) -> None:
        self._started_s = self._clock.now()
        self._transport = connection.transport.name
        self._job.start(connection.wire, plan_of(connection.target_layout))

    def drain(self, attempt: int, rewrite_layers: Sequence[int]) -> None:
        self._num_rewritten_layers += len(rewrite_layers)
        self._job.drain(attempt, rewrite_layers)

    def stop(self) -> None:
        self._job.stop()

    def finish(self, error: BatonError | None) -> None:
        self._outcome.set_result(error)
        if error is not None and not isinstance(error, Cancelled):
            with self._peer.defects.contained("record"):
                self._observer.failed(error)

    # What the lanes tell us, from any thread.

    def on_drained(self, attempt: int) -> None:
        self._loop.call_soon_threadsafe(self._drained, attempt)

    def _drained(self, attempt: int) -> None:
        event: events.SenderEvent
        try:
            job = self._job
            event = events.Drained(self._number, attempt, job.num_blocks, job.layer_digests(), job.num_sent_bytes)
        except Exception as error:
            defect = self._peer.defects.caught("transfer", error, f"digests of {self.sequence_id}")
            event = events.WriteFailed(self._number, defect)
        self._peer.handle(event)

    def on_caught_up(self) -> None:
        self._loop.call_soon_threadsafe(self._on_caught_up)

    def on_stopped(self) -> None:
        self._loop.call_soon_threadsafe(self._peer.handle, events.Stopped(self._number))

    def on_failed(self, error: BatonError) -> None:
        self._loop.call_soon_threadsafe(self._peer.handle, events.WriteFailed(self._number, error))


class _Peer:
    """One receiver, by address: its machine, its connection if there is one, and the pushes to it."""

    def __init__(self, address: str, sender: Sender, config: TransferConfig, clock: Clock) -> None:
        self.address = address
        self.connection: Connection | None = None
        self.pushes: dict[int, tuple[Push, Sequence[int], Lease]] = {}
        self._sender = sender
        self.timeline = sender.timeline
        self.defects = sender.defects
        self._driver: Driver[events.SenderEvent, events.SenderAction] = Driver(
            PushMachine(address, config.sender), self._perform, clock, on_error=self._on_error, tick=Tick
        )
        self._next_channel = 1
        # Opens the connection, or is about to.
        self._opening: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def handle(self, event: events.SenderEvent) -> None:
        if not self._is_closed:
            self._driver.feed(event)

    def _on_error(self, about: events.SenderEvent | events.SenderAction, error: Exception) -> None:
        known = error
        if not isinstance(known, BatonError):
            known = self.defects.caught("transfer", error, f"{type(about).__name__} of {self.address}")
        # One push fails, the connection and all others on it go on. Told later: the machine's actions come first.
        number = self._push_of(about)
        if number in self.pushes and not isinstance(about, events.WriteFailed):
            asyncio.get_running_loop().call_soon(self.handle, events.WriteFailed(number, known))

    def _push_of(self, about: events.SenderEvent | events.SenderAction) -> int:
        """The push that an event or action is about; 0 if it is about none."""
        if isinstance(about, events.Send | events.Received):
            epoch = getattr(about.message, "epoch", 0)
            return next((n for n, (_, _, lease) in self.pushes.items() if lease.epoch == epoch), 0)
        return getattr(about, "push", 0)

    @property
    def is_idle(self) -> bool:
        return not self._tasks and not self.pushes

    def begin(self, push: Push, number: int, source_blocks: Sequence[int], lease: Lease) -> None:
        self.pushes[number] = (push, source_blocks, lease)
        self.handle(events.PushBegun(number, lease.sequence_id, lease.epoch, lease.incarnation, lease.ttl_s))

    def _perform(self, action: events.SenderAction) -> None:
        match action:
            case events.Connect():
                self._opening = self._spawn(self._connect())
            case events.Send():
                if self.connection is not None:
                    self.connection.send(action.message)
            case events.StartWriting():
                push, source_blocks, lease = self.pushes[action.push]
                assert self.connection is not None
                push.start(self.connection, lambda target: self._sender.plan(target, source_blocks, lease))
            case events.Drain():
                self.pushes[action.push][0].drain(action.attempt, action.rewrite_layers)
            case events.StopWriting():
                self.pushes[action.push][0].stop()
            case events.Finish():
                self.pushes.pop(action.push)[0].finish(action.error)
            case events.DropChannel():
                if self.connection is not None:
                    self.connection.lose(action.reason)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _connect(self) -> None:
        try:
            connection = await self._sender.open_connection(self.address)
        except BatonError as error:
            self.handle(events.ConnectFailed(error))
            return
        except Exception as error:  # a defect of ours must not leave pushes waiting
            self.handle(events.ConnectFailed(self.defects.caught("transfer", error, f"connecting to {self.address}")))
            return
        finally:
            self._opening = None
        number, self._next_channel = self._next_channel, self._next_channel + 1
        self.connection = connection
        node = connection.node
        self.handle(events.Connected(number, node.node_id, node.incarnation, connection.transport.is_one_sided))
        reason = await connection.run(lambda message: self.handle(events.Received(number, message)))
        # Pushes stop first, then the wire is closed: the receiver takes its closing for our last write.
        self.connection = None
        self.handle(events.ChannelLost(number, reason))
        await connection.close()

    def stop(self) -> None:
        """React to nothing from now on: no timer is left, and no connection is opened."""
        self._is_closed = True
        self._driver.close()

    async def close(self) -> None:
        """Every push must have ended before."""
        self.stop()
        if self.connection is not None:
            self.connection.lose("the sender is closing")
        elif self._opening is not None:
            # That one alone: another may be closing the connection before, whose sockets would stay open.
            self._opening.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Sender:
    """Pushes blocks of one cache to any number of receivers. Everything but ``Push.layer_ready`` on one event loop."""

    def __init__(
        self,
        node: NodeDescription,
        layout: KvLayout,
        memory: Memory,
        *,
        config: TransferConfig | None = None,
        clock: Clock | None = None,
        timeline: Timeline | None = None,
        observer: SenderObserver | None = None,
        defects: Defects | None = None,
        faults: Faults | None = None,
    ) -> None:
        assert memory.num_bytes >= layout.total_bytes, "the memory must hold the cache"
        self._faults = faults
        self._observer = observer or SenderObserver()
        self._node = node
        self._layout = layout
        self._source = memory
        self._config = (config or TransferConfig()).over(on_device=memory.device is not None)
        self._clock = clock or MonotonicClock()
        self.defects = defects or Defects(logging.getLogger(__name__), self._clock)
        self.timeline = timeline or Timeline()
        self._peers: dict[str, _Peer] = {}
        self._lanes: Lanes | None = None
        self._next_push = 1
        self._is_closing = False

    async def start(self) -> None:
        # A lane holds one for its copies and one for its digests.
        num_bytes = segment_blocks(self._layout.block_bytes) * self._layout.block_bytes
        await asyncio.to_thread(self._source.reserve, 2 * self._config.copy_threads, num_bytes)
        if any(transport.is_one_sided for transport in self._config.by_name.values()):
            self._lanes = Lanes("baton-kv-copy", self._config.copy_threads, write_unit, self._clock)

    def begin(self, lease: Lease, source_blocks: Sequence[int], *, num_known_tokens: int | None) -> Push:
        """Start to push the KV of ``num_known_tokens`` tokens, held in ``source_blocks`` in order, into a lease: all
        blocks behind those that the receiver has. None: the sequence goes on meanwhile; as many blocks as both have
        are pushed as they become full, and the commit says how many.

        Connects if need be; nothing is waited for. Raises InvalidRequest if blocks and lease do not fit the tokens.
        """
        if self._is_closing:
            raise Unavailable(f"{self._node.node_id} is shutting down")
        num_cached = lease.num_cached_blocks
        num_target = num_cached + len(lease.block_ids)
        goes_on = num_known_tokens is None
        num_blocks = min(len(source_blocks), num_target)
        if num_known_tokens is not None:
            num_blocks = self._layout.blocks_for(num_known_tokens)
        if not 0 < num_blocks <= min(len(source_blocks), num_target) or num_cached > num_blocks:
            raise InvalidRequest(
                f"{lease.sequence_id}: {num_known_tokens} tokens need {num_blocks} blocks, there are "
                f"{len(source_blocks)} source blocks, and {num_cached} cached and {len(lease.block_ids)} leased ones"
            )
        blocks = tuple(source_blocks[num_cached:num_blocks])
        check_block_ids(self._layout, blocks, "source")
        peer = self._peers.get(lease.address)
        if peer is None:
            self._forget_idle_peers()
            peer = self._peers[lease.address] = _Peer(lease.address, self, self._config, self._clock)
        number, self._next_push = self._next_push, self._next_push + 1
        push = Push(
            number, lease, peer, lambda p: self._make_job(p, lease.epoch, blocks, peer, goes_on), self._clock,
            self._observer,
        )  # fmt: skip
        peer.begin(push, number, blocks, lease)
        return push

    def _forget_idle_peers(self) -> None:
        """Receivers that are gone for good must not pile up."""
        if len(self._peers) >= _MAX_IDLE_PEERS:
            for peer in [peer for peer in self._peers.values() if peer.is_idle]:
                del self._peers[peer.address]
                peer.stop()

    def _make_job(
        self, push: Push, epoch: int, block_ids: Sequence[int], peer: _Peer, goes_on: bool
    ) -> WriteJob:  # fmt: skip
        connection = peer.connection
        transport = next(iter(self._config.by_name.values())) if connection is None else connection.transport
        layerwise_from_bytes = self._config.layerwise_from_bytes.get(transport.name, transport.layerwise_from_bytes)
        num_bytes = len(block_ids) * self._layout.block_bytes * self._layout.num_layers
        return WriteJob(
            self._source,
            self._layout,
            block_ids,
            epoch,
            is_layerwise=goes_on or num_bytes >= max(1, layerwise_from_bytes),
            has_digest=self._config.digest,
            listener=push,
            sequence_id=push.sequence_id,
            timeline=self.timeline,
        )

    def plan(self, target: KvLayout, source_blocks: Sequence[int], lease: Lease) -> TransferPlan:
        leased = lease.block_ids[: len(source_blocks)]
        return TransferPlan.of(End.of(self._layout, source_blocks, "source"), End.of(target, leased, "target"))

    async def open_connection(self, address: str) -> Connection:
        return await Connection.open(address, self._node, self._config, self._lanes, self._source, self._faults)

    async def close(self, deadline_s: float = 5.0) -> None:
        """Abort what is under way, close every channel and let go of every receiver's memory. Once."""
        if self._is_closing:
            return
        self._is_closing = True
        pushes = [push for peer in self._peers.values() for push, _, _ in peer.pushes.values()]
        try:
            async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as group:
                for push in pushes:
                    group.create_task(push.abort("the node is shutting down"))
            async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as group:
                for peer in self._peers.values():
                    group.create_task(peer.close())
        except TimeoutError:
            logging.getLogger(__name__).warning("closing with writes that did not stop in %s s", deadline_s)
        if self._lanes is not None:
            self._lanes.close()
            if not await asyncio.to_thread(self._lanes.join, deadline_s):
                logging.getLogger(__name__).warning("a copying thread did not stop in %s s", deadline_s)
