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
from baton.node_messages import Cancel, NodeMessage, PrefillDone, Refused
from baton.observe import Relay
from baton.types import NO_SLO, Embedding, PromptLogprobs, SamplingParams, Slo, TokenChunk
from router.clients import client_of_key
from router.cluster.admission import Prediction
from router.cluster.policy import Decision, Demand, Obstacle
from router.cluster.scheduler import Scheduler
from router.config import RouterConfig
from router.dispatch.active import Active
from router.dispatch.key_limits import KeyLimits
from router.dispatch.records import Origin, Records
from router.dispatch.stream import Backlog, Pacer, TokenStream
from router.flow.flows import Flows
from router.flow.machine import Flow
from router.flow.messages import (
    Abandon,
    AttemptFailed,
    Begin,
    ClientCancelled,
    Event,
    MoveOver,
    NodeLost,
    Outcome,
    Prompt,
    StopText,
    Tick,
    ToNode,
)
from router.flow.move import MoveOutcome
from router.metrics import RouterMetrics
from router.nodes.nodes import Nodes
from router.nodes.sessions import LinkEvents, NodeLink
from router.turns import Stepwise, Turns

_log = logging.getLogger("baton.router")

_NO_ORIGIN = Origin()


class Dispatcher(Flows[Active]):
    """Call everything on one event loop. ``new_link`` makes the connection to an address (a fake one in tests)."""

    def __init__(
        self,
        config: RouterConfig,
        clock: Clock,
        new_link: Callable[[str, LinkEvents], NodeLink],
        metrics: RouterMetrics,
    ) -> None:
        limits = config.limits
        keys = {client_of_key(key.secret.encode()): key for key in config.client_keys}
        weights = {client: key.weight for client, key in keys.items()}
        self._key_limits = KeyLimits(keys, clock.now())
        super().__init__(Scheduler(limits, config.policy, clock.now(), weights), clock)
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
            self._feed(active, Abandon(errors.Draining("the router is shutting down")))
        await self.nodes.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests can be served."""
        return not self._is_closing and self.scheduler.is_available

    # ── Clients ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def take_request(self, client: str) -> None:
        """Of the client's rate, once for each request. Raises RateLimited."""
        self._key_limits.take(client, self.clock.now())

    def check_capacity(self, num_sequences: int, client: str = "") -> None:
        """Raises the error that so many sequences would be refused with; nothing happens between this and submit."""
        if self._is_closing:
            raise errors.Draining("the router is shutting down", retry_after_s=1.0)
        self._key_limits.check_running(client, self.scheduler.num_in_flight_of(client), num_sequences)
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
        tokens: Sequence[int] = (),
    ) -> Active:
        """Start one sequence; it waits until `place`. The caller has checked capacity and must end in `cancel` if it
        stops reading. ``tokens``: of its output, which are known."""
        flow = Flow(
            request_id, choice, prompt, sampling, arrived_s=arrived_s, deadline_s=deadline_s,
            config=self._flow_config, on_interval=self._metrics.tbt.observe, priority=priority, slo=slo, tokens=tokens,
        )  # fmt: skip
        active = Active(flow, TokenStream(self._pacer, self.backlog), origin, client, prediction)
        self._idle.clear()
        is_passing = not self.scheduler.was_here(client, self.clock.now())
        self._feed(active, Begin())
        self._make_room(client, is_passing=is_passing)
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
            match message:
                case PrefillDone():
                    self._observe_prediction(message.sequence_id)
                case Refused():
                    self.records.reservation_refused(node_id, message.sequence_id, message.failure)
            super().on_node_messages(node_id, (message,))

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
        self._losses += self._lose(node_id, reason)
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
        self._make_room_for_next()

    # ── Flows ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _feed(self, item: Active, event: Event) -> None:
        try:
            super()._feed(item, event)
        except Exception as error:
            self._fail(item, error)

    def _arm(self, item: Active, now: float) -> None:
        item.arm(now, self._on_timer)

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

    def _send(self, action: ToNode) -> None:
        self.nodes.send(action)

    def _deliver(self, item: Active, chunk: TokenChunk) -> None:
        item.stream.push(chunk.token_ids, chunk.logprobs)
        self._delivered(item)

    def _deliver_prompt(self, item: Active, found: PromptLogprobs | Embedding) -> None:
        if isinstance(found, Embedding):
            item.stream.embedding = found.values
        else:
            item.stream.push_scored(found.logprobs)
        self._delivered(item)

    def _delivered(self, item: Active) -> None:
        if not item.fingerprint and self.nodes.membership.reference is not None:
            item.fingerprint = self.nodes.membership.reference.model.fingerprint
        if item.stream.complaint is not None:
            asyncio.get_running_loop().call_soon(self._give_up_reader, item)

    def _note(self, item: Active, action: AttemptFailed | MoveOver) -> None:
        match action:
            case AttemptFailed(sequence_id, failure):
                self.records.attempt_failed(sequence_id, failure)
            case MoveOver(_, _, reason, outcome):
                self._metrics.migrations.add(reason.value, outcome.value)
                if outcome is not MoveOutcome.MOVED:
                    self.records.move_failed(item.flow.sequence_id, action)

    def _ended(self, item: Active, outcome: Outcome, relay: Relay) -> None:
        item.disarm()
        if not self.scheduler.num_in_flight:
            self._idle.set()
        item.stream.end(outcome, relay)
        self.records.ended(item.flow, outcome, relay, item.origin)

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

    def _place(self, item: Active, now: float) -> bool:
        reference = self.nodes.membership.reference
        if reference is not None and item.fingerprint not in ("", reference.model.fingerprint):
            changed = f"the model changed from {item.fingerprint} to {reference.model.fingerprint} in mid-request"
            self._feed(item, Abandon(errors.Unavailable(changed)))
            return True
        return super()._place(item, now)

    def _note_decision(self, decision: Decision | Obstacle) -> None:
        if isinstance(decision, Decision):
            self._metrics.placements.add(decision.reason.value)
        else:
            self._metrics.placement_waits.add(decision.name.lower())
