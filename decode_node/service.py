"""Drives DecodeMachine: sessions, transfer and engine events in, engine, lease and session calls out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc.aio

from baton import codec
from baton.clock import Clock
from baton.defects import Defects
from baton.errors import BadConfig, BatonError, InvalidRequest, TransferFailed, quoted
from baton.session import NodeSession, SessionConfig, SessionHost, TokensBatch
from baton.types import Failure, Lease, NodeDescription, NodeStatus, TokenChunk
from baton.v1 import common_pb2, node_pb2, node_pb2_grpc
from decode_node import machine as m
from engine.replica import Replica
from engine.schedule import EngineEvent


class ReceiverLike(Protocol):
    """What leases blocks to writers (kvtransfer's Receiver). Its events come through DecodeService's three methods."""

    def grant(self, sequence_id: str, block_ids: Sequence[int], ttl_s: float, *, min_blocks: int = 1) -> Lease:
        """Lease blocks out. A commit of fewer than ``min_blocks`` is refused. Raises a BatonError if it cannot."""

    def revoke(self, sequence_id: str, reason: str) -> None:
        """End the lease early; Released follows once it is fenced."""


class DecodeObserver(Protocol):
    """Hears what leases come to, on the event loop."""

    def granted(self) -> None: ...

    def joined(self, wait_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How long a lease may last: what the router asks for, within these limits."""

    default_ttl_s: float = 30.0
    max_ttl_s: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.default_ttl_s <= self.max_ttl_s:
            raise BadConfig(
                f"default_ttl_s is {self.default_ttl_s}, expected more than 0 and at most max_ttl_s ({self.max_ttl_s})",
                param="default_ttl_s",
            )


class DecodeService(node_pb2_grpc.DecodeNodeServicer):
    """baton.v1.DecodeNode over one replica and one receiver. Lives on one event loop."""

    def __init__(
        self,
        *,
        replica: Replica,
        receiver: ReceiverLike,
        describe: Callable[[], NodeDescription],
        status: Callable[[], NodeStatus],
        node_id: str,
        clock: Clock,
        config: DecodeConfig | None = None,
        session_config: SessionConfig | None = None,
        observer: DecodeObserver | None = None,
        defects: Defects | None = None,
    ) -> None:
        self._defects = defects or Defects(logging.getLogger(__name__), clock)
        # Sequences that are being failed because something raised.
        self._failing: set[str] = set()
        self._observer = observer
        self._replica = replica
        self._receiver = receiver
        self._describe = describe
        self._status = status
        self._clock = clock
        self._config = config or DecodeConfig()
        self._machine = m.DecodeMachine(node_id)
        self._loop = asyncio.get_running_loop()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._host: SessionHost[node_pb2.DecodeSessionRequest, node_pb2.DecodeSessionResponse, m.Send] = SessionHost(
            self, clock=clock, config=session_config, defects=self._defects
        )

    # -- the service

    async def Session(  # type: ignore[override]  # noqa: N802 - the proto's name; grpc.aio's reader-writer style
        self,
        request_iterator: AsyncIterator[node_pb2.DecodeSessionRequest],
        context: grpc.aio.ServicerContext[node_pb2.DecodeSessionRequest, node_pb2.DecodeSessionResponse],
    ) -> None:
        await self._host.serve(request_iterator, context)

    @property
    def num_sequences(self) -> int:
        return self._machine.num_sequences

    async def drained(self) -> None:
        """Returns when no sequence is left here."""
        await self._is_idle.wait()

    def tell_status(self) -> None:
        """Let every router know the present status at once."""
        self._host.tell_status()

    def close(self) -> None:
        """End all sessions: their sequences are cancelled and their leases revoked."""
        self._host.close()
        for number in self._host.numbers:
            self._feed(m.SessionLost(number))

    # -- what the receiver tells

    def arrived(self, sequence_id: str, first_token: TokenChunk) -> None:
        """Take the sequence over. Raises a BatonError if it is not taken: the sender must not be acknowledged."""
        try:
            actions = self._machine.handle(m.KvArrived(sequence_id, first_token), self._clock.now())
            # Join, or RejectArrival: what it raises is the receiver's answer.
            self._perform(actions[0])
        finally:
            self._look_idle()
        self._perform_all(actions[1:])

    def quarantined(self, sequence_id: str, reason: str, *, is_given_back: bool = False) -> None:
        self._feed(m.LeaseFenced(sequence_id, reason, is_given_back))

    def released(self, sequence_id: str, reason: str, *, is_given_back: bool = False) -> None:
        self._feed(m.LeaseReleased(sequence_id, reason, is_given_back))

    # -- SessionService

    def describe(self) -> common_pb2.NodeDescription:
        return codec.node_to_pb(self._describe())

    def status(self) -> common_pb2.NodeStatus:
        return codec.status_to_pb(self._status())

    def received(self, session: NodeSession[m.Send], request: node_pb2.DecodeSessionRequest) -> None:
        match request.WhichOneof("message"):
            case "reserve":
                self._received_reserve(session, request.reserve)
            case "cancel":
                self._feed(m.CancelAsked(session.number, request.cancel.sequence_id, request.cancel.reason))
            case other:
                raise InvalidRequest(f"a decode session carries {other}, expected reserve or cancel")

    def closed(self, session: NodeSession[m.Send]) -> None:
        self._feed(m.SessionLost(session.number))

    def compose(self, items: list[m.Send]) -> node_pb2.DecodeSessionResponse:
        message = node_pb2.DecodeSessionResponse()
        tokens = TokensBatch()
        for item in items:
            try:
                _add(message, tokens, item)
            except Exception as error:
                self._unsaid(item, error)
        message.tokens.extend(tokens.messages)
        return message

    def _unsaid(self, item: m.Send, error: Exception) -> None:
        """The machine may have let go of the sequence with this very item: the router is told in any case."""
        failure = self._fail(_about(item), error)
        if not isinstance(item, m.SendFailed):
            self._host.put(item.session, m.SendFailed(item.session, _about(item), failure))

    # -- events in

    def _received_reserve(self, session: NodeSession[m.Send], asked: node_pb2.DecodeSessionRequest.Reserve) -> None:
        try:
            spec = codec.sequence_from_pb(asked.sequence)
        except Exception as error:
            failure = codec.failure_of(self._known(error, asked.sequence.sequence_id))
            self._host.put(session.number, m.SendRefused(session.number, asked.sequence.sequence_id, failure))
            return
        self._feed(m.ReserveAsked(session.number, spec, asked.ttl_s, asked.prefill_node_id))

    def _from_engine(self, events: list[EngineEvent]) -> None:
        """Called in the engine thread."""
        self._loop.call_soon_threadsafe(self._feed, *events)

    def _feed(self, *events: m.Event) -> None:
        for event in events:
            self._handle(event)
        self._look_idle()

    def _look_idle(self) -> None:
        if self._machine.num_sequences:
            self._is_idle.clear()
        else:
            self._is_idle.set()

    def _handle(self, event: m.Event) -> None:
        try:
            actions = self._machine.handle(event, self._clock.now())
        except Exception as error:
            self._fail(_about(event), error)
            return
        self._perform_all(actions)

    def _perform_all(self, actions: Sequence[m.Action]) -> None:
        for action in actions:
            try:
                self._perform(action)
            except Exception as error:
                self._fail(_about(action), error)

    def _fail(self, sequence_id: str, error: Exception) -> Failure:
        """Handling this sequence raised: it fails and gives back what it holds. All others go on."""
        failure = codec.failure_of(self._known(error, sequence_id))
        if sequence_id not in self._failing:
            # Once: what raises on the way out as well stays held, and shows in the ledger.
            self._failing.add(sequence_id)
            self._handle(m.Defect(sequence_id, failure))
            self._failing.discard(sequence_id)
        return failure

    def _known(self, error: Exception, sequence_id: str) -> BatonError:
        return error if isinstance(error, BatonError) else self._defects.caught("decode", error, quoted(sequence_id))

    # -- actions out

    def _perform(self, action: m.Action) -> None:
        match action:
            case m.Grant():
                self._grant(action)
            case m.Join(sequence_id, first_token):
                self._join(sequence_id, first_token)
            case m.RejectArrival(_, reason):
                raise TransferFailed(reason)
            case m.RevokeLease(sequence_id, reason):
                self._receiver.revoke(sequence_id, reason)
            case m.Quarantine(sequence_id):
                self._replica.quarantine(sequence_id)
            case m.ReturnBlocks(sequence_id):
                self._replica.return_lease(sequence_id)
            case m.StopCompute(sequence_id):
                self._replica.cancel(sequence_id)
            case m.SendLease() | m.SendRefused() | m.SendJoined() | m.SendTokens() | m.SendFailed():
                self._host.put(action.session, action)
                if self._observer is not None and isinstance(action, m.SendLease | m.SendJoined):
                    with self._defects.contained("record"):
                        self._observe(self._observer, action)

    def _observe(self, observer: DecodeObserver, action: m.SendLease | m.SendJoined) -> None:
        if isinstance(action, m.SendLease):
            observer.granted()
        else:
            observer.joined(action.wait_s)

    def _grant(self, action: m.Grant) -> None:
        sequence_id = action.spec.sequence_id
        ttl_s = min(action.ttl_s, self._config.max_ttl_s) if action.ttl_s > 0 else self._config.default_ttl_s
        try:
            block_ids = self._replica.reserve(action.spec)
        except Exception as error:
            self._feed(m.Refused(sequence_id, codec.failure_of(self._known(error, sequence_id))))
            return
        try:
            min_blocks = self._replica.blocks_for(action.spec.num_known_tokens)
            lease = self._receiver.grant(sequence_id, block_ids, ttl_s, min_blocks=min_blocks)
        except Exception as error:
            self._replica.return_lease(sequence_id)
            self._feed(m.Refused(sequence_id, codec.failure_of(self._known(error, sequence_id))))
            return
        self._feed(m.Granted(lease))
        self._replica.set_epoch(sequence_id, lease.epoch)

    def _join(self, sequence_id: str, first_token: TokenChunk) -> None:
        try:
            self._replica.join(sequence_id, first_token, self._from_engine)
        except Exception as error:
            self._feed(m.JoinRefused(sequence_id, codec.failure_of(self._known(error, sequence_id))))
            # Up through arrived() to the receiver, which refuses the commit and gives the lease back.
            raise


def _about(item: m.Event | m.Action) -> str:
    """The sequence that an event or an action is about; empty if it is about several."""
    match item:
        case m.ReserveAsked() | m.Grant():
            return item.spec.sequence_id
        case m.Granted() | m.SendLease():
            return item.lease.sequence_id
        case m.SendTokens():
            return item.chunk.sequence_id
        case m.SessionLost():
            return ""
        case _:
            return item.sequence_id


def _add(message: node_pb2.DecodeSessionResponse, tokens: TokensBatch, item: m.Send) -> None:
    match item:
        case m.SendTokens(_, chunk):
            tokens.add(chunk)
        case m.SendLease(_, lease):
            message.reserved.append(codec.lease_to_pb(lease))
        case m.SendJoined(_, sequence_id, wait_s):
            message.joined.add(sequence_id=sequence_id, wait_s=wait_s)
        case m.SendRefused(_, sequence_id, failure):
            message.refused.add(sequence_id=sequence_id, failure=codec.failure_to_pb(failure))
        case m.SendFailed(_, sequence_id, failure):
            message.failed.add(sequence_id=sequence_id, failure=codec.failure_to_pb(failure))
