"""The router's one loop of events: sessions and clients in, messages to nodes and tokens to streams out.

It drives the pure machines (membership, policy, flow) and owns nothing of their decisions: it looks up, feeds, and
performs. Everything here runs on the event loop and never waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from baton import errors
from baton.clock import Clock, catch_up_s
from baton.defects import Defects, LogLimit
from baton.observe import FailedAttempt, Relay
from baton.registry import NodeRecord
from baton.types import Failure, NodeDescription, NodeStatus, Role, SamplingParams
from router import flow_messages as f
from router.cluster import membership as m
from router.cluster.load import Loads
from router.cluster.policy import Obstacle, PairBreakers, Placement, choose, reason_of
from router.cluster.waiting import Waiting
from router.config import RouterConfig
from router.flow import Flow
from router.metrics import RouterMetrics
from router.sessions import NodeLink
from router.stream import Backlog, Pacer, TokenStream
from router.turns import Stepwise, Turns

_log = logging.getLogger("baton.router")

# Refusals that are back-pressure.
_NO_ROOM = frozenset({"NoBlocks", "Overloaded", "Draining"})
# Membership looks at silences this often; nodes speak at least every 0.25 s.
_TICK_S = 0.1


class Active:
    """A sequence in flight and what belongs to it here."""

    __slots__ = (
        "attached",
        "client",
        "fingerprint",
        "flow",
        "is_queued",
        "origin",
        "patient_until_s",
        "stream",
        "timer",
        "timer_s",
    )

    def __init__(self, flow: Flow, stream: TokenStream, fingerprint: str, origin: Origin, client: str) -> None:
        self.flow = flow
        self.origin = origin
        # Who asked for it, as far as turns are concerned.
        self.client = client
        self.stream = stream
        # The model its tokens came from: no other model may continue it.
        self.fingerprint = fingerprint
        self.is_queued = False
        # The attempt that counts as load and that nodes may know of: sequence id and where it was placed.
        self.attached: tuple[str, Placement] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.timer_s = 0.0
        # Nothing is judged before: the timer was looked at too late.
        self.patient_until_s = 0.0


@dataclass(frozen=True, slots=True)
class Origin:
    """What is of no use but to those who keep record: whose request it is. Untrusted, as clients sent it."""

    model: str = ""
    is_chat: bool = False
    # W3C Trace Context.
    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that is over, for those who keep record. ``arrived_s`` is by the router's clock."""

    request_id: str
    choice: int
    arrived_s: float
    outcome: f.Outcome
    relay: Relay
    num_prompt_tokens: int
    sampling: SamplingParams
    origin: Origin


class _NodeFacts(NamedTuple):
    """What the nodes that are up say together."""

    reference: NodeDescription | None
    capacity_tokens: int | None


class Dispatcher:
    """Call everything on one event loop. ``link`` makes the connection to an address (a fake one in tests)."""

    def __init__(
        self, config: RouterConfig, clock: Clock, link: Callable[[str, Dispatcher], NodeLink], metrics: RouterMetrics
    ) -> None:
        self._config = config
        self.clock = clock
        self._metrics = metrics
        # When a node dies with hundreds of sequences, a few lines say why.
        self._failure_limit = LogLimit(clock)
        self._defects = Defects(_log, clock, metrics.defects.add)
        self.membership = m.Membership(config.nodes, config.membership)
        self._loads = Loads()
        self._breakers = PairBreakers(config.policy)
        self._new_link = link
        self.links: dict[str, NodeLink] = {}
        self._address_of: dict[str, str] = {}
        self._active: set[Active] = set()
        self._num_active_of: Counter[str] = Counter()
        self._by_sequence: dict[str, Active] = {}
        # Sequences that wait for a placement.
        self._queue: Waiting[Active] = Waiting(alone_s=config.limits.client_alone_s)
        # Asked for a dozen times by each request.
        self._facts = _NodeFacts(None, None)
        # What one of several clients may have on the nodes; None when it is to be counted again.
        self._max_running: int | None = None
        self._placing = Stepwise(self._place_next, config.limits.max_turn_s)
        # The attempts that every node has, and those whose node was lost and that have not been told.
        self._attached: dict[str, set[Active]] = {}
        self._losses: deque[tuple[Active, str, f.NodeLost]] = deque()
        self._telling = Stepwise(self._tell_loss, config.limits.max_turn_s)
        # Something happened since the last look that can make room for a waiting sequence.
        self._has_changed = False
        self.turns = Turns(config.limits.max_turn_s)
        self._pacer = Pacer(config.limits.max_hold_s, self.turns)
        self.backlog = Backlog(
            max_stream_bytes=config.limits.max_stream_bytes, max_answer_bytes=config.limits.max_answer_bytes,
            max_bytes=config.limits.max_unread_bytes,
        )  # fmt: skip
        self._ticker: asyncio.TimerHandle | None = None
        self._ticked_s = clock.now()
        # Those that wait were told that no node is available.
        self._is_without_nodes = False
        self._down_since_s: float | None = clock.now()
        self._finished_at_s: deque[float] = deque(maxlen=64)
        self._is_closing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._watchers: list[Callable[[], None]] = []
        self._end_watchers: list[Callable[[Ended], None]] = []

    # ── Life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        self._do_membership(self.membership.start())
        self._ticked_s = self.clock.now() - _TICK_S
        self._on_ticker()

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new sequences, give running ones ``drain_s`` to end, then fail the rest and hang up."""
        self._is_closing = True
        try:
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("%d sequences still ran at shutdown", len(self._active))
        for active in list(self._active):
            self._feed(active, f.Abandon(errors.Unavailable("the router is shutting down")))
        if self._ticker is not None:
            self._ticker.cancel()
        async with asyncio.TaskGroup() as tasks:
            for link in self.links.values():
                tasks.create_task(link.close())

    def watch(self, on_change: Callable[[], None]) -> None:
        """Be told when nodes come, go or change state."""
        self._watchers.append(on_change)

    def watch_ends(self, on_ended: Callable[[Ended], None]) -> None:
        """Be told of every sequence that ends. Returns at once."""
        self._end_watchers.append(on_ended)

    # ── Clients ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_capacity(self, num_sequences: int, client: str = "") -> None:
        """Raises what a request of so many sequences would be refused with; nothing happens between this and submit."""
        if self._is_closing:
            raise errors.Unavailable("the router is shutting down", retry_after_s=1.0)
        now = self.clock.now()
        if self._down_since_s is not None and now - self._down_since_s > self._config.limits.refuse_after_s:
            raise errors.Unavailable("no node is available; try again later", retry_after_s=2.0)
        limits = self._config.limits
        for total, own, limit, what in (
            (len(self._queue), self._queue.num_waiting_of(client), limits.max_queued, "waiting"),
            (len(self._active), self._num_active_of[client], limits.max_active, "in flight"),
        ):
            share = max(1, int(limit * limits.max_client_share))
            # Room that others left is anybody's; what is beyond the limit is for clients that have little here.
            is_little = own + num_sequences <= share
            has_room = total + num_sequences <= limit and (is_little or self._queue.is_alone(client, now))
            has_share = is_little and total + num_sequences <= limit + share
            if not has_room and not has_share and (own or what == "in flight"):
                raise errors.Overloaded(
                    f"{total} sequences are {what} (limit {limit}), {own} of them of this client (limit {share} beside "
                    "others); try again later",
                    retry_after_s=self._retry_after_s(),
                )

    def submit(
        self,
        request_id: str,
        choice: int,
        prompt: f.Prompt,
        sampling: SamplingParams,
        *,
        arrived_s: float,
        deadline_s: float,
        origin: Origin = Origin(),
        client: str = "",
    ) -> Active:
        """Start one sequence; it waits until `place`. The caller has checked capacity and must end in `cancel` if it
        stops reading."""
        flow = Flow(
            request_id,
            choice,
            prompt,
            sampling,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            config=self._config.flow,
            on_interval=self._metrics.tbt.observe,
        )
        reference = self._facts.reference
        active = Active(
            flow,
            TokenStream(self._pacer, self.backlog),
            "" if reference is None else reference.model.fingerprint,
            origin,
            client,
        )
        self._num_active_of[client] += 1
        self._active.add(active)
        self._idle.clear()
        was_here = self._queue.was_here(client, self.clock.now())
        self._feed(active, f.Begin())
        self._make_room(client, is_passing=not was_here)
        return active

    def place(self) -> None:
        """Look for nodes for what was submitted."""
        self._pump()

    def cancel(self, sequences: Iterable[Active], reason: str) -> None:
        """Harmless for those that are over."""
        for active in sequences:
            if not active.flow.has_ended:
                self._metrics.cancellations.add(active.flow.phase.value)
                self._feed(active, f.Cancel(reason))
            active.stream.drop()
        # When all are gone: else the first ones' room would be given to the last ones.
        self._pump()

    def _give_up_reader(self, active: Active) -> None:
        """Told later than the token that was one too many: a flow is in the middle of its actions."""
        complaint = active.stream.complaint
        if complaint is not None and not active.flow.has_ended:
            active.stream.drop()
            self._feed(active, f.Abandon(errors.ClientTooSlow(f"the client reads too slowly: {complaint}")))
            self._pump()

    def stop_text(self, active: Active) -> None:
        """A stop string ended the sequence."""
        if not active.flow.has_ended:
            self._feed(active, f.StopText())
            self._pump()

    def now(self) -> float:
        return self.clock.now()

    # ── What is known ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def members(self) -> Sequence[m.Member]:
        return list(self.membership.members.values())

    @property
    def reference(self) -> NodeDescription | None:
        return self._facts.reference

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def flows(self) -> list[Flow]:
        """Every sequence in flight, in no order; to look at."""
        return [x.flow for x in self._active]

    @property
    def num_active(self) -> int:
        return len(self._active)

    def phases(self) -> Mapping[f.Phase, int]:
        """Sequences in flight by where they are."""
        return Counter(active.flow.phase for active in self._active)

    def refused(self, error: errors.BatonError) -> None:
        """A request was turned away before it became a sequence."""
        self._metrics.refusals.add(error.code)

    @property
    def is_ready(self) -> bool:
        """Somebody can run prompts and somebody can decode; as roles are policy, one available node is both."""
        return not self._is_closing and any(self.membership.is_available(x) for x in self.members)

    @property
    def capacity_tokens(self) -> int | None:
        """The longest sequence, prompt and output, that fits into a node; None while no node is known."""
        return self._facts.capacity_tokens

    def check(self) -> None:
        """Our own books balance; called by tests."""
        self._loads.check()
        self._queue.check()
        if not self._active:
            assert self._loads.num_assigned == 0
            assert not self._by_sequence
            assert not self._attached
            assert not self._queue

    # ── Links ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_welcome(self, address: str, node: NodeDescription, status: NodeStatus) -> None:
        self._do_membership(self.membership.handle(m.Welcomed(address, node, status), self.clock.now()))

    def on_listing(self, records: Sequence[NodeRecord]) -> None:
        """Everybody whom the registry knows now."""
        listed = m.Listed({record.address: record.incarnation for record in records})
        self._do_membership(self.membership.handle(listed, self.clock.now()))

    def on_broken(self, address: str, reason: str, is_orderly: bool = False) -> None:
        self._do_membership(self.membership.handle(m.Broken(address, reason, is_orderly), self.clock.now()))

    def on_message(self, address: str, events: Sequence[f.NodeEvent], status: NodeStatus | None) -> None:
        member = self.membership.members.get(address)
        if member is None or not member.is_up or member.node is None:
            return
        node_id = member.node.node_id
        for event in events:
            match event:
                case f.PrefillDone():
                    self._has_changed = True
                    self._loads.prefilled(event.sequence_id)
                case f.Reserved():
                    self._loads.confirm(event.sequence_id)
                case f.Refused():
                    self._metrics.reservation_refusals.add(event.failure.code)
                    self._log_refusal(node_id, event.sequence_id, event.failure)
            active = self._by_sequence.get(event.sequence_id)
            if active is not None:  # else it is over
                self._feed(active, event)
        if status is not None:
            self._loads.status(node_id, status)
        self._do_membership(self.membership.handle(m.Heard(address, status), self.clock.now()))
        if self._has_changed:
            self._pump()

    def _log_refusal(self, node_id: str, sequence_id: str, failure: Failure) -> None:
        """A node without room is nothing to tell; one that refuses for another reason is."""
        code = failure.code
        if code in _NO_ROOM or (more := self._failure_limit.admits(f"{node_id}/refused/{code}")) is None:
            return
        about, message = errors.quoted(sequence_id), errors.quoted(failure.message)
        _log.warning("%s: %s refused a reservation: %s: %s%s", about, node_id, code, message, more)

    # ── Membership ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_ticker(self) -> None:
        # Armed first: whatever a look raises, the next one comes.
        self._ticker = asyncio.get_running_loop().call_later(_TICK_S, self._on_ticker)
        now = self.clock.now()
        late_s, self._ticked_s = max(0.0, now - self._ticked_s - _TICK_S), now
        with self._defects.contained("membership"):
            self._do_membership(self.membership.handle(m.Tick(late_s), now))
        if self._queue:
            # A client may be alone by now; and whose turn it is may still find no room.
            self._pump()
            if (waiting := self._next()) is not None:
                self._make_room(waiting.client, is_passing=True)

    def _do_membership(self, actions: Sequence[m.Action]) -> None:
        if actions and any(isinstance(action, m.NodeUp | m.NodeDown) for action in actions):
            nodes = [x.node for x in self.membership.members.values() if x.is_up and x.node is not None]
            capacities = (n.kv_layout.num_blocks * n.kv_layout.block_tokens for n in nodes)
            self._facts = _NodeFacts(self.membership.reference, max(capacities, default=None))
        for action in actions:
            with self._defects.contained("membership", type(action).__name__):
                self._do_one(action)
        if actions:
            self._max_running = None
            self._note_availability()
            self._pump()

    def _do_one(self, action: m.Action) -> None:
        match action:
            case m.Dial():
                self._dial(action.address)
            case m.HangUp():
                self.links[action.address].hang_up()
            case m.Forget():
                self.links.pop(action.address).hang_up()
            case m.NodeUp():
                self._on_node_up(action.node, action.status)
            case m.NodeDown():
                if action.has_left:
                    _log.info("node %s has left: %s", action.node_id, action.reason)
                else:
                    _log.warning("node %s is lost: %s", action.node_id, action.reason)
                self._on_node_down(action.node_id, action.reason)
            case m.NodeRefused():
                _log.error("node at %s is refused: %s", action.address, action.reason)
            case m.NodeUnreachable():
                _log.warning("no node answers at %s: %s; dialling on", action.address, action.reason)
            case m.NodeChanged():
                pass

    def _dial(self, address: str) -> None:
        try:
            if address not in self.links:
                self.links[address] = self._new_link(address, self)
            self.links[address].dial()
        except Exception as error:
            # As if nobody had answered: it is dialled again.
            defect = self._defects.caught("membership", error, f"dialling {address}")
            asyncio.get_running_loop().call_soon(self.on_broken, address, defect.message)

    def _on_node_up(self, node: NodeDescription, status: NodeStatus) -> None:
        _log.info("node %s (%s, %s) is up at %s", node.node_id, node.role.value, node.device, node.address)
        address = next(x.address for x in self.members if x.is_up and x.node is node)
        self._address_of[node.node_id] = address
        self._loads.add_node(node, status)
        for active in list(self._active):
            if not active.flow.tokens:
                active.fingerprint = node.model.fingerprint

    def _on_node_down(self, node_id: str, reason: str) -> None:
        ends = self._metrics.node_drains if self._loads.is_leaving(node_id) else self._metrics.node_losses
        ends.add(self._loads.pool(node_id))
        self._address_of.pop(node_id, None)
        lost = f.NodeLost(node_id, reason)
        self._losses += [(x, x.attached[0], lost) for x in self._attached.get(node_id, ()) if x.attached is not None]
        self._loads.remove_node(node_id)
        self._breakers.forget(node_id)
        self._telling.run()

    def _tell_loss(self) -> bool:
        """The next attempt that was on a lost node. By now it may be over, or its node be there again as another."""
        if not self._losses:
            return False
        active, sequence_id, lost = self._losses.popleft()
        if active.attached is not None and active.attached[0] == sequence_id:
            self._feed(active, lost)
        if not self._losses:
            self._pump()
        return True

    def _note_availability(self) -> None:
        if any(self.membership.is_available(x) for x in self.membership.members.values()):
            self._down_since_s = None
        elif self._down_since_s is None:
            self._down_since_s = self.clock.now()
        for watcher in self._watchers:
            with self._defects.contained("watcher"):
                watcher()

    # ── Flows ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _feed(self, active: Active, event: f.Event) -> None:
        now = self.clock.now()
        try:
            for action in active.flow.handle(event, now):
                self._perform(active, action)
            self._arm(active, now)
        except Exception as error:
            self._fail(active, error)

    def _fail(self, active: Active, error: Exception) -> None:
        """Handling this sequence raised: it ends, and what it holds here and at its nodes is given back.

        Nothing is asked of its flow, which may be in the middle of anything.
        """
        if not isinstance(error, errors.BatonError):
            error = self._defects.caught("sequence", error, active.flow.sequence_id)
        attached = active.attached
        if attached is not None:
            sequence_id, placement = attached
            self._has_changed = True
            self._left_nodes(active)
            with self._defects.contained("sequence", sequence_id):
                self._loads.release(sequence_id)
            for node_id, is_decode in ((placement.prefill_id, False), (placement.decode_id, True)):
                with self._defects.contained("sequence", sequence_id):
                    self._perform(active, f.SendCancel(node_id, sequence_id, is_decode, error.code))
        if active in self._active:
            self._end(active, active.flow.give_up(error, self.clock.now()))

    def _left_nodes(self, active: Active) -> None:
        if active.attached is None:
            return
        (sequence_id, placement), active.attached = active.attached, None
        del self._by_sequence[sequence_id]
        for node_id in {placement.prefill_id, placement.decode_id}:
            there = self._attached[node_id]
            there.remove(active)
            if not there:
                del self._attached[node_id]
        self._queue.ended(active.client, self.clock.now())

    def _deliver(self, active: Active, action: f.Deliver) -> None:
        active.stream.push(action.token_ids, action.logprobs)
        if active.stream.complaint is not None:
            asyncio.get_running_loop().call_soon(self._give_up_reader, active)

    def _perform(self, active: Active, action: f.Action) -> None:
        match action:
            case f.Deliver():
                self._deliver(active, action)
            case f.Enqueue():
                self._enqueue(active, action.is_rerun)
            case f.SendReserve() | f.SendRun() | f.SendCancel():
                self._send(action)
            case f.Detach():
                self._has_changed = True
                self._left_nodes(active)
                self._loads.release(action.sequence_id)
            case f.AttemptFailed():
                self._log_failure(action.sequence_id, action.failure)
            case f.NodeFull():
                self._loads.full(action.node_id)
            case f.PairFailed():
                self._breakers.failed(action.placement.prefill_id, action.placement.decode_id, self.clock.now())
            case f.PairWorked():
                self._breakers.worked(action.placement.prefill_id, action.placement.decode_id)
            case f.End():
                self._end(active, action.outcome)

    def _log_failure(self, sequence_id: str, failure: FailedAttempt) -> None:
        more = self._failure_limit.admits(f"{failure.blamed_node_id}/{failure.code}")
        if more is not None:
            _log.warning("%s: %s%s", sequence_id, failure.line(), more)

    def _send(self, command: f.Command) -> None:
        """Raises if the command cannot be encoded, or is too long for a node."""
        address = self._address_of.get(command.node_id)
        if address is None:
            return
        link = self.links[address]
        try:
            link.send(command)
        except errors.NodeLost as error:
            # A node that takes no messages is lost. Told later: a flow is in the middle of its actions.
            link.hang_up()
            asyncio.get_running_loop().call_soon(self.on_broken, address, error.message)

    def _end(self, active: Active, outcome: f.Outcome) -> None:
        if active.timer is not None:
            active.timer.cancel()
        self._active.discard(active)
        self._num_active_of[active.client] -= 1
        if not self._num_active_of[active.client]:
            del self._num_active_of[active.client]
        if active.is_queued:
            active.is_queued = False
            self._queue.remove(active)
        if not self._active:
            self._idle.set()
        relay = active.flow.lifeline.relay()
        self._finished_at_s.append(self.clock.now())
        active.stream.end(outcome, relay)
        # The client has its answer; whoever keeps record of it takes nothing away any more.
        with self._defects.contained("record", active.flow.request_id):
            self._metrics.observe(outcome, relay, len(active.flow.prompt.token_ids))
        self._tell_end(active, outcome, relay)

    def _tell_end(self, active: Active, outcome: f.Outcome, relay: Relay) -> None:
        ended = Ended(
            active.flow.request_id, active.flow.choice, active.flow.lifeline.arrived_s, outcome, relay,
            len(active.flow.prompt.token_ids), active.flow.sampling, active.origin,
        )  # fmt: skip
        for watcher in self._end_watchers:
            with self._defects.contained("record", active.flow.request_id):
                watcher(ended)
        if not _log.isEnabledFor(logging.INFO):
            return
        code = "" if outcome.error is None else outcome.error.code
        if outcome.kind is f.OutcomeKind.FAILED and outcome.error is not None:
            code += f": {errors.shortened(outcome.error.message, 300)}"
        detail = code or (outcome.finish_reason.value if outcome.finish_reason else "")
        _log.info("%s/%d %s (%s) %s", active.flow.request_id, active.flow.choice, outcome.kind.value, detail,
                  relay.line())  # fmt: skip

    def _arm(self, active: Active, now: float) -> None:
        """One timer per sequence; pushed-back deadlines cost nothing, the timer looks again when it fires."""
        if active.flow.has_ended:
            return
        wake_s = max(active.flow.wake_at_s, active.patient_until_s)
        if active.timer is not None:
            if active.timer_s <= wake_s:
                return
            active.timer.cancel()
        active.timer_s = wake_s
        wait_s = max(0.0, wake_s - now)
        active.timer = asyncio.get_running_loop().call_later(wait_s, self._on_timer, active)

    def _on_timer(self, active: Active) -> None:
        active.timer = None
        if active.flow.has_ended:
            return
        now = self.clock.now()
        if more_s := catch_up_s(now - active.timer_s):
            # We are late ourselves: what nodes said meanwhile waits in the sockets, and is read first.
            active.patient_until_s = now + more_s
        if now >= max(active.flow.wake_at_s, active.patient_until_s):
            self._feed(active, f.Tick())
            self._pump()
        else:
            self._arm(active, now)

    # ── Placement ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _enqueue(self, active: Active, is_rerun: bool) -> None:
        active.is_queued = True
        self._queue.put(active, self.clock.now(), is_first=is_rerun)
        if self._is_without_nodes:
            self._feed(active, f.NoNodeAvailable())

    def _pump(self) -> None:
        """Place waiting sequences, the clients by turns, until one has to wait. A thousand take a hundred milliseconds:
        several turns of the loop."""
        self._has_changed = False
        if self._queue:
            self._placing.run()

    def _place_next(self) -> bool:
        active = self._next()
        return active is not None and self._place_or_fail(active)

    def _next(self) -> Active | None:
        """Whose turn it is. Prompts pass; what is bounded is what the nodes that generate have of one client."""
        return self._queue.next(self._max_client_running, self.clock.now())

    @property
    def _max_client_running(self) -> int:
        if self._max_running is None:
            available = [x for x in self.membership.members.values() if self.membership.is_available(x)]
            generating = [x for x in available if x.status is not None and x.status.role is not Role.PREFILL]
            num_generating = len(generating) or len(available) or 1
            self._max_running = self._config.limits.max_client_running * num_generating
        return self._max_running

    def _make_room(self, newcomer: str, *, is_passing: bool) -> None:
        """A client that was alone has all nodes. When another comes, what it may not have beside others goes back to
        the queue, the youngest first: to wait for their ends could take minutes. Sequences without a token lose
        nothing; the others are computed again, so that a single request in passing sets but a few of them aside."""
        client, num = self._queue.crowding(newcomer, self._max_client_running)
        if not num:
            return
        running = [x for x in reversed(self._by_sequence.values()) if x.client == client]
        fresh = [x for x in running if not x.flow.tokens][:num]
        begun = [x for x in running if x.flow.tokens][: num - len(fresh)]
        if is_passing:
            begun = begun[: self._config.limits.max_client_running]
        for active in (*fresh, *begun):
            self._feed(active, f.MakeRoom())

    def _place_or_fail(self, active: Active) -> bool:
        try:
            return self._place(active)
        except Exception as error:
            # It leaves the queue, whoever's defect this is: nobody behind it may wait for ever.
            self._fail(active, error)
            return True

    def _place(self, active: Active) -> bool:
        """Place the head of the queue; False if it must wait."""
        now = self.clock.now()
        flow = active.flow
        reference = self._facts.reference
        if reference is not None and flow.tokens and reference.model.fingerprint != active.fingerprint:
            changed = f"the model changed from {active.fingerprint} to {reference.model.fingerprint} in mid-request"
            self._feed(active, f.Abandon(errors.Unavailable(changed)))
            return True
        views = [
            self._loads.view(x.node.node_id, self.membership.is_available(x))
            for x in self.membership.members.values()
            if x.is_up and x.node is not None
        ]
        demand = flow.demand(now)
        placement = choose(views, demand, self._breakers, now, self._config.policy)
        if isinstance(placement, Obstacle):
            self._metrics.placement_waits.add(placement.name.lower())
            self._tell_waiting(is_without_nodes=placement is Obstacle.NO_NODE)
            return False
        self._tell_waiting(is_without_nodes=False)
        self._metrics.placements.add(reason_of(placement, views, demand).value)
        self._assign(active, placement, now)
        return True

    def _tell_waiting(self, *, is_without_nodes: bool) -> None:
        """When a look finds it changed, not when a node comes up: one that was only suspect does not come up."""
        if is_without_nodes is self._is_without_nodes:
            return
        self._is_without_nodes = is_without_nodes
        for waiting in list(self._queue):
            self._feed(waiting, f.NoNodeAvailable() if is_without_nodes else f.NodeAvailable())

    def _assign(self, active: Active, placement: Placement, now: float) -> None:
        flow = active.flow
        # Sent before anything is booked for it: what cannot be sent takes no room.
        for action in flow.handle(f.Placed(placement), now):
            self._perform(active, action)
        self._queue.started(active)
        active.is_queued = False
        active.attached = flow.sequence_id, placement
        self._by_sequence[flow.sequence_id] = active
        for node_id in {placement.prefill_id, placement.decode_id}:
            self._attached.setdefault(node_id, set()).add(active)
        self._loads.assign(flow.sequence_id, placement, len(flow.prompt.token_ids) + len(flow.tokens))
        self._breakers.used(placement.prefill_id, placement.decode_id, now)
        self._arm(active, now)

    def _retry_after_s(self) -> float:
        """How long the present queue takes at the present pace, between 1 and 30 s."""
        if len(self._finished_at_s) < 2:
            return 1.0
        span_s = self.clock.now() - self._finished_at_s[0]
        pace = len(self._finished_at_s) / max(span_s, 1e-3)
        return min(max(1.0, len(self._queue) / pace), 30.0)
