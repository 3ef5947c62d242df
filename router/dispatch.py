"""Drives the flows of all sequences: takes events of nodes, clients and timers, sends commands to nodes and tokens to
clients.

`flow` decides what becomes of a sequence, `cluster.scheduler` where it runs. Everything here but `close` runs on the
event loop and never waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from baton import errors
from baton.clock import Clock
from baton.defects import Defects
from baton.node_messages import CacheChanged, Cancel, HandedOff, NodeMessage, PrefillDone, Refused
from baton.types import NO_SLO, Lease, SamplingParams, Slo, TokenChunk
from router.active import Active
from router.clients import client_of_key
from router.cluster.admission import Prediction
from router.cluster.policy import Demand, Obstacle
from router.cluster.rebalance import Planned
from router.cluster.scheduler import Scheduler
from router.config import RouterConfig
from router.flow import Flow
from router.flow_messages import (
    Abandon,
    Action,
    AttemptFailed,
    Begin,
    ClientCancelled,
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
    Prompt,
    StopText,
    Tick,
    ToNode,
)
from router.flow_move import MoveOutcome
from router.metrics import RouterMetrics
from router.nodes import Nodes
from router.records import Origin, Records
from router.sessions import LinkEvents, NodeLink
from router.stream import Backlog, Pacer, TokenStream
from router.turns import Stepwise, Turns

_log = logging.getLogger("baton.router")

_NO_ORIGIN = Origin()


class Dispatcher:
    """Call everything on one event loop. ``new_link`` makes the connection to an address (a fake one in tests)."""

    def __init__(
        self,
        config: RouterConfig,
        clock: Clock,
        new_link: Callable[[str, LinkEvents], NodeLink],
        metrics: RouterMetrics,
    ) -> None:
        limits = config.limits
        self.clock = clock
        self.scheduler: Scheduler[Active] = Scheduler(
            limits,
            config.policy,
            clock.now(),
            {client_of_key(key.secret.encode()): key.weight for key in config.client_keys},
        )
        self._flow_config = config.flow
        self._metrics = metrics
        self._defects = Defects(_log, clock, metrics.defects.add)
        self.records = Records(metrics, clock, self._defects)
        self.nodes = Nodes(config, clock, new_link, self.scheduler, self, metrics, self._defects)
        self.turns = Turns(limits.max_turn_s)
        self._pacer = Pacer(limits.max_hold_s, self.turns)
        self.backlog = Backlog(
            max_stream_bytes=limits.max_stream_bytes, max_answer_bytes=limits.max_answer_bytes,
            max_bytes=limits.max_unread_bytes,
        )  # fmt: skip
        # A thousand placements take a hundred milliseconds: they are spread over turns of the loop, as are the flows
        # that are told of a lost node.
        self._placing = Stepwise(self._place_next, limits.max_turn_s)
        # A look for a move takes a millisecond or two with a thousand nodes.
        self._moving = Stepwise(self._move_next, limits.max_turn_s)
        self._losses: deque[tuple[str, NodeLost]] = deque()
        self._telling = Stepwise(self._tell_loss, limits.max_turn_s)
        # The flows that wait have been told that no node is available.
        self._is_without_nodes = False
        self._is_closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new sequences, give running ones ``drain_s`` to end, then fail the rest and hang up."""
        self._is_closing = True
        try:
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("%d sequences still ran at shutdown", self.scheduler.num_in_flight)
        for active in list(self.scheduler.in_flight):
            self._feed(active, Abandon(errors.Unavailable("the router is shutting down")))
        await self.nodes.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests can be served."""
        return not self._is_closing and self.scheduler.is_available

    # ── Clients ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_capacity(self, num_sequences: int, client: str = "") -> None:
        """Raises the error that so many sequences would be refused with; nothing happens between this and submit."""
        if self._is_closing:
            raise errors.Unavailable("the router is shutting down", retry_after_s=1.0)
        self.scheduler.check_capacity(num_sequences, client, self.clock.now())

    def predict(self, prompts: Sequence[Demand], slo: Slo, client: str, arrived_s: float) -> Prediction | None:
        """When the first token of a request will come; None if it has no objective for that. Raises TooLate if it would
        miss an objective."""
        if not slo.names or not self.scheduler.is_available:
            return None
        return self.scheduler.predict(prompts, slo, client, arrived_s, self.clock.now())

    def submit(
        self,
        request_id: str,
        choice: int,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        arrived_s: float,
        deadline_s: float,
        origin: Origin = _NO_ORIGIN,
        client: str = "",
        priority: int = 0,
        slo: Slo = NO_SLO,
        prediction: Prediction | None = None,
    ) -> Active:
        """Start one sequence; it waits until `place`. The caller has checked capacity and must end in `cancel` if it
        stops reading."""
        flow = Flow(
            request_id, choice, prompt, sampling, arrived_s=arrived_s, deadline_s=deadline_s,
            config=self._flow_config, on_interval=self._metrics.tbt.observe, priority=priority, slo=slo,
        )  # fmt: skip
        active = Active(flow, TokenStream(self._pacer, self.backlog), origin, client, prediction)
        self._idle.clear()
        is_passing = not self.scheduler.was_here(client, self.clock.now())
        self._feed(active, Begin())
        for crowding in self.scheduler.crowding(client, is_passing=is_passing):
            self._feed(crowding, MakeRoom())
        return active

    def place(self) -> None:
        """Place waiting sequences until one has to wait, if anything has changed that could make room."""
        if self.scheduler.has_news:
            self.scheduler.has_news = False
            if self.scheduler.num_waiting:
                self._placing.run()

    def cancel(self, sequences: Iterable[Active], reason: str) -> None:
        """Harmless for those that are over."""
        for active in sequences:
            if not active.flow.has_ended:
                self._metrics.cancellations.add(active.flow.phase.value)
                self._feed(active, ClientCancelled(reason))
            active.stream.drop()
        # When all are gone: else the first ones' room would be given to the last ones.
        self.place()

    def stop_text(self, active: Active) -> None:
        """A stop string ended the sequence."""
        if not active.flow.has_ended:
            self._feed(active, StopText())
            self.place()

    def _give_up_reader(self, active: Active) -> None:
        """Called later than the token that was one too many: a flow is in the middle of its actions."""
        complaint = active.stream.complaint
        if complaint is not None and not active.flow.has_ended:
            active.stream.drop()
            self._feed(active, Abandon(errors.ClientTooSlow(f"the client reads too slowly: {complaint}")))
            self.place()

    # ── Nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_node_messages(self, node_id: str, messages: Sequence[NodeMessage]) -> None:
        for message in messages:
            active = self.scheduler.item(message.sequence_id)
            match message:
                case CacheChanged():
                    self.scheduler.cache_changed(node_id, message)
                case PrefillDone():
                    self._observe_prediction(message.sequence_id)
                    self.scheduler.prefilled(message.sequence_id)
                    self.scheduler.rates.computed(node_id, message.num_computed_tokens, message.compute_s)
                case HandedOff(_, report) if active is None or not active.flow.moves_from(node_id):
                    # Of a prompt: what hides behind one is not what hides behind a sequence that goes on.
                    self.scheduler.rates.moved(report.num_bytes, report.exposed_s)
                case Lease():
                    self.scheduler.confirmed(message.sequence_id)
                case Refused():
                    self.records.reservation_refused(node_id, message.sequence_id, message.failure)
            if active is not None:  # else it is over
                self._feed(active, FromNode(node_id, message))

    def _observe_prediction(self, sequence_id: str) -> None:
        """Its prompt is computed, and its first token is here as well."""
        active = self.scheduler.item(sequence_id)
        if active is None or active.prediction is None:
            return
        prediction, active.prediction = active.prediction, None
        if active.flow.lifeline.attempts == 1:
            ttft_s = self.clock.now() - active.flow.lifeline.arrived_s
            self.scheduler.turned_out(prediction, ttft_s)
            self._metrics.observe_prediction(prediction.ttft_s, ttft_s)

    def on_node_down(self, node_id: str, reason: str) -> None:
        lost = NodeLost(node_id, reason)
        # One that has just moved off it counts for it no longer, and waits for its word all the same.
        left = [x.sequence_id for x in self.scheduler.in_flight if x.flow.moves_from(node_id)]
        there = self.scheduler.node_down(node_id, self.clock.now())
        self._losses += [(sequence_id, lost) for sequence_id in dict.fromkeys((*there, *left))]
        self._telling.run()

    def _tell_loss(self) -> bool:
        """The next attempt that was on a lost node. By now it may be over, or its node be up again as another."""
        if not self._losses:
            return False
        sequence_id, lost = self._losses.popleft()
        active = self.scheduler.item(sequence_id)
        if active is not None:
            self._feed(active, lost)
        if not self._losses:
            self.place()
        return True

    def on_tick(self) -> None:
        """Time alone can make room: a client is alone by now, a breaker half open, a node no longer avoided."""
        self.scheduler.has_news = True
        self.scheduler.prefix_index.sweep()
        if (change := self.scheduler.role_change(self.clock.now())) is not None:
            self.nodes.set_role(change)
        self.place()
        self._moving.run()
        waiting = self.scheduler.next(self.clock.now())
        if waiting is not None:
            for crowding in self.scheduler.crowding(waiting.client, is_passing=True):
                self._feed(crowding, MakeRoom())

    def _move_next(self) -> bool:
        """Begin the next move of a running sequence; False if none is to move."""
        move = self.scheduler.next_move(self.clock.now())
        if move is None:
            return False
        self._begin_move(move)
        return True

    def _begin_move(self, move: Planned[Active]) -> None:
        self.scheduler.begin_move(move, self.clock.now())
        self._feed(move.item, MoveTo(move.target_id, move.reason, move.num_headroom_tokens))

    # ── Flows ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _feed(self, active: Active, event: Event) -> None:
        now = self.clock.now()
        try:
            for action in active.flow.handle(event, now):
                self._perform(active, action)
            active.arm(now, self._on_timer)
            if active.is_leading and active.flow.has_shared:
                active.is_leading = False
                self.scheduler.has_shared(active, now)
        except Exception as error:
            self._fail(active, error)

    def _on_timer(self, active: Active) -> None:
        now = self.clock.now()
        if active.is_due(now):
            self._feed(active, Tick())
            self.place()
        else:
            active.arm(now, self._on_timer)

    def _fail(self, active: Active, error: Exception) -> None:
        """Handling this sequence raised: it ends, and what it holds here and at its nodes is given back.

        Nothing is asked of its flow, which may be in the middle of anything.
        """
        if not isinstance(error, errors.BatonError):
            error = self._defects.caught("sequence", error, active.flow.sequence_id)
        attempt = self.scheduler.attempt(active)
        if attempt is not None:
            with self._defects.contained("sequence", attempt.sequence_id):
                self.scheduler.release(active, self.clock.now())
            for node_id in dict.fromkeys((*attempt.placement.node_ids, *active.flow.holders)):
                with self._defects.contained("sequence", attempt.sequence_id):
                    cancel = Cancel(attempt.sequence_id, error.code)
                    self.nodes.send(ToNode(node_id, cancel, active.flow.prompt))
        if active in self.scheduler.in_flight:
            self._end(active, active.flow.give_up(error, self.clock.now()))

    def _perform(self, active: Active, action: Action) -> None:  # noqa: C901 (a flat table)
        scheduler = self.scheduler
        match action:
            case TokenChunk():
                if not active.fingerprint and self.nodes.membership.reference is not None:
                    active.fingerprint = self.nodes.membership.reference.model.fingerprint
                active.stream.push(action.token_ids, action.logprobs)
                if active.stream.complaint is not None:
                    asyncio.get_running_loop().call_soon(self._give_up_reader, active)
            case ToNode():
                self.nodes.send(action)
            case Enqueue():
                if action.is_rerun:
                    scheduler.rerun(active, self.clock.now())
                else:
                    prompt = active.flow.prompt
                    scheduler.arrive(active, self.clock.now(), prompt if prompt.num_choices > 1 else None)
                if self._is_without_nodes:
                    self._feed(active, NoNodeAvailable())
            case Detach():
                scheduler.release(active, self.clock.now())
            case AttemptFailed():
                self.records.attempt_failed(action.sequence_id, action.failure)
            case MoveOver():
                self._metrics.migrations.add(action.reason.value, action.outcome.value)
                if action.outcome is MoveOutcome.MOVED:
                    scheduler.moved(active)
                else:
                    scheduler.move_ended(active)
                    self.records.move_failed(active.flow.sequence_id, action)
            case NodeFull():
                scheduler.node_full(action.node_id)
            case PairFailed():
                scheduler.pair_failed(action.placement, self.clock.now())
            case PairWorked():
                scheduler.pair_worked(action.placement)
            case End():
                self._end(active, action.outcome)

    def _end(self, active: Active, outcome: Outcome) -> None:
        active.disarm()
        self.scheduler.depart(active, self.clock.now())
        if not self.scheduler.num_in_flight:
            self._idle.set()
        relay = active.flow.lifeline.relay()
        if outcome.kind is OutcomeKind.FINISHED and not relay.moves:
            # One that moved says nothing of one node's speed.
            self.scheduler.generated(relay.decode_node_id, relay.num_tokens, relay.tbt_mean_s)
        active.stream.end(outcome, relay)
        self.records.ended(active.flow, outcome, relay, active.origin)

    # ── Placement ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _place_next(self) -> bool:
        """Place the sequence whose turn it is; False if there is none, or if it must wait."""
        active = self.scheduler.next(self.clock.now())
        if active is None:
            return False
        try:
            return self._place(active, self.clock.now())
        except Exception as error:
            # It leaves the line, whatever the defect is: those behind it must not wait for ever.
            self._fail(active, error)
            return True

    def _place(self, active: Active, now: float) -> bool:
        reference = self.nodes.membership.reference
        if reference is not None and active.fingerprint not in ("", reference.model.fingerprint):
            changed = f"the model changed from {active.fingerprint} to {reference.model.fingerprint} in mid-request"
            self._feed(active, Abandon(errors.Unavailable(changed)))
            return True
        decision = self.scheduler.decide(active, now)
        is_without_nodes = decision is Obstacle.NO_NODE
        if is_without_nodes is not self._is_without_nodes:
            # Told when a look finds a change, not when a node comes up: one that was only suspect does not come up.
            self._is_without_nodes = is_without_nodes
            for waiting in list(self.scheduler.waiting):
                self._feed(waiting, NoNodeAvailable() if is_without_nodes else NodeAvailable())
        if isinstance(decision, Obstacle):
            self._metrics.placement_waits.add(decision.name.lower())
            return False
        if active.flow.prompt.num_choices > 1 and self.scheduler.waits_for_sibling(active, decision, now):
            return True
        self._metrics.placements.add(decision.reason.value)
        # Sent before anything is booked for it: what cannot be sent takes no room.
        for action in active.flow.handle(Placed(decision.placement, decision.reason.value), now):
            self._perform(active, action)
        self.scheduler.assign(active, decision, active.flow.num_known_tokens, now)
        active.arm(now, self._on_timer)
        return True
