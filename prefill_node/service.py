"""Drives PrefillMachine: sessions and engine events in, engine, push and session calls out. Decides nothing itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

import grpc.aio

from baton import codec
from baton.clock import Clock
from baton.defects import Defects
from baton.errors import BatonError, InvalidRequest, quoted
from baton.session import NodeSession, SessionConfig, SessionHost, TokensBatch
from baton.types import Failure, Lease, NodeDescription, NodeStatus, TokenChunk, TransferReport
from baton.v1 import common_pb2, node_pb2, node_pb2_grpc
from engine.replica import LayerSink, Replica
from engine.schedule import EngineEvent, Failed
from prefill_node import machine as m


class PushLike(LayerSink, Protocol):
    """One transfer under way (kvtransfer's Push). The source blocks are readable until commit or abort has ended."""

    async def commit(self, first_token: TokenChunk) -> TransferReport:
        """After the last layer_ready. Raises TransferFailed, NodeLost, Incompatible; has a deadline of its own."""

    def add_failure_callback(self, callback: Callable[[BatonError], None]) -> None:
        """Called on the event loop if the push ends without arriving: there is no point in computing on."""

    async def abort(self, reason: str) -> None:
        """Never raises; when it has returned, no write is under way. Also after, and during, a commit."""


class SenderLike(Protocol):
    """What begins transfers (kvtransfer's Sender)."""

    def begin(self, lease: Lease, source_blocks: Sequence[int], *, num_known_tokens: int) -> PushLike: ...


class PrefillService(node_pb2_grpc.PrefillNodeServicer):
    """baton.v1.PrefillNode over one replica and one sender. Lives on one event loop."""

    def __init__(
        self,
        *,
        replica: Replica,
        sender: SenderLike,
        describe: Callable[[], NodeDescription],
        status: Callable[[], NodeStatus],
        node_id: str,
        clock: Clock,
        session_config: SessionConfig | None = None,
        defects: Defects | None = None,
    ) -> None:
        self._defects = defects or Defects(logging.getLogger(__name__), clock)
        # Sequences that are being failed because something raised.
        self._failing: set[str] = set()
        self._replica = replica
        self._sender = sender
        self._describe = describe
        self._status = status
        self._machine = m.PrefillMachine(node_id)
        self._loop = asyncio.get_running_loop()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._host: SessionHost[node_pb2.PrefillSessionRequest, node_pb2.PrefillSessionResponse, m.Send] = SessionHost(
            self, clock=clock, config=session_config, defects=self._defects
        )
        self._pushes: dict[str, PushLike] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- the service

    async def Session(  # type: ignore[override]  # noqa: N802 - the proto's name; grpc.aio's reader-writer style
        self,
        request_iterator: AsyncIterator[node_pb2.PrefillSessionRequest],
        context: grpc.aio.ServicerContext[node_pb2.PrefillSessionRequest, node_pb2.PrefillSessionResponse],
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

    async def close(self, timeout_s: float) -> bool:
        """End all sessions (their sequences are cancelled) and wait for pushes to end; False if some did not."""
        self._host.close()
        for number in self._host.numbers:
            self._feed(m.SessionLost(number))
        if not self._tasks:
            return True
        _, pending = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return not pending

    # -- SessionService

    def describe(self) -> common_pb2.NodeDescription:
        return codec.node_to_pb(self._describe())

    def status(self) -> common_pb2.NodeStatus:
        return codec.status_to_pb(self._status())

    def received(self, session: NodeSession[m.Send], request: node_pb2.PrefillSessionRequest) -> None:
        match request.WhichOneof("message"):
            case "run":
                self._received_run(session, request.run)
            case "cancel":
                self._feed(m.CancelAsked(session.number, request.cancel.sequence_id, request.cancel.reason))
            case other:
                raise InvalidRequest(f"a prefill session carries {other}, expected run or cancel")

    def closed(self, session: NodeSession[m.Send]) -> None:
        self._feed(m.SessionLost(session.number))

    def compose(self, items: list[m.Send]) -> node_pb2.PrefillSessionResponse:
        message = node_pb2.PrefillSessionResponse()
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

    def _received_run(self, session: NodeSession[m.Send], run: node_pb2.PrefillSessionRequest.Run) -> None:
        try:
            spec = codec.sequence_from_pb(run.sequence)
            lease = codec.lease_from_pb(run.lease) if run.HasField("lease") else None
        except Exception as error:
            failure = codec.failure_of(self._known(error, run.sequence.sequence_id))
            self._host.put(session.number, m.SendFailed(session.number, run.sequence.sequence_id, failure))
            return
        self._feed(m.RunAsked(session.number, spec, lease))

    def _from_engine(self, events: list[EngineEvent]) -> None:
        """Called in the engine thread."""
        self._loop.call_soon_threadsafe(self._feed, *events)

    def _feed(self, *events: m.Event) -> None:
        for event in events:
            self._handle(event)
        if self._machine.num_sequences:
            self._is_idle.clear()
        else:
            self._is_idle.set()

    def _handle(self, event: m.Event) -> None:
        try:
            actions = self._machine.handle(event)
        except Exception as error:
            self._fail(_about(event), error)
            return
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
            self._handle(Failed(sequence_id, failure))
            self._failing.discard(sequence_id)
        return failure

    def _known(self, error: Exception, sequence_id: str) -> BatonError:
        return error if isinstance(error, BatonError) else self._defects.caught("prefill", error, quoted(sequence_id))

    # -- actions out

    def _perform(self, action: m.Action) -> None:
        match action:
            case m.Submit():
                self._submit(action)
            case m.BeginPush():
                self._begin(action)
            case m.CommitPush(sequence_id, first_token):
                self._spawn(self._commit(sequence_id, self._pushes[sequence_id], first_token))
            case m.AbortPush(sequence_id, reason):
                self._spawn(self._abort(sequence_id, self._pushes[sequence_id], reason))
            case m.StopCompute(sequence_id):
                self._replica.cancel(sequence_id)
            case m.ReleaseBlocks(sequence_id):
                self._pushes.pop(sequence_id, None)
                self._replica.release(sequence_id)
            case m.SendTokens() | m.SendPrefillDone() | m.SendHandedOff() | m.SendFailed():
                self._host.put(action.session, action)

    def _submit(self, action: m.Submit) -> None:
        try:
            self._replica.submit(action.spec, hands_off=action.hands_off, listener=self._from_engine)
        except Exception as error:
            known = self._known(error, action.spec.sequence_id)
            self._feed(m.SubmitRefused(action.spec.sequence_id, codec.failure_of(known)))

    def _begin(self, action: m.BeginPush) -> None:
        try:
            push = self._sender.begin(action.lease, action.block_ids, num_known_tokens=action.num_known_tokens)
        except Exception as error:
            self._feed(m.PushRefused(action.sequence_id, codec.failure_of(self._known(error, action.sequence_id))))
            return
        self._pushes[action.sequence_id] = push
        push.add_failure_callback(lambda error: self._push_failed(action.sequence_id, push, error))
        self._replica.attach(action.sequence_id, push)

    def _push_failed(self, sequence_id: str, push: PushLike, error: BatonError) -> None:
        if self._pushes.get(sequence_id) is push:
            self._feed(m.PushFailed(sequence_id, codec.failure_of(error)))

    async def _commit(self, sequence_id: str, push: PushLike, first_token: TokenChunk) -> None:
        try:
            report = await push.commit(first_token)
        except Exception as error:
            self._feed(m.PushFailed(sequence_id, codec.failure_of(self._known(error, sequence_id))))
        else:
            self._feed(m.PushCommitted(sequence_id, report))

    async def _abort(self, sequence_id: str, push: PushLike, reason: str) -> None:
        # Should abort break its word and raise, the blocks stay held: better lost than overwritten while being read.
        await push.abort(reason)
        self._feed(m.PushAborted(sequence_id))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._defects.caught("prefill", error, "the end of a push")


def _about(item: m.Event | m.Action) -> str:
    """The sequence that an event or an action is about; empty if it is about several."""
    match item:
        case m.RunAsked() | m.Submit():
            return item.spec.sequence_id
        case m.SendTokens():
            return item.chunk.sequence_id
        case m.SessionLost():
            return ""
        case _:
            return item.sequence_id


def _add(message: node_pb2.PrefillSessionResponse, tokens: TokensBatch, item: m.Send) -> None:
    match item:
        case m.SendTokens(_, chunk):
            tokens.add(chunk)
        case m.SendPrefillDone(_, sequence_id, times):
            message.prefills.add(
                sequence_id=sequence_id,
                queue_s=times.queue_s,
                compute_s=times.compute_s,
                num_computed_tokens=times.num_computed_tokens,
            )
        case m.SendHandedOff(_, sequence_id, report):
            message.handed_off.add(sequence_id=sequence_id, report=codec.report_to_pb(report))
        case m.SendFailed(_, sequence_id, failure):
            message.failed.add(sequence_id=sequence_id, failure=codec.failure_to_pb(failure))
