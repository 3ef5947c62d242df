"""The node's end of its sessions: hello, welcome, batched responses, status on time, and one call when one is over.

Owns each stream and its bounded outbox. What a request means is its owner's business.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

import grpc.aio

from baton import PROTOCOL_VERSION
from baton.clock import Clock
from baton.codec import node_to_pb, status_to_pb
from baton.defects import Defects
from baton.errors import BatonError, DeadlineExceeded, Incompatible, InvalidRequest, Overloaded, Unavailable, leaves_of
from baton.faults.faults import Faults
from baton.faults.kinds import Layer, kind_of
from baton.faults.line import Line
from baton.node_messages import CacheChanged, FromRouter, NodeMessage
from baton.patience import patient_timeout
from baton.types import NodeDescription, NodeStatus, PromptLogprobs
from baton.v1 import node_pb2
from worker import session_codec

Requests = AsyncIterator[node_pb2.SessionRequest]
Context = grpc.aio.ServicerContext[node_pb2.SessionRequest, node_pb2.SessionResponse]
_MAX_ROUTER_ID_CHARS = 255


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Limits and times of a session; a router misses the node after about 2 s without status."""

    status_interval_s: float = 0.2
    hello_timeout_s: float = 5.0
    # A router that takes nothing for this long is as good as gone.
    write_timeout_s: float = 10.0
    max_outbox_items: int = 65_536
    max_message_items: int = 2_048
    # Blocks of the prefix cache that one message names; a router takes in so many in 4 ms.
    max_cache_keys: int = 2_048
    # Of routers at once; one that opens a second session ends its first.
    max_sessions: int = 256


def _num_items(message: NodeMessage) -> int:
    """Each log-probability of a prompt takes as much room as a token."""
    return len(message.logprobs) if isinstance(message, PromptLogprobs) else 1


class Outbox:
    """Messages on their way to one router. ``put`` never blocks; past the limit the outbox closes with Overloaded."""

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._messages: deque[NodeMessage] = deque()
        self._num_items = 0
        self._wake = asyncio.Event()
        self._is_closed = False
        self._is_nudged = False
        self._error: BatonError | None = None

    def put(self, message: NodeMessage) -> None:
        """Messages put after the close go nowhere: their reader has left."""
        if self._is_closed:
            return
        if self._num_items >= self._max_items:
            self.close(Overloaded(f"{self._num_items} messages wait for a router that does not read, the limit"))
            return
        self._messages.append(message)
        self._num_items += _num_items(message)
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

    async def take(self, max_items: int, timeout_s: float) -> list[NodeMessage] | None:
        """What has gathered: messages until they have ``max_items``; [] after ``timeout_s`` or a nudge, None when it is
        closed."""
        if not self._messages and not self._is_closed and not self._is_nudged:
            self._wake.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return []
        if self._error is not None:
            raise self._error
        if not self._messages:
            self._is_nudged = False
            return None if self._is_closed else []
        taken: list[NodeMessage] = []
        num_left = max_items
        while self._messages and num_left > 0:
            taken.append(message := self._messages.popleft())
            num_left -= _num_items(message)
        self._num_items -= max_items - num_left
        return taken


def _closing(outbox: Outbox) -> Callable[[str], None]:
    return lambda reason: outbox.close(Unavailable(reason))


@dataclass(frozen=True, slots=True, eq=False)
class NodeSession:
    """One living session. ``number`` is unique in this process: a router that reconnects is a new session."""

    number: int
    router_id: str
    outbox: Outbox
    # Towards the outbox, in a node that was started with a schedule of faults.
    line: Line[NodeMessage] | None = None


class SessionOwner(Protocol):
    """What the node does with its sessions. All calls come from the event loop and return at once."""

    @property
    def node(self) -> NodeDescription: ...

    def status(self) -> NodeStatus: ...

    def received(self, event: FromRouter) -> None: ...

    def closed(self, session: int) -> None:
        """Exactly once per session: nothing sent to it will arrive any more."""

    def cache_changes(self, session: int, most: int) -> CacheChanged | None:
        """Up to ``most`` blocks that the session was not told of, in the first calls all that there are; None if it
        knows all."""

    def unsendable(self, session: int, message: NodeMessage, error: Exception) -> None:
        """No response can hold the message; the others under way are sent."""


class SessionHost:
    """All sessions of one node. A router that opens a second session ends its first."""

    def __init__(
        self,
        owner: SessionOwner,
        *,
        clock: Clock,
        defects: Defects,
        config: SessionConfig | None = None,
        faults: Faults | None = None,
    ) -> None:
        self._faults = faults
        self._defects = defects
        self._owner = owner
        self._clock = clock
        self._config = config or SessionConfig()
        self._sessions: dict[int, NodeSession] = {}
        self._num_opened = 0

    @property
    def numbers(self) -> list[int]:
        """Sessions that are open."""
        return list(self._sessions)

    def put(self, session_number: int, message: NodeMessage) -> None:
        """Send, batched with what else is under way; dropped if the session is over."""
        session = self._sessions.get(session_number)
        if session is None:
            return
        if session.line is None:
            session.outbox.put(message)
        else:
            session.line.put(message, kind_of(message), message.sequence_id)

    def tell_status(self) -> None:
        """Send every router the status now instead of when it is due."""
        for session in self._sessions.values():
            session.outbox.nudge()

    def close(self) -> None:
        """End every session in good order: what is in the outboxes is still sent."""
        for session in list(self._sessions.values()):
            session.outbox.close()

    async def serve(self, requests: Requests, context: Context) -> None:
        """Run one session to its end; raises the BatonError that ended it, if one did."""
        hello = await self._hello(requests)
        session = self._open(hello)
        try:
            await self._write(context, self._welcome())
            async with asyncio.TaskGroup() as tasks:
                receiving = tasks.create_task(self._receive(session, requests))
                await self._send(session, context)
                receiving.cancel()
        except BaseExceptionGroup as group:
            raise leaves_of(group)[0] from None
        finally:
            self._sessions.pop(session.number, None)
            session.outbox.close()
            if session.line is not None:
                session.line.close()
            self._owner.closed(session.number)

    async def _hello(self, requests: Requests) -> node_pb2.SessionHello:
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
        size = len(hello.router_id)
        if not 0 < size <= _MAX_ROUTER_ID_CHARS:
            expected = f"a name of 1 to {_MAX_ROUTER_ID_CHARS}"
            raise InvalidRequest(f"router_id has {size} characters, expected {expected}", param="router_id")
        return hello

    def _open(self, hello: node_pb2.SessionHello) -> NodeSession:
        for old in list(self._sessions.values()):
            if old.router_id == hello.router_id:
                old.outbox.close(Unavailable(f"router {hello.router_id} opened a new session"))
        if len(self._sessions) >= self._config.max_sessions:
            raise Overloaded(f"{len(self._sessions)} routers have a session with this node, the limit; try again later")
        self._num_opened += 1
        outbox = Outbox(self._config.max_outbox_items)
        line: Line[NodeMessage] | None = None
        if self._faults is not None:
            line = Line(self._faults, Layer.SESSION, hello.router_id, outbox.put, on_cut=_closing(outbox))
        session = NodeSession(self._num_opened, hello.router_id, outbox, line)
        self._sessions[session.number] = session
        return session

    def _welcome(self) -> node_pb2.SessionResponse:
        response = node_pb2.SessionResponse()
        status = status_to_pb(self._owner.status())
        response.welcome.node.CopyFrom(node_to_pb(self._owner.node))
        response.welcome.status.CopyFrom(status)
        response.status.CopyFrom(status)
        return response

    async def _receive(self, session: NodeSession, requests: Requests) -> None:
        async for request in requests:
            try:
                message = session_codec.message_from_pb(request)
            except session_codec.Unreadable as unreadable:
                session.outbox.put(unreadable.refusal(self._defects))
                continue
            with self._defects.contained("session", f"from router {session.router_id}"):
                self._owner.received(FromRouter(session.number, message))
        # The router said goodbye.
        session.outbox.close()

    async def _send(self, session: NodeSession, context: Context) -> None:
        config, told_s = self._config, self._clock.now()
        # A router places by what the node has: what it has at the beginning goes at once, in as many messages as it
        # takes, and what changes goes along with the messages of the step that changed it, or with the next status.
        has_more = True
        while True:
            due_s = 0.0 if has_more else max(0.0, told_s + config.status_interval_s - self._clock.now())
            messages = await session.outbox.take(config.max_message_items, due_s)
            if messages is None:
                return
            # Asked after the messages were taken: a router never hears of a sequence before the blocks that it left.
            change = self._owner.cache_changes(session.number, config.max_cache_keys)
            has_more = change is not None and len(change.stored) + len(change.dropped) == config.max_cache_keys
            response = self._composed(session, messages if change is None else [change, *messages])
            if not messages or self._clock.now() - told_s >= config.status_interval_s / 2:
                told_s = self._clock.now()
                response.status.CopyFrom(status_to_pb(self._owner.status()))
            if session.line is not None:
                await session.line.open()
            await self._write(context, response)

    def _composed(self, session: NodeSession, messages: list[NodeMessage]) -> node_pb2.SessionResponse:
        composer = session_codec.Composer()
        for message in messages:
            try:
                composer.add(message)
            except Exception as error:
                self._owner.unsendable(session.number, message, error)
        return composer.response()

    async def _write(self, context: Context, response: node_pb2.SessionResponse) -> None:
        try:
            async with patient_timeout(self._config.write_timeout_s):
                await context.write(response)
        except TimeoutError:
            raise DeadlineExceeded(f"the router took nothing for {self._config.write_timeout_s} s") from None
