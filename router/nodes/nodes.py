"""The connections to the nodes: carries out what `cluster.membership` decides, and sends messages.

Everything here but `close` runs on the event loop and never waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from baton import errors
from baton.clock import Clock
from baton.defects import Defects
from baton.node_messages import NodeMessage
from baton.registry import NodeRecord
from baton.types import NodeDescription, NodeStatus
from router.cluster.membership import (
    Action,
    Broken,
    Dial,
    Event,
    Forget,
    HangUp,
    Heard,
    Listed,
    Member,
    Membership,
    NodeChanged,
    NodeDown,
    NodeRefused,
    NodeUnreachable,
    NodeUp,
    Tick,
    Welcomed,
)
from router.cluster.repurpose import Change
from router.cluster.scheduler import Scheduler
from router.config import RouterConfig
from router.flow.messages import ToNode
from router.metrics import RouterMetrics
from router.nodes.sessions import LinkEvents, NodeLink

_log = logging.getLogger("baton.router")

# Membership looks at silences this often; nodes send something every 0.25 s.
_TICK_S = 0.1


class NodesOwner(Protocol):
    """What the nodes report to."""

    def on_node_messages(self, node_id: str, messages: Sequence[NodeMessage]) -> None: ...

    def on_node_down(self, node_id: str, reason: str) -> None: ...

    def place(self) -> None:
        """The scheduler has been told of something; there may be room for waiting sequences."""

    def on_tick(self) -> None: ...


class Nodes:
    """``new_link`` makes the connection to an address (a fake one in tests)."""

    def __init__(
        self,
        config: RouterConfig,
        clock: Clock,
        new_link: Callable[[str, LinkEvents], NodeLink],
        scheduler: Scheduler[Any],
        owner: NodesOwner,
        metrics: RouterMetrics,
        defects: Defects,
    ) -> None:
        self.membership = Membership(config.nodes, config.membership)
        self.links: dict[str, NodeLink] = {}
        self._clock = clock
        self._new_link = new_link
        self._scheduler = scheduler
        self._owner = owner
        self._metrics = metrics
        self._defects = defects
        self._ticker: asyncio.TimerHandle | None = None
        self._ticked_s = 0.0
        self._watchers: list[Callable[[], None]] = []
        # Role changes that nodes have been asked for and have not answered.
        self._asking: set[asyncio.Task[None]] = set()

    @property
    def members(self) -> list[Member]:
        return list(self.membership.members.values())

    def watch(self, on_change: Callable[[], None]) -> None:
        """Be told when nodes come, go or change state; not of every status."""
        self._watchers.append(on_change)

    def start(self) -> None:
        self._carry_out(self.membership.start())
        self._ticked_s = self._clock.now() - _TICK_S
        self._on_ticker()

    async def close(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        if asking := set(self._asking):
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
        async with asyncio.TaskGroup() as tasks:
            for link in self.links.values():
                tasks.create_task(link.close())

    def send(self, action: ToNode) -> None:
        """A node that is down is sent nothing. Raises if the message cannot be encoded or is too long for a node."""
        member = self.membership.member_of(action.node_id)
        if member is None:
            return
        link = self.links[member.address]
        try:
            link.send(action.message, action.prompt)
        except errors.NodeLost as error:
            # A node that takes no messages is lost. Told later: a flow is in the middle of its actions.
            link.hang_up()
            asyncio.get_running_loop().call_soon(self.on_broken, member.address, error.message)

    def set_role(self, change: Change) -> None:
        """Ask a node to belong to another pool; its next status shows whether it does."""
        if (member := self.membership.member_of(change.node_id)) is not None:
            task = asyncio.create_task(self._set_role(self.links[member.address], change), name="role change")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _set_role(self, link: NodeLink, change: Change) -> None:
        which = f"{change.node_id} from the {change.expected.value} pool to the {change.role.value} pool"
        why = f"a request loses {change.pressure_s:.2f} s there, and {change.other_pressure_s:.2f} s in the other one"
        with self._defects.contained("role change", change.node_id):
            try:
                await link.set_role(change.role, change.expected)
            except errors.BatonError as error:
                _log.info("not moved: %s: %s", which, error.message)
            else:
                _log.info("moved: %s: %s", which, why)

    # ── What links and the registry report ──────────────────────────────────────────────────────────────────────────

    def on_welcome(self, address: str, node: NodeDescription, status: NodeStatus) -> None:
        self._handle(Welcomed(address, node, status))

    def on_messages(self, address: str, messages: Sequence[NodeMessage], status: NodeStatus | None) -> None:
        member = self.membership.members.get(address)
        if member is None or not member.is_up or member.node is None:
            return
        self._owner.on_node_messages(member.node.node_id, messages)
        if status is not None:
            self._note_move(member, status)
            self._scheduler.node_status(member.node.node_id, status)
        self._handle(Heard(address, status))

    def _note_move(self, member: Member, status: NodeStatus) -> None:
        before, after = member.home_role, status.home_role
        if before is not None and before is not after:
            _log.info("node at %s has left the pool %s for %s", member.address, before.value, after.value)
            self._metrics.node_moves.add(before.value)

    def on_broken(self, address: str, reason: str, is_orderly: bool = False) -> None:
        self._handle(Broken(address, reason, is_orderly))

    def on_listing(self, records: Sequence[NodeRecord]) -> None:
        """All nodes that the registry knows now."""
        self._handle(Listed({record.address: record.incarnation for record in records}))

    def _on_ticker(self) -> None:
        # Armed first: whatever a look raises, the next one comes.
        self._ticker = asyncio.get_running_loop().call_later(_TICK_S, self._on_ticker)
        now = self._clock.now()
        late_s, self._ticked_s = max(0.0, now - self._ticked_s - _TICK_S), now
        with self._defects.contained("membership"):
            self._handle(Tick(late_s))
        self._owner.on_tick()

    # ── What membership decides ─────────────────────────────────────────────────────────────────────────────────────

    def _handle(self, event: Event) -> None:
        if actions := self.membership.handle(event, self._clock.now()):
            self._carry_out(actions)
        self._owner.place()

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            with self._defects.contained("membership", type(action).__name__):
                self._perform(action)
        if any(not isinstance(action, Dial | HangUp) for action in actions):
            for watcher in self._watchers:
                with self._defects.contained("watcher"):
                    watcher()

    def _perform(self, action: Action) -> None:
        match action:
            case Dial():
                self._dial(action.address)
            case HangUp():
                self.links[action.address].hang_up()
            case Forget():
                self.links.pop(action.address).hang_up()
            case NodeUp():
                node = action.node
                role = action.status.home_role.value
                _log.info("node %s (%s, %s) is up at %s", node.node_id, role, node.device, node.address)
                self._scheduler.node_up(node, action.status, self._is_available(node.node_id), self._clock.now())
            case NodeChanged():
                self._scheduler.node_changed(action.node_id, self._is_available(action.node_id), self._clock.now())
            case NodeDown():
                self._on_down(action)
            case NodeRefused():
                _log.error("node at %s is refused: %s", action.address, action.reason)
            case NodeUnreachable():
                _log.warning("no node answers at %s: %s; dialling on", action.address, action.reason)

    def _is_available(self, node_id: str) -> bool:
        member = self.membership.member_of(node_id)
        return member is not None and self.membership.is_available(member)

    def _dial(self, address: str) -> None:
        try:
            if address not in self.links:
                self.links[address] = self._new_link(address, self)
            self.links[address].dial()
        except Exception as error:
            # As if no node had answered: it is dialled again.
            defect = self._defects.caught("membership", error, f"dialling {address}")
            asyncio.get_running_loop().call_soon(self.on_broken, address, defect.message)

    def _on_down(self, action: NodeDown) -> None:
        if action.has_left:
            _log.info("node %s has left: %s", action.node_id, action.reason)
        else:
            _log.warning("node %s is lost: %s", action.node_id, action.reason)
        load = self._scheduler.node(action.node_id)
        if load is not None:
            counter = self._metrics.node_drains if load.status.draining else self._metrics.node_losses
            counter.add(load.status.home_role.value)
        self._owner.on_node_down(action.node_id, action.reason)
