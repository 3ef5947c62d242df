"""The decode node's end of every transfer: grants leases, serves the control channel, tells what became of them.

Drives LeaseMachine over gRPC, the data transports and the digest threads. Owns no block: the pool belongs to the
receiver of the notices.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Sequence

import grpc.aio
from google.protobuf.message import DecodeError

from baton import codec
from baton.address import host_of
from baton.clock import Clock, MonotonicClock
from baton.defects import Defects
from baton.driver import Driver
from baton.errors import BatonError, InvalidRequest, Overloaded, Unavailable
from baton.faults.faults import Faults
from baton.machine import Tick
from baton.patience import patient_timeout
from baton.types import KvLayout, Lease, NodeDescription
from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer import wire_codec
from kvtransfer.config import TransferConfig
from kvtransfer.control import Outbox
from kvtransfer.digest import DIGEST_NAME
from kvtransfer.encoding import choose_encoding
from kvtransfer.faulty import ControlLine
from kvtransfer.hashing import segment_blocks
from kvtransfer.memory import Memory
from kvtransfer.plan import check_block_ids
from kvtransfer.protocol import messages
from kvtransfer.protocol import receiver_events as events
from kvtransfer.protocol.receiver import LeaseMachine
from kvtransfer.transports.interface import DataPlane, PlaneEvents, PlaneSite
from kvtransfer.transports.local_plane import TOKEN_BYTES
from kvtransfer.verify import Verifier

_HELLO_TIMEOUT_S = 5.0
_LAST_WRITE_TIMEOUT_S = 1.0
# Of an epoch. Over tcp a lease is opened by its epoch alone, if data overtakes Begin: no other peer must guess it.
_NUM_RANDOM_BITS = 32


class _Channel:
    def __init__(self, number: int, peer: NodeDescription, faults: Faults | None) -> None:
        self.number = number
        self.peer = peer
        self.outbox: Outbox[pb.ChannelResponse] = Outbox()
        self._line: ControlLine[messages.ReceiverMessage] | None = None
        if faults is not None:
            self._line = ControlLine(faults, peer.node_id, self._put, self.outbox.lose)

    def send(self, message: messages.ReceiverMessage) -> None:
        if self._line is None:
            self._put(message)
        else:
            self._line.send(message)

    def _put(self, message: messages.ReceiverMessage) -> None:
        self.outbox.put(wire_codec.response_to_pb(message))

    def close(self) -> None:
        if self._line is not None:
            self._line.close()


class Receiver(transfer_pb2_grpc.KvTransferServicer):
    """Serves ``baton.v1.KvTransfer``; add it to a grpc.aio server with ``add_to``. Everything on one event loop.

    ``on_event`` gets WriterBegan, Arrived, Quarantined and Released one at a time and never from inside a call of ours.
    """

    def __init__(
        self,
        node: NodeDescription,
        layout: KvLayout,
        memory: Memory,
        *,
        on_event: Callable[[events.LeaseNotice], None],
        config: TransferConfig | None = None,
        clock: Clock | None = None,
        defects: Defects | None = None,
        faults: Faults | None = None,
    ) -> None:
        assert memory.num_bytes >= layout.total_bytes, "the memory must hold the cache"
        self._faults = faults
        self._node = node
        self._layout = layout
        self._memory = memory
        self._config = (config or TransferConfig()).over(on_device=memory.device is not None)
        self._clock = clock or MonotonicClock()
        self._defects = defects or Defects(logging.getLogger(__name__), self._clock)
        self._on_event = on_event
        self._machine = LeaseMachine(self._config.receiver)
        self._driver: Driver[events.ReceiverEvent, events.ReceiverAction] = Driver(
            self._machine, self._perform, self._clock, on_error=self._on_error, tick=Tick
        )
        self._verifier = Verifier(self._memory, layout, self._config.verify_threads)
        self._transports = self._config.by_name
        site = PlaneSite(
            memory, layout, host_of(node.address), self._config.tcp_listen_host, self._plane_events(),
            self._config.access,
        )  # fmt: skip
        self._planes = {name: transport.plane(site) for name, transport in self._transports.items()}
        self._channels: dict[int, _Channel] = {}
        # Planes of channels whose writer is not known gone yet, lost ones included.
        self._writers: dict[int, DataPlane] = {}
        self._next_channel = 1
        self._num_granted = 0
        # Commits whose bytes were not the ones that were sent.
        self.num_digest_failures = 0
        self._notices: deque[events.LeaseNotice] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self._has_changed = asyncio.Event()

    def _plane_events(self) -> PlaneEvents:
        return PlaneEvents(
            writer_gone=self._writer_gone,
            wrote=self._wrote,
            quiet=lambda epoch: self._driver.feed(events.EpochQuiet(epoch)),
            data_came=lambda channel, epoch: self._driver.feed(events.DataCame(channel, epoch)),
            strayed=self._strayed,
            landed=self._verifier.digest_here if self._config.digest else None,
        )

    # For the owner of the pool.

    async def start(self) -> None:
        num_bytes = segment_blocks(self._layout.block_bytes) * self._layout.block_bytes
        num_threads = self._config.verify_threads + 2 * self._config.tcp_streams
        await asyncio.to_thread(self._memory.reserve, num_threads, num_bytes)
        for plane in self._planes.values():
            await plane.start()

    def add_to(self, server: grpc.aio.Server) -> None:
        transfer_pb2_grpc.add_KvTransferServicer_to_server(self, server)

    @property
    def endpoints(self) -> dict[str, str]:
        """Where senders connect, by transport. After ``start``."""
        return {name: plane.endpoint for name, plane in self._planes.items()}

    def grant(
        self,
        sequence_id: str,
        block_ids: Sequence[int],
        ttl_s: float,
        *,
        min_blocks: int = 1,
        num_cached_blocks: int = 0,
    ) -> Lease:
        """Lease blocks to the node that computes the sequence. A commit of fewer than ``min_blocks`` blocks is refused.

        ``num_cached_blocks``: blocks of the sequence that are here already and lie before the leased ones. The writer
        is told how many, but no message and no frame can name one. Raises InvalidRequest if the sequence has a live
        lease or a block is not ours; Unavailable when closing.
        """
        if self._is_closing:
            raise Unavailable(f"{self._node.node_id} is shutting down")
        check_block_ids(self._layout, block_ids, "leased")
        epoch = self._num_granted + 1 << _NUM_RANDOM_BITS | secrets.randbits(_NUM_RANDOM_BITS)
        granted = events.Granted(sequence_id, epoch, tuple(block_ids), ttl_s, min_blocks)
        self._driver.feed(granted)
        self._num_granted += 1
        node = self._node
        return Lease(
            sequence_id, epoch, node.node_id, node.incarnation, node.address, tuple(block_ids), ttl_s, num_cached_blocks
        )

    def revoke(self, sequence_id: str, reason: str) -> None:
        """End the lease of a sequence that has not arrived; Released follows, maybe after Quarantined. Else nothing."""
        self._driver.feed(events.RevokeAsked(sequence_id, reason))

    async def close(self, deadline_s: float = 5.0) -> None:
        """End all leases, wait for their writers up to the deadline, close every channel and connection. Once."""
        if self._is_closing:
            return
        self._is_closing = True
        for sequence_id in self._machine.sequence_ids:
            self._driver.feed(events.RevokeAsked(sequence_id, "the node is shutting down"))
        try:
            async with asyncio.timeout(deadline_s):
                await self._until(lambda: not self._machine.num_leases)
                for channel in list(self._channels.values()):
                    channel.outbox.lose("the node is shutting down")
                await self._until(lambda: not self._writers and not self._channels)
        except TimeoutError:
            logging.getLogger(__name__).warning("closing with %d writers not known gone", len(self._writers))
        self._driver.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for plane in self._planes.values():
            await plane.close()
        await asyncio.to_thread(self._verifier.close)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._has_changed.clear()
            await self._has_changed.wait()

    # The machine and its actions.

    def _on_error(self, about: events.ReceiverEvent | events.ReceiverAction, error: Exception) -> None:
        if isinstance(about, events.Granted):
            raise error  # To the owner of the pool: nothing was granted.
        defect = self._defects.caught("lease", error, type(about).__name__)
        # One lease ends, the channel and all others on it go on. Told later: the machine's actions come first.
        epoch = getattr(getattr(about, "message", about), "epoch", 0)
        sequence_id = self._machine.sequence_of(epoch)
        if sequence_id is not None:
            self._soon(events.RevokeAsked(sequence_id, defect.message))

    def _perform(self, action: events.ReceiverAction) -> None:  # noqa: C901 - one case per action
        self._has_changed.set()
        match action:
            case events.Send():
                self._send(action.channel, action.message)
            case events.OpenEpoch():
                self._verifier.open(action.epoch, action.block_ids)
                self._writers[action.channel].open_epoch(action.channel, action.epoch, action.block_ids)
            case events.CloseEpoch():
                plane = self._writers.get(action.channel)
                if plane is None or plane.close_epoch(action.channel, action.epoch, action.after_bytes):
                    self._soon(events.EpochQuiet(action.epoch))
            case events.Digest():
                if self._config.digest:
                    self._verifier.digest(action.epoch, action.ranges)
            case events.Verify():
                self._spawn(self._verify(action))
            case events.ForgetDigests():
                self._verifier.forget(action.epoch, action.layers)
            case events.WriterBegan() | events.Arrived() | events.Quarantined() | events.Released():
                self._notices.append(action)
                asyncio.get_running_loop().call_soon(self._deliver)
            case events.DropChannel():
                self._channels[action.channel].outbox.lose(action.reason)

    def _soon(self, event: events.ReceiverEvent) -> None:
        asyncio.get_running_loop().call_soon(self._driver.feed, event)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, channel: int, message: messages.ReceiverMessage) -> None:
        found = self._channels.get(channel)
        if found is not None:  # Else lost in this very moment; ChannelLost is on its way to the machine.
            found.send(message)

    async def _verify(self, action: events.Verify) -> None:
        epoch, commit = action.epoch, action.commit
        try:
            damaged = await self._verifier.verify(epoch, commit) if self._config.digest else ()
        except Exception as error:  # a defect of ours must not leave the lease hanging
            failure = self._defects.failure("lease", error, "verifying")
            self._driver.feed(events.VerifyFailed(epoch, commit.attempt, failure))
        else:
            self.num_digest_failures += bool(damaged)
            self._driver.feed(events.Verified(epoch, commit.attempt, damaged))

    def _deliver(self) -> None:
        notice = self._notices.popleft()
        if not isinstance(notice, events.Arrived):
            with self._defects.contained("lease", notice.sequence_id):
                self._on_event(notice)
            return
        try:
            self._on_event(notice)
        except Exception as error:  # the sender must hear of it, whatever it is
            failure = self._defects.failure("lease", error, f"taking over {notice.sequence_id}")
            self._driver.feed(events.TakeOverRefused(notice.epoch, failure))
        else:
            self._driver.feed(events.TakenOver(notice.epoch))

    def _wrote(self, channel: int, epoch: int, attempt: int, ranges: Sequence[messages.WrittenRange]) -> None:
        self._driver.feed(events.Wrote(channel, epoch, attempt, tuple(ranges)))

    def _strayed(self, channel: int, epoch: int) -> None:
        sequence_id = self._machine.sequence_of(epoch)
        if sequence_id is not None:
            self._driver.feed(
                events.Malformed(channel, sequence_id, epoch, "a data frame reached outside of its lease")
            )

    def _writer_gone(self, channel: int) -> None:
        if self._writers.pop(channel, None) is None:
            return
        self._has_changed.set()
        found = self._channels.get(channel)
        if found is not None:
            found.outbox.lose("its data connection is closed")
        self._driver.feed(events.WriterGone(channel))

    # gRPC.

    async def Channel(  # type: ignore[override]  # noqa: N802 - named in the proto; the stub knows no coroutines
        self, request_iterator: object, context: grpc.aio.ServicerContext[pb.ChannelRequest, pb.ChannelResponse]
    ) -> None:
        """One sender's control channel, from Hello to its loss. Raises what the sender did wrongly, and Unavailable."""
        channel = await self._open_channel(context)
        reason = "the channel's handler was cancelled"
        try:
            reason = await self._run_channel(channel, context)
        except (BatonError, DecodeError) as error:
            reason = str(error)
            raise
        finally:
            del self._channels[channel.number]
            channel.close()
            self._has_changed.set()
            self._driver.feed(events.ChannelLost(channel.number, reason))
            plane = self._writers.get(channel.number)
            if plane is not None:
                plane.drop(channel.number)

    async def _open_channel(self, context: grpc.aio.ServicerContext[pb.ChannelRequest, pb.ChannelResponse]) -> _Channel:
        try:
            async with patient_timeout(_HELLO_TIMEOUT_S):
                request = await context.read()
        except TimeoutError:
            raise InvalidRequest("no Hello came") from None
        if not isinstance(request, pb.ChannelRequest) or request.WhichOneof("message") != "hello":
            raise InvalidRequest("the first message of a transfer channel must be Hello")
        if self._is_closing:
            raise Unavailable(f"{self._node.node_id} is shutting down")
        if len(self._writers) >= self._config.max_channels:
            raise Overloaded(f"{len(self._writers)} channels to {self._node.node_id} are open, the limit")
        hello = request.hello
        wire_codec.check_offers(hello)
        peer = codec.node_from_pb(hello.node)
        digest = DIGEST_NAME if self._config.digest else ""
        wire_codec.check_compatible(self._node, peer, digest, hello.digest)
        offered = [wire_codec.encoding_from_pb(encoding) for encoding in hello.encodings]
        encoding = choose_encoding(self._node.node_id, peer.node_id, offered)
        device = self._memory.device
        can_reach = device is not None and device.memory_id in hello.reachable_memory
        transport = wire_codec.choose_transport(
            self._node, peer, list(hello.transports), self._transports, can_reach_memory=can_reach
        )
        for other in self._channels.values():
            if other.peer.node_id == peer.node_id and other.peer.incarnation != peer.incarnation:
                other.outbox.lose(f"{peer.node_id} was started anew")
        plane = self._planes[transport.name]
        channel = _Channel(self._next_channel, peer, self._faults)
        self._next_channel += 1
        token = secrets.token_bytes(TOKEN_BYTES)
        plane.offer(channel.number, token)
        welcome = pb.ChannelResponse.Welcome(
            node=codec.node_to_pb(self._node),
            transport=transport.name,
            endpoint=plane.endpoint,
            token=token,
            digest=digest,
            encoding=wire_codec.encoding_to_pb(encoding),
        )
        channel.outbox.put(pb.ChannelResponse(welcome=welcome))
        self._channels[channel.number] = channel
        self._writers[channel.number] = plane
        self._driver.feed(events.ChannelOpened(channel.number, peer.node_id, transport.is_one_sided))
        return channel

    async def _run_channel(
        self, channel: _Channel, context: grpc.aio.ServicerContext[pb.ChannelRequest, pb.ChannelResponse]
    ) -> str:
        """Carry messages both ways until the sender closes the channel; raises what else ended it."""
        # A write under way cannot be taken back, and the call cannot end well before it has ended.
        results = await channel.outbox.carry(
            self._read(channel, context), context.write, last_write_timeout_s=_LAST_WRITE_TIMEOUT_S
        )
        if channel.outbox.lost.done():
            raise Unavailable(channel.outbox.lost.result())
        for result in results:
            if isinstance(result, Exception):
                raise result
        if isinstance(results[1], asyncio.CancelledError):
            raise Unavailable("the sender closed its side and takes nothing")
        return "the sender closed it"

    async def _read(
        self, channel: _Channel, context: grpc.aio.ServicerContext[pb.ChannelRequest, pb.ChannelResponse]
    ) -> None:
        while isinstance(request := await context.read(), pb.ChannelRequest):
            try:
                message = wire_codec.request_from_pb(request)
            except BatonError as error:
                if not request.HasField("commit"):
                    raise
                commit = request.commit
                self._defects.caught("lease", error, f"a commit of {channel.peer.node_id}")
                self._driver.feed(events.Malformed(channel.number, commit.sequence_id, commit.epoch, error.message))
            else:
                self._driver.feed(events.Received(channel.number, message))
