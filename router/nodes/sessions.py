"""The connection to one node: opens its session, sends messages, reports answers and the end of the connection.

A link knows gRPC, protobuf and one address; nothing above it does. What a silence or a break means is decided by
membership, what a message means by the dispatcher.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol

import grpc
from grpc import aio

from baton import PROTOCOL_VERSION, codec, errors
from baton.access import OPEN, AccessConfig
from baton.address import as_dialled
from baton.channels import dial
from baton.clock import Clock, MonotonicClock
from baton.defects import Defects
from baton.faults.faults import Faults
from baton.faults.kinds import Layer, kind_of
from baton.faults.line import Line
from baton.grpc_errors import ERROR_CODE_KEY, error_of
from baton.node_messages import NodeMessage, RouterMessage
from baton.patience import patient_timeout
from baton.types import NodeDescription, NodeStatus, Role
from baton.v1 import node_pb2, node_pb2_grpc, router_pb2
from router.config import LinkConfig
from router.flow.messages import Prompt
from router.nodes import session_bytes
from router.turns import Turns

_log = logging.getLogger("baton.router.sessions")

_SESSION = f"/{node_pb2.DESCRIPTOR.services_by_name['Node'].full_name}/Session"
# The quickest of so many round trips bounds the error of the clocks' offset.
_CLOCK_TRIPS = 8

# What is written is serialized already.
Session = aio.StreamStreamCall[bytes, node_pb2.SessionResponse]


class LinkEvents(Protocol):
    """What a link reports to. Called on the event loop; must not block."""

    def on_welcome(self, address: str, node: NodeDescription, status: NodeStatus) -> None: ...

    def on_messages(self, address: str, messages: Sequence[NodeMessage], status: NodeStatus | None) -> None:
        """Messages are in the order in which they count; ``status`` is None if there was none with them."""

    def on_broken(self, address: str, reason: str, is_orderly: bool = False) -> None:
        """``is_orderly``: the node ended its session itself."""


class _Broken(Exception):
    """Ends a link's task with the reason."""


class _Left(_Broken):
    """The node ended its session in good order."""


class RoundTrip(NamedTuple):
    """Two readings of our clock around one of the node's."""

    asked_s: float
    there_s: float
    answered_s: float

    @property
    def offset_s(self) -> float:
        """The node's clock minus ours, if both ways took as long."""
        return self.there_s - (self.asked_s + self.answered_s) / 2

    @property
    def error_s(self) -> float:
        """The node read its clock somewhere between our readings: the offset is off by no more than this."""
        return (self.answered_s - self.asked_s) / 2


class NodeLink:
    """After `dial`, exactly one of on_broken or a `hang_up` by the owner ends the connection."""

    def __init__(
        self,
        address: str,
        events: LinkEvents,
        hello: node_pb2.SessionHello,
        config: LinkConfig,
        turns: Turns,
        defects: Defects | None = None,
        access: AccessConfig = OPEN,
        faults: Faults | None = None,
    ) -> None:
        self.address = address
        self._access = access
        self._faults = faults
        # Of the session, in a router that was started with a schedule of faults.
        self._line: Line[bytes] | None = None
        self._turns = turns
        self._defects = defects or Defects(_log, MonotonicClock())
        self._events = events
        self._hello_message = hello
        self._config = config
        self._task: asyncio.Task[None] | None = None
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._channel: aio.Channel | None = None

    def dial(self) -> None:
        assert self._task is None or self._task.done(), "one connection at a time"
        self._out, self._line = asyncio.Queue(self._config.max_unsent), None
        self._task = asyncio.create_task(self._run(), name=f"link {self.address}")

    def hang_up(self) -> None:
        """End the connection; nothing more is reported."""
        if self._line is not None:
            self._line.close()
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=2.0)

    def send(self, message: RouterMessage, prompt: Prompt) -> None:
        """Raises InvalidRequest for a message that is too long for a node, NodeLost if too much waits to be sent."""
        encoded = session_bytes.encode(message, prompt)
        if len(encoded) > self._config.max_sent_bytes:
            # The node would end the session, and with it all sequences there.
            raise errors.InvalidRequest(
                f"the request takes {len(encoded)} bytes, expected at most {self._config.max_sent_bytes}; shorten the "
                "prompt, stop_token_ids or logit_bias"
            )
        if self._line is None:
            self._put(encoded)
        else:
            self._line.put(encoded, kind_of(message), message.sequence_id)

    def _put(self, encoded: bytes) -> None:
        try:
            self._out.put_nowait(encoded)
        except asyncio.QueueFull:
            raise errors.NodeLost(f"{self.address} has {self._out.maxsize} messages unsent") from None

    # Each of these raises Unavailable if the node does not answer in time, and what the node refuses it with.

    async def ledger(self) -> node_pb2.LedgerResponse:
        with self._asking() as stub:
            return await stub.Ledger(
                node_pb2.LedgerRequest(), timeout=self._config.ledger_timeout_s, metadata=self._access.metadata
            )

    async def cache(self, *, drop: bool) -> node_pb2.CacheResponse:
        """The node's prefix cache; ``drop``: it forgets its blocks first."""
        with self._asking() as stub:
            return await stub.Cache(
                node_pb2.CacheRequest(drop=drop), timeout=self._config.ledger_timeout_s, metadata=self._access.metadata
            )

    async def drain(self, grace_s: float) -> node_pb2.DrainResponse:
        """Ask the node to leave."""
        with self._asking() as stub:
            return await stub.Drain(
                node_pb2.DrainRequest(grace_s=grace_s),
                timeout=self._config.ledger_timeout_s,
                metadata=self._access.metadata,
            )

    async def set_role(self, role: Role | None, expected: Role | None = None) -> node_pb2.SetRoleResponse:
        """Put the node into another pool, None: the one that it started in. ``expected``: as in the proto."""
        request = node_pb2.SetRoleRequest()
        if role is not None:
            request.role = codec.role_to_pb(role)
        if expected is not None:
            request.expected_role = codec.role_to_pb(expected)
        with self._asking() as stub:
            return await stub.SetRole(request, timeout=self._config.ledger_timeout_s, metadata=self._access.metadata)

    async def trace(self, last_s: float, clock: Clock) -> router_pb2.ClusterTraceResponse.NodeTrace:
        """What the node did lately, and how far its clock is from ours."""
        timeout_s, metadata = self._config.ledger_timeout_s, self._access.metadata
        trips: list[RoundTrip] = []
        with self._asking() as stub:
            for _ in range(_CLOCK_TRIPS):
                asked_s = clock.now()
                there_s = (await stub.Clock(node_pb2.ClockRequest(), timeout=timeout_s, metadata=metadata)).now_s
                trips.append(RoundTrip(asked_s, there_s, clock.now()))
            found = await stub.Trace(node_pb2.TraceRequest(last_s=last_s), timeout=timeout_s, metadata=metadata)
        best = min(trips, key=lambda trip: trip.error_s)
        return router_pb2.ClusterTraceResponse.NodeTrace(
            clock_offset_s=best.offset_s, clock_error_s=best.error_s, trace=found
        )

    @contextmanager
    def _asking(self) -> Iterator[node_pb2_grpc.NodeAsyncStub]:
        if self._channel is None:
            raise errors.Unavailable(f"{self.address} is not connected")
        try:
            yield node_pb2_grpc.NodeStub(self._channel)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            # The channel was closed: to the caller of a call that looks as if it was itself cancelled.
            raise errors.Unavailable(f"{self.address}: the connection ended before the answer came") from None
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                # It is this router that has no right there, not its client.
                raise errors.Unavailable(f"{self.address} refuses this router: {error.details()}") from error
            if ERROR_CODE_KEY in (error.trailing_metadata() or ()):
                # The node answers, with a refusal of its own.
                raise error_of(error) from error
            raise errors.Unavailable(f"{self.address}: {error.code().name} {error.details()}") from error

    async def _run(self) -> None:
        reason, is_orderly = "the connection ended", False
        try:
            # A channel of its own for every connection: nothing of a former life of the address survives in it.
            async with dial(self.address, self._access, _channel_options(self._config)) as channel:
                await self._serve(channel)
        except* _Broken as group:
            reason, is_orderly = str(group.exceptions[0]), isinstance(group.exceptions[0], _Left)
        except* (aio.AioRpcError, aio.UsageError, asyncio.InvalidStateError) as group:
            reason = _why(group.exceptions[0])
        except* TimeoutError:
            reason = f"no welcome within {self._config.connect_timeout_s} s"
        except* errors.BatonError as group:
            reason = f"protocol error: {group.exceptions[0]}"
            _log.error("%s: %s", self.address, reason)
        except* Exception as group:
            reason = self._defects.caught("link", group.exceptions[0], self.address).message
        finally:
            # Whatever ended it, a cancellation from within grpc too; unless the owner has hung up, and may have dialled
            # again meanwhile.
            if self._task is asyncio.current_task():
                self._task = None
                self._events.on_broken(self.address, reason, is_orderly)

    async def _serve(self, channel: aio.Channel) -> None:
        self._channel = channel
        line: Line[bytes] | None = None
        # As a stub opens it, but for what is written.
        opened: aio.StreamStreamMultiCallable[bytes, node_pb2.SessionResponse] = channel.stream_stream(
            _SESSION, request_serializer=None, response_deserializer=node_pb2.SessionResponse.FromString
        )
        session = opened(metadata=self._access.metadata)
        try:
            async with patient_timeout(self._config.connect_timeout_s):
                welcome = await self._hello(channel, session)
            node, status = codec.node_from_pb(welcome.node), codec.status_from_pb(welcome.status)
            if self._faults is not None:
                self._line = line = Line(self._faults, Layer.SESSION, node.node_id, self._put)
            # A node that listens on every interface does not know its address. The one that was dialled is handed on.
            self._events.on_welcome(
                self.address,
                replace(
                    node,
                    address=as_dialled(node.address, self.address),
                    metrics_address=as_dialled(node.metrics_address, self.address),
                ),
                status,
            )
            reader = session_bytes.Reader(node.node_id, self.address, self._defects)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read_all(session, reader))
                tasks.create_task(self._write(session))
                if line is not None:
                    tasks.create_task(_until_cut(line))
        finally:
            if self._channel is channel:  # a hung-up connection may end after its successor began
                self._channel = None
            if line is not None:
                line.close()
            if self._line is line:
                self._line = None
            session.cancel()

    async def _hello(
        self, channel: aio.Channel, session: Session
    ) -> node_pb2.SessionWelcome | node_pb2.DescribeResponse:
        """The welcome; from a node whose protocol has no such session its description, which has the protocol."""
        try:
            await session.write(node_pb2.SessionRequest(hello=self._hello_message).SerializeToString())
            return (await _read(session)).welcome
        except (_Broken, aio.AioRpcError, asyncio.InvalidStateError):
            if await session.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            stub = node_pb2_grpc.NodeStub(channel)
            return await stub.Describe(node_pb2.DescribeRequest(), metadata=self._access.metadata)

    async def _write(self, session: Session) -> None:
        while True:
            await session.write(await self._out.get())

    async def _read_all(self, session: Session, reader: session_bytes.Reader) -> None:
        while True:
            response = await _read(session)
            # A hundred nodes may speak at once, each of many sequences: what does not fit into a turn of the loop waits
            # for a later one, and the next response with it.
            await self._turns.wait()
            self._events.on_messages(self.address, reader.messages(response), reader.status(response))


async def _until_cut(line: Line[bytes]) -> None:
    raise _Broken(await line.cut)


async def _read(session: Session) -> node_pb2.SessionResponse:
    message = await session.read()
    if isinstance(message, node_pb2.SessionResponse):
        return message
    code, details = await session.code(), await session.details()
    if code is grpc.StatusCode.OK:
        raise _Left("the node left")
    raise _Broken(f"the node ended the session: {code.name} {details}".rstrip())


def _why(error: BaseException) -> str:
    if isinstance(error, aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return errors.described(error)


def _channel_options(config: LinkConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
    ]


def hello(router_id: str, incarnation: int) -> node_pb2.SessionHello:
    return node_pb2.SessionHello(router_id=router_id, router_incarnation=incarnation, protocol_version=PROTOCOL_VERSION)
