"""Drives both machines of a node: what sessions, engine, sender and receiver report goes in, what follows is performed.

A sequence whose handling raises fails by itself: no session, step or other sequence ends with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from baton.clock import Clock
from baton.defects import Defects
from baton.driver import Driver
from baton.errors import quoted
from baton.faults.faults import Faults
from baton.machine import Machine, Tick
from baton.node_messages import CacheChanged, Defect, FromRouter, Joined, NodeMessage, Send, SequenceFailed, SessionLost
from baton.types import Failure, Lease, NodeDescription, NodeStatus, Role
from decode_node import machine as decode_machine
from decode_node.actions import DecodeActions
from engine.events import EngineEvent
from engine.known import CacheFeed
from engine.replica import Replica
from kvtransfer.protocol.receiver_events import LeaseNotice
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from prefill_node import machine as prefill_machine
from prefill_node.actions import PrefillActions
from worker import roles
from worker.session import SessionConfig, SessionHost

_log = logging.getLogger("baton.worker")


class _About(Protocol):
    """An event or an action; its sequence is empty if it is about several."""

    @property
    def sequence_id(self) -> str: ...


Event = TypeVar("Event", bound=_About)
Action = TypeVar("Action", bound=_About)
_ActionIn = TypeVar("_ActionIn", bound=_About, contravariant=True)


class Actions(Protocol[Event, _ActionIn]):
    """What is particular to a phase: PrefillActions, DecodeActions."""

    # Events and actions whose exceptions also reach the caller that fed the event.
    raised: tuple[type, ...]

    def perform(self, action: _ActionIn) -> None: ...

    def answer(self, about: Event | Defect | _ActionIn, failure: Failure) -> Event | Defect | None: ...


class LeaseObserver:
    """Hears what leases come to, on the event loop. Does nothing by itself."""

    def told(self, message: Lease | Joined) -> None:
        """A router is told that a lease was granted, or that its sequence joined."""

    def noticed(self, notice: LeaseNotice) -> None:
        """Its KV arrived, or the lease is over."""


class _Phase(Generic[Event, Action]):
    """One machine and its actions. What raises for a sequence fails that sequence."""

    def __init__(
        self,
        name: str,
        machine: Machine[Event | Defect, Action],
        actions: Actions[Event, Action],
        send: Callable[[Send], None],
        on_fed: Callable[[], None],
        clock: Clock,
        defects: Defects,
    ) -> None:
        """``on_fed`` is called when events have been handled."""
        self._name = name
        self._send = send
        self._on_fed = on_fed
        self._defects = defects
        self._actions = actions
        self._driver: Driver[Event | Defect, Action] = Driver(machine, self._perform, clock, on_error=self._on_error)
        # Sequences that are being failed because something raised.
        self._failing: set[str] = set()

    def feed(self, *events: Event | Defect) -> None:
        try:
            for event in events:
                self._driver.feed(event)
        finally:
            self._on_fed()

    def fail(self, sequence_id: str, failure: Failure) -> None:
        """End the sequence here, in whatever phase it is; an unknown one is ignored."""
        self._fail(Defect(sequence_id, failure))

    def _perform(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send(action)
        else:
            self._actions.perform(action)

    def _on_error(self, about: Event | Defect | Action, error: Exception) -> None:
        failure = self._defects.failure(self._name, error, quoted(about.sequence_id))
        answer = self._actions.answer(about, failure)
        if answer is not None:
            self._fail(answer)
        if isinstance(about, self._actions.raised):
            raise error

    def _fail(self, event: Event | Defect) -> None:
        if event.sequence_id in self._failing:
            # Once: what raises on the way out as well stays held, and shows in the ledger.
            return
        self._failing.add(event.sequence_id)
        try:
            self._driver.feed(event)
        finally:
            self._failing.discard(event.sequence_id)
            self._on_fed()


class NodeService:
    """Both phases of one node over one replica, one sender and one receiver. Lives on one event loop."""

    def __init__(
        self,
        node: NodeDescription,
        replica: Replica,
        sender: Sender,
        receiver: Receiver,
        *,
        clock: Clock,
        defects: Defects,
        config: decode_machine.DecodeConfig | None = None,
        session_config: SessionConfig | None = None,
        observer: LeaseObserver | None = None,
        roles_config: roles.RolesConfig | None = None,
        on_role: Callable[[roles.RoleChanged], None] = lambda change: None,
        faults: Faults | None = None,
    ) -> None:
        """``on_role`` is called after every change of a role."""
        self.node = node
        self.replica = replica
        self.sessions = SessionHost(self, clock=clock, config=session_config, defects=defects, faults=faults)
        self._defects = defects
        self._observer = observer or LeaseObserver()
        self._on_role = on_role
        self.roles = roles.Roles(node.home_role, roles_config or roles.RolesConfig())
        self._roles: Driver[roles.Event, roles.RoleChanged] = Driver(self.roles, self._role_changed, clock, tick=Tick)
        # By session, what its router was not told of the prefix cache.
        self._cache_feeds: dict[int, CacheFeed] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._loop = asyncio.get_running_loop()
        self._prefill_machine = prefill_machine.PrefillMachine(node.node_id)
        self._decode_machine = decode_machine.DecodeMachine(node.node_id)
        self._prefill_actions = PrefillActions(
            replica,
            sender,
            feed=lambda event: self._prefill.feed(event),
            listener=self._hear,
            defects=defects,
        )
        decode_actions = DecodeActions(
            replica,
            receiver,
            feed=lambda event: self._decode.feed(event),
            listener=self._hear,
            let_go=lambda event: self._prefill.feed(event),
            config=config or decode_machine.DecodeConfig(),
        )
        self._prefill: _Phase[prefill_machine.Event, prefill_machine.Action] = _Phase(
            "prefill", self._prefill_machine, self._prefill_actions, self._send, self._on_fed, clock, defects
        )
        self._decode: _Phase[decode_machine.Event, decode_machine.Action] = _Phase(
            "decode", self._decode_machine, decode_actions, self._send, self._on_fed, clock, defects
        )

    def status(self) -> NodeStatus:
        mine = self.roles
        return replace(self.replica.status(mine.acting), home=mine.home, is_pinned=mine.is_pinned)

    def set_role(self, role: Role | None, expected: Role | None) -> None:
        """As roles.SetRole. Raises Conflict, InvalidRequest."""
        self._roles.feed(roles.SetRole(role, expected))
        self.sessions.tell_status()

    @property
    def num_sequences(self) -> int:
        return self._prefill_machine.num_sequences + self._decode_machine.num_sequences

    async def drained(self) -> None:
        """Returns when no sequence is left here."""
        await self._is_idle.wait()

    async def close(self, timeout_s: float) -> bool:
        """End all sessions: sequences are cancelled, leases revoked, pushes awaited; False if some did not end."""
        self._roles.close()
        self.sessions.close()
        for number in self.sessions.numbers:
            self.closed(number)
        return await self._prefill_actions.close(timeout_s)

    def on_lease(self, notice: LeaseNotice) -> None:
        """From the receiver. Raises if an Arrived is not taken over: its sender must not be acknowledged."""
        with self._defects.contained("record"):
            self._observer.noticed(notice)
        self._decode.feed(notice)

    # -- for the sessions

    def received(self, event: FromRouter) -> None:
        self._prefill.feed(event)
        self._decode.feed(event)

    def cache_changes(self, session: int, most: int) -> CacheChanged | None:
        if self.node.prefix_cache is None:
            return None
        feed = self._cache_feeds.get(session)
        if feed is None:
            feed = self._cache_feeds[session] = self.replica.follow_cache()
        return self.replica.take_cache_changes(feed, most)

    def closed(self, session: int) -> None:
        feed = self._cache_feeds.pop(session, None)
        if feed is not None:
            self.replica.unfollow_cache(feed)
        self._prefill.feed(SessionLost(session))
        self._decode.feed(SessionLost(session))

    def unsendable(self, session: int, message: NodeMessage, error: Exception) -> None:
        """The machine may have let go of the sequence with this very message: the router is told in any case."""
        sequence_id = message.sequence_id
        failure = self._defects.failure("session", error, quoted(sequence_id))
        self._prefill.fail(sequence_id, failure)
        self._decode.fail(sequence_id, failure)
        if not isinstance(message, SequenceFailed):
            self.sessions.put(session, SequenceFailed(sequence_id, failure))

    # -- from the engine

    def _hear(self, events: Sequence[EngineEvent]) -> None:
        """Called in the engine thread, with the events of one step."""
        self._loop.call_soon_threadsafe(self._heard, events)

    def _heard(self, events: Sequence[EngineEvent]) -> None:
        """To the machine that has the sequence now: it may have changed hands since the engine spoke."""
        has = self._prefill_machine.has
        if not self._prefill_machine.num_sequences:
            self._decode.feed(*events)
            return
        self._prefill.feed(*[event for event in events if has(event.sequence_id)])
        self._decode.feed(*[event for event in events if not has(event.sequence_id)])

    # -- from the phases

    def _send(self, action: Send) -> None:
        message = action.message
        self.sessions.put(action.session, message)
        if isinstance(message, Lease | Joined):
            with self._defects.contained("record"):
                self._observer.told(message)

    def _on_fed(self) -> None:
        prompts, decodes = self._prefill_machine, self._decode_machine
        self._roles.feed(
            roles.Work(has_prompts=prompts.has_prompts, has_decodes=decodes.num_sequences > 0 or prompts.has_decodes)
        )
        if self.num_sequences:
            self._is_idle.clear()
        else:
            self._is_idle.set()

    def _role_changed(self, change: roles.RoleChanged) -> None:
        before, after, reason = change.before.value, change.after.value, change.reason
        is_home = reason in (roles.Reason.OPERATOR, roles.Reason.SCHEDULER)
        what = f"is in the pool {after} now (before: {before})" if is_home else f"acts as {after} (before: {before})"
        _log.info("%s %s: %s", self.node.node_id, what, reason.value)
        self.sessions.tell_status()
        with self._defects.contained("record"):
            self._on_role(change)
