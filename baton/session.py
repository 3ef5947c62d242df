"""The node's end of a session: hello, welcome, batched messages out, status on time, and one event when it is over.

Owns the stream and its bounded outbox. Knows nothing of prompts or decoding: the service behind it says what a request
means and how items become a message.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc.aio

from baton import PROTOCOL_VERSION, codec
from baton.clock import Clock
from baton.defects import Defects
from baton.errors import BatonError, DeadlineExceeded, Incompatible, InvalidRequest, Overloaded, Unavailable
from baton.patience import patient_timeout
from baton.types import TokenChunk
from baton.v1 import common_pb2, node_pb2

_log = logging.getLogger("baton.session")

Item = TypeVar("Item")
RequestT = TypeVar("RequestT", node_pb2.PrefillSessionRequest, node_pb2.DecodeSessionRequest)
ResponseT = TypeVar("ResponseT", node_pb2.PrefillSessionResponse, node_pb2.DecodeSessionResponse)
_RequestIn = TypeVar("_RequestIn", node_pb2.PrefillSessionRequest, node_pb2.DecodeSessionRequest, contravariant=True)
_ResponseOut = TypeVar("_ResponseOut", node_pb2.PrefillSessionResponse, node_pb2.DecodeSessionResponse, covariant=True)


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Limits and times of a session; a router misses the node after about 2 s without status."""

    status_interval_s: float = 0.2
    hello_timeout_s: float = 5.0
    # A router that takes nothing for this long is as good as gone.
    write_timeout_s: float = 10.0
    max_outbox_items: int = 65_536
    max_message_items: int = 2_048


class Outbox(Generic[Item]):
    """Items on their way to one peer. ``put`` never blocks; past the limit the outbox closes with Overloaded."""

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._items: deque[Item] = deque()
        self._wake = asyncio.Event()
        self._is_closed = False
        self._is_nudged = False
        self._error: BatonError | None = None

    def put(self, item: Item) -> None:
        """Items put after the close go nowhere: their reader has left."""
        if self._is_closed:
            return
        if len(self._items) >= self._max_items:
            self.close(Overloaded(f"{len(self._items)} messages wait for a router that does not read, the limit"))
            return
        self._items.append(item)
        self._wake.set()

    def close(self, error: BatonError | None = None) -> None:
        """No more items. With an error, ``take`` raises it at once; else it first gives out what is left."""
        if not self._is_closed:
            self._is_closed = True
            self._error = error
            self._wake.set()

    def nudge(self) -> None:
        """Let ``take`` return now, with or without items."""
        self._is_nudged = True
        self._wake.set()

    async def take(self, max_items: int, timeout_s: float) -> list[Item] | None:
        """What has gathered, at most ``max_items``; [] after ``timeout_s`` or a nudge, None when it is closed."""
        if not self._items and not self._is_closed and not self._is_nudged:
            self._wake.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return []
        if self._error is not None:
            raise self._error
        if not self._items:
            self._is_nudged = False
            return None if self._is_closed else []
        return [self._items.popleft() for _ in range(min(max_items, len(self._items)))]


@dataclass(frozen=True, slots=True, eq=False)
class NodeSession(Generic[Item]):
    """One living session. ``number`` is unique in this process: a router that reconnects is a new session."""

    number: int
    router_id: str
    router_incarnation: int
    outbox: Outbox[Item]


class SessionService(Protocol[_RequestIn, _ResponseOut, Item]):
    """What a node service does with its sessions. All calls come from the event loop and return at once."""

    def describe(self) -> common_pb2.NodeDescription: ...

    def status(self) -> common_pb2.NodeStatus: ...

    def received(self, session: NodeSession[Item], request: _RequestIn) -> None:
        """A request after the hello. A BatonError raised here ends the session: the router broke the protocol."""

    def closed(self, session: NodeSession[Item]) -> None:
        """Exactly once per session: nothing sent to it will arrive any more."""

    def compose(self, items: list[Item]) -> _ResponseOut:
        """An item that cannot be said fails its sequence and leaves the others in the message."""
        ...


class SessionHost(Generic[RequestT, ResponseT, Item]):
    """All sessions of one service. A router that opens a second session ends its first."""

    def __init__(
        self,
        service: SessionService[RequestT, ResponseT, Item],
        *,
        clock: Clock,
        config: SessionConfig | None = None,
        defects: Defects | None = None,
    ) -> None:
        self._defects = defects or Defects(_log, clock)
        self._service: SessionService[RequestT, ResponseT, Item] = service
        self._clock = clock
        self._config = config or SessionConfig()
        self._sessions: dict[int, NodeSession[Item]] = {}
        self._num_opened = 0

    @property
    def numbers(self) -> list[int]:
        """Sessions that are open."""
        return list(self._sessions)

    def put(self, session_number: int, item: Item) -> None:
        """Send, batched with what else is under way; dropped if the session is over."""
        session = self._sessions.get(session_number)
        if session is not None:
            session.outbox.put(item)

    def tell_status(self) -> None:
        """Send every router the status now instead of when it is due."""
        for session in self._sessions.values():
            session.outbox.nudge()

    def close(self) -> None:
        """End every session in good order: what is in the outboxes is still sent."""
        for session in list(self._sessions.values()):
            session.outbox.close()

    async def serve(
        self, requests: AsyncIterator[RequestT], context: grpc.aio.ServicerContext[RequestT, ResponseT]
    ) -> None:
        """Run one session to its end; raises the BatonError that ended it, if one did."""
        hello = await self._hello(requests)
        session = self._open(hello)
        try:
            await self._write(context, self._with_status(self._welcome()))
            async with asyncio.TaskGroup() as tasks:
                receiving = tasks.create_task(self._receive(session, requests))
                await self._send(session, context)
                receiving.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            self._sessions.pop(session.number, None)
            session.outbox.close()
            self._service.closed(session)

    async def _hello(self, requests: AsyncIterator[RequestT]) -> node_pb2.SessionHello:
        try:
            async with patient_timeout(self._config.hello_timeout_s):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            raise DeadlineExceeded(
                f"no hello within {self._config.hello_timeout_s} s, expected it as the first message"
            ) from None
        if first.WhichOneof("message") != "hello":
            raise InvalidRequest(f"a session opened with {first.WhichOneof('message')}, expected hello")
        hello = first.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise Incompatible(
                f"router {hello.router_id} speaks protocol {hello.protocol_version}, this node {PROTOCOL_VERSION}"
            )
        if not hello.router_id:
            raise InvalidRequest("router_id is empty, expected a name", param="router_id")
        return hello

    def _open(self, hello: node_pb2.SessionHello) -> NodeSession[Item]:
        for old in list(self._sessions.values()):
            if old.router_id == hello.router_id:
                old.outbox.close(Unavailable(f"router {hello.router_id} opened a new session"))
        self._num_opened += 1
        outbox = Outbox[Item](self._config.max_outbox_items)
        session = NodeSession(self._num_opened, hello.router_id, hello.router_incarnation, outbox)
        self._sessions[session.number] = session
        return session

    def _welcome(self) -> ResponseT:
        message = self._service.compose([])
        message.welcome.node.CopyFrom(self._service.describe())
        message.welcome.status.CopyFrom(self._service.status())
        return message

    def _with_status(self, message: ResponseT) -> ResponseT:
        message.status.CopyFrom(self._service.status())
        return message

    async def _receive(self, session: NodeSession[Item], requests: AsyncIterator[RequestT]) -> None:
        async for request in requests:
            try:
                self._service.received(session, request)
            except BatonError:
                raise
            except Exception as error:
                self._defects.caught("session", error, f"from router {session.router_id}")
        # The router said goodbye.
        session.outbox.close()

    async def _send(self, session: NodeSession[Item], context: grpc.aio.ServicerContext[RequestT, ResponseT]) -> None:
        config, told_s = self._config, self._clock.now()
        while True:
            due_s = max(0.0, told_s + config.status_interval_s - self._clock.now())
            items = await session.outbox.take(config.max_message_items, due_s)
            if items is None:
                return
            message = self._service.compose(items)
            if not items or self._clock.now() - told_s >= config.status_interval_s / 2:
                told_s = self._clock.now()
                self._with_status(message)
            await self._write(context, message)

    async def _write(self, context: grpc.aio.ServicerContext[RequestT, ResponseT], message: ResponseT) -> None:
        try:
            async with patient_timeout(self._config.write_timeout_s):
                await context.write(message)
        except TimeoutError:
            raise DeadlineExceeded(f"the router took nothing for {self._config.write_timeout_s} s") from None


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class TokensBatch:
    """Token chunks of one message; consecutive ones of a sequence become one, which is what a slow reader gets."""

    def __init__(self) -> None:
        self._by_sequence: dict[str, common_pb2.Tokens] = {}
        self.messages: list[common_pb2.Tokens] = []

    def add(self, chunk: TokenChunk) -> None:
        known = self._by_sequence.get(chunk.sequence_id)
        if known is None or known.index + len(known.token_ids) != chunk.index:
            message = self._by_sequence[chunk.sequence_id] = codec.tokens_to_pb(chunk)
            self.messages.append(message)
            return
        known.token_ids.extend(chunk.token_ids)
        known.logprobs.extend(codec.logprobs_to_pb(position) for position in chunk.logprobs)
        known.finish_reason = codec.finish_to_pb(chunk.finish_reason)
