"""Carries out what the flows of all sequences ask for, on the cluster-level scheduler: what a router does whatever its
nodes and clients are connected by.

Pure: no loop, no I/O. The dispatcher puts sessions, streams and records around it, the planner simulated nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from baton.clock import Clock
from baton.node_messages import CacheChanged, HandedOff, NodeMessage, PrefillDone
from baton.observe import Relay
from baton.types import Embedding, Lease, PromptLogprobs, TokenChunk
from router.cluster import scheduler
from router.cluster.policy import Decision, Obstacle
from router.cluster.rebalance import Planned
from router.cluster.scheduler import Scheduler
from router.flow.machine import Flow
from router.flow.messages import (
    Action,
    AttemptFailed,
    Detach,
    End,
    Enqueue,
    Event,
    FromNode,
    MakeRoom,
    MoveOver,
    MoveTo,
    NodeAvailable,
    NodeFull,
    NodeLost,
    NoNodeAvailable,
    Outcome,
    OutcomeKind,
    PairFailed,
    PairWorked,
    Placed,
    ToNode,
)
from router.flow.move import MoveOutcome


class FlowItem(scheduler.Item, Protocol):
    """A sequence in flight."""

    @property
    def flow(self) -> Flow: ...

    # Other choices of its prompt may wait for what it leaves at the nodes.
    is_leading: bool


ItemT = TypeVar("ItemT", bound=FlowItem)


class Flows(ABC, Generic[ItemT]):
    def __init__(self, scheduler: Scheduler[ItemT], clock: Clock) -> None:
        self.scheduler = scheduler
        self.clock = clock
        # The flows that wait have been told that no node is available.
        self._is_without_nodes = False

    # ── What is around it ───────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def _send(self, action: ToNode) -> None:
        """To a node; raises if it cannot be sent."""

    @abstractmethod
    def _deliver(self, item: ItemT, chunk: TokenChunk) -> None:
        """New tokens, to the client."""

    @abstractmethod
    def _deliver_prompt(self, item: ItemT, found: PromptLogprobs | Embedding) -> None:
        """What was asked of its prompt, to the client."""

    @abstractmethod
    def _arm(self, item: ItemT, now: float) -> None:
        """The flow's ``wake_at_s`` may have changed: its Tick is due then."""

    @abstractmethod
    def _ended(self, item: ItemT, outcome: Outcome, relay: Relay) -> None:
        """It is over, and out of the scheduler."""

    @abstractmethod
    def _note(self, item: ItemT, action: AttemptFailed | MoveOver) -> None:
        """For records."""

    @abstractmethod
    def _note_decision(self, decision: Decision | Obstacle) -> None:
        """For records."""

    # ── Nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_node_messages(self, node_id: str, messages: Sequence[NodeMessage]) -> None:
        for message in messages:
            item = self.scheduler.item(message.sequence_id)
            match message:
                case CacheChanged():
                    self.scheduler.cache_changed(node_id, message)
                case PrefillDone():
                    self.scheduler.prefilled(message.sequence_id)
                    self.scheduler.rates.computed(node_id, message.num_computed_tokens, message.compute_s)
                case HandedOff(_, report) if item is None or not item.flow.moves_from(node_id):
                    # Of a prompt: what hides behind one is not what hides behind a sequence that goes on.
                    self.scheduler.rates.moved(report.num_bytes, report.exposed_s)
                case Lease():
                    self.scheduler.confirmed(message.sequence_id)
            if item is not None:  # else it is over
                self._feed(item, FromNode(node_id, message))

    def _lose(self, node_id: str, reason: str) -> list[tuple[str, NodeLost]]:
        """The node is lost: what is to be told to which sequences."""
        lost = NodeLost(node_id, reason)
        # One that has just moved off it counts for it no longer, and waits for its word all the same.
        left = [x.sequence_id for x in self.scheduler.in_flight if x.flow.moves_from(node_id)]
        there = self.scheduler.node_down(node_id, self.clock.now())
        return [(sequence_id, lost) for sequence_id in dict.fromkeys((*there, *left))]

    def _make_room(self, client: str, *, is_passing: bool) -> None:
        """Another client has come: it has a share of the nodes."""
        for crowding in self.scheduler.crowding(client, is_passing=is_passing):
            self._feed(crowding, MakeRoom())

    def _make_room_for_next(self) -> None:
        waiting = self.scheduler.next(self.clock.now())
        if waiting is not None:
            self._make_room(waiting.client, is_passing=True)

    # ── Flows ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _feed(self, item: ItemT, event: Event) -> None:
        now = self.clock.now()
        for action in item.flow.handle(event, now):
            self._perform(item, action)
        self._arm(item, now)
        if item.is_leading and item.flow.has_shared:
            item.is_leading = False
            self.scheduler.has_shared(item, now)

    def _perform(self, item: ItemT, action: Action) -> None:  # noqa: C901 (a flat table)
        scheduler = self.scheduler
        match action:
            case TokenChunk():
                self._deliver(item, action)
            case PromptLogprobs() | Embedding():
                self._deliver_prompt(item, action)
            case ToNode():
                self._send(action)
            case Enqueue():
                if action.is_rerun:
                    scheduler.rerun(item, self.clock.now())
                else:
                    prompt = item.flow.prompt
                    scheduler.arrive(item, self.clock.now(), prompt if prompt.num_choices > 1 else None)
                if self._is_without_nodes:
                    self._feed(item, NoNodeAvailable())
            case Detach():
                scheduler.release(item, self.clock.now())
            case AttemptFailed():
                self._note(item, action)
            case MoveOver():
                if action.outcome is MoveOutcome.MOVED:
                    scheduler.moved(item)
                else:
                    scheduler.move_ended(item)
                self._note(item, action)
            case NodeFull():
                scheduler.node_full(action.node_id)
            case PairFailed():
                scheduler.pair_failed(action.placement, self.clock.now())
            case PairWorked():
                scheduler.pair_worked(action.placement)
            case End():
                self._end(item, action.outcome)

    def _end(self, item: ItemT, outcome: Outcome) -> None:
        self.scheduler.depart(item, self.clock.now())
        relay = item.flow.lifeline.relay()
        if outcome.kind is OutcomeKind.FINISHED and not relay.moves:
            # One that moved says nothing of one node's speed.
            self.scheduler.generated(relay.decode_node_id, relay.num_tokens, relay.tbt_mean_s)
        self._ended(item, outcome, relay)

    # ── Moves ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _move_next(self) -> bool:
        """Begin the next move of a running sequence; False if none is to move."""
        move = self.scheduler.next_move(self.clock.now())
        if move is None:
            return False
        self._begin_move(move)
        return True

    def _begin_move(self, move: Planned[ItemT]) -> None:
        self.scheduler.begin_move(move, self.clock.now())
        self._feed(move.item, MoveTo(move.target_id, move.reason, move.num_headroom_tokens))

    # ── Placement ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _place(self, item: ItemT, now: float) -> bool:
        """Place the sequence whose turn it is; False if it must wait."""
        decision = self.scheduler.decide(item, now)
        is_without_nodes = decision is Obstacle.NO_NODE
        if is_without_nodes is not self._is_without_nodes:
            # Told when a look finds a change, not when a node comes up: one that was only suspect does not come up.
            self._is_without_nodes = is_without_nodes
            for waiting in list(self.scheduler.waiting):
                self._feed(waiting, NoNodeAvailable() if is_without_nodes else NodeAvailable())
        if isinstance(decision, Obstacle):
            self._note_decision(decision)
            return False
        if item.flow.prompt.num_choices > 1 and self.scheduler.waits_for_sibling(item, decision, now):
            return True
        self._note_decision(decision)
        # Sent before anything is booked for it: what cannot be sent takes no room.
        for action in item.flow.handle(Placed(decision.placement, decision.reason.value), now):
            self._perform(item, action)
        self.scheduler.assign(item, decision, item.flow.num_known_tokens, now)
        self._arm(item, now)
        return True
