"""A simulated node: the machines of both its phases and its roles, as in a worker, over a simulated engine and link."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from baton.errors import BatonError
from baton.machine import Tick
from baton.node_messages import CacheChanged, FromRouter, LetGo, NodeMessage, Reserve, RouterMessage, Run, Send
from baton.prefix import PrefixScheme
from baton.types import Failure, Lease, NodeDescription, NodeStatus, Role, TransferReport, blocks_for
from decode_node import machine as decode
from engine.blocks import BlockPool
from engine.events import EngineEvent
from engine.known import CacheFeed
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan
from kvtransfer.protocol.receiver_events import Arrived, Released, WriterBegan
from planner.machines import Machine
from planner.results import MachineUse, RoleChange
from planner.sim.config import SimulationConfig
from planner.sim.engine import Engine, Power
from planner.sim.events import Events
from planner.sim.gaps import Gaps
from planner.sim.host import Host, Loop
from planner.sim.links import Link
from planner.sim.pushes import Push
from planner.sim.requests import SimulatedRequest
from planner.times import Times
from prefill_node import machine as prefill
from worker.roles import RoleChanged, Roles, SetRole, Work

# There is one router.
_SESSION = 1
_MOST_CACHE_CHANGES = 4096


class Network:
    """What nodes need of what is around them."""

    def __init__(
        self,
        heard: Callable[[str, list[NodeMessage]], None],
        request_of: Callable[[str], SimulatedRequest],
        node: Callable[[str], Node],
        host: Host | None,
        loop: Loop | None,
    ) -> None:
        self.heard = heard
        self.request_of = request_of
        self.node = node
        # That all of them share, if they do.
        self.host = host
        # That all tokens pass, if that takes time.
        self.loop = loop


class Node:
    def __init__(
        self,
        description: NodeDescription,
        machine: Machine,
        times: Times,
        power: Power,
        config: SimulationConfig,
        scheduler_config: SchedulerConfig,
        events: Events,
        network: Network,
        counters: defaultdict[str, float],
    ) -> None:
        self.node_id = description.node_id
        self.description = description
        self.machine = machine
        self.config = config
        self.events = events
        self.counters = counters
        self.use = MachineUse(self.node_id, description.home_role, machine.name)
        self.role_changes: list[RoleChange] = []
        self.transfers: list[TransferReport] = []
        self.gaps = Gaps()
        layout = description.kv_layout
        self.token_bytes = layout.num_layers * layout.block_bytes / layout.block_tokens
        self.link_out, self.link_in = Link(machine.link_bytes_s), Link(machine.link_bytes_s)
        self._times = times
        self._power = power
        self._scheduler_config = scheduler_config
        self._network = network
        self.incarnation = 0
        self.is_up = False
        # How long it was up.
        self.up_s = 0.0
        self._began_s = 0.0
        self.start()

    def start(self) -> None:
        """As a new process: nothing is here."""
        self.incarnation += 1
        self.is_up, self._began_s = True, self.events.now_s
        pool = BlockPool(self.description.kv_layout.num_blocks)
        self.scheduler = Scheduler(self._scheduler_config, pool, PrefixScheme.of(self.description))
        for shape, seconds in self.config.seen_steps:
            self.scheduler.measured.add(shape, seconds)
        self.engine = Engine(
            self.events, self.scheduler, self._times, self._power, self.use, self._heard, self._on_plan,
            self.config.steps_at_once, self.gaps, self._network.host, self.config.wake, self._network.loop,
        )  # fmt: skip
        self.roles = Roles(self.description.home_role, self.config.roles)
        # What they were told last.
        self._work = Work(has_prompts=False, has_decodes=False)
        self._prefill = prefill.PrefillMachine(self.node_id)
        self._decode = decode.DecodeMachine(self.node_id)
        self._pushes: dict[str, Push] = {}
        # Pushes into leases here.
        self.arriving: dict[str, Push] = {}
        self._leases: dict[str, Lease] = {}
        self._num_leases = 0
        self._outbox: list[NodeMessage] = []
        self._inbox: deque[tuple[bool, prefill.Event | decode.Event]] = deque()
        # When what was sent last arrives, here and there: messages of a session do not overtake each other.
        self._inbound_s = self._outbound_s = 0.0
        self._is_handling = False
        self._is_rejected = False
        self._cache_feed: CacheFeed | None = None if self.description.prefix_cache is None else pool.known.follow()

    def die(self) -> None:
        """With all that is here. What it has said by now still arrives."""
        self.is_up = False
        self.up_s += self.events.now_s - self._began_s
        self.counters["preemptions"] += self.scheduler.num_preempted
        chunks = self.engine.leave_all()
        self._outbox += chunks
        self._post()
        for push in list(self._pushes.values()):
            push.lose_source()
        for push in list(self.arriving.values()):
            push.fail(f"{self.node_id} is gone")

    def finish(self, now: float) -> None:
        """The run is over."""
        if self.is_up:
            self.up_s += now - self._began_s
            self.counters["preemptions"] += self.scheduler.num_preempted
        use = self.use
        busy_s = use.prompt_s + use.decode_s + use.mixed_s
        use.idle_energy_j = max(0.0, self.up_s - busy_s) * self._power.idle_w

    # ── From the router ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def wait_s(self) -> float:
        """Of what comes, for an event loop that shares its interpreter with an engine that computes."""
        return 0.0 if self.scheduler.is_idle else self.config.overhead.busy_message_s

    def _message_s(self) -> float:
        host = self._network.host
        return self.config.message_s * (1.0 if host is None else host.crowding) + self.wait_s

    def send(self, message: RouterMessage) -> None:
        """By the router: it arrives later."""
        self._inbound_s = max(self._inbound_s, self.events.now_s + self._message_s())
        self.events.at(self._inbound_s, self.received, self.incarnation, message)

    def received(self, incarnation: int, message: RouterMessage) -> None:
        if not self.is_up or incarnation != self.incarnation:
            return
        event = FromRouter(_SESSION, message)
        if not isinstance(message, Reserve):
            self._inbox.append((True, event))
        if not isinstance(message, Run):
            self._inbox.append((False, event))
        self._handle()

    def set_role(self, change: SetRole) -> None:
        if self.is_up:
            try:
                self._note_roles(self.roles.handle(change, self.events.now_s))
            except BatonError:
                self.counters["role_changes_refused"] += 1

    def status(self) -> NodeStatus:
        now = self.events.now_s
        if self.roles.wake_at_s is not None and now >= self.roles.wake_at_s:
            self._note_roles(self.roles.handle(Tick(), now))
        load, pool, roles = self.scheduler.load(), self.scheduler.pool, self.roles
        return NodeStatus(
            roles.acting, home=roles.home, is_pinned=roles.is_pinned, total_blocks=pool.num_blocks,
            free_blocks=pool.num_available, queued_prompt_tokens=load.queued_prompt_tokens,
            num_waiting=load.num_waiting, num_running=load.num_running,
            running_tokens=load.running_tokens + self.engine.num_pending_tokens, cached_blocks=pool.num_cached,
            step_times=self.config.told_times or self.scheduler.measured.told,
        )  # fmt: skip

    def cache_change(self) -> CacheChanged | None:
        """What the router was not told of its prefix cache."""
        feed = self._cache_feed
        untold = None if feed is None else feed.take(self.scheduler.pool.known.number, _MOST_CACHE_CHANGES)
        return None if untold is None else untold.message()

    # ── Events of the machines ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def join_s(self) -> float:
        """Of a hand-over to it, when its bytes are there."""
        return self.config.commit_s + (0.0 if self.scheduler.is_idle else self.config.overhead.busy_join_s)

    def tell_push(self, push: Push, event: prefill.Event) -> None:
        """What became of a push of this node."""
        if self.is_up and self._pushes.get(push.sequence_id) is push:
            self._inbox.append((True, event))
            self._handle()

    def arrived(self, event: Arrived) -> bool:
        """Whether the sequence was taken over."""
        self._is_rejected = False
        self._inbox.append((False, event))
        self._handle()
        return not self._is_rejected

    def lease_told(self, incarnation: int, event: WriterBegan | Released) -> None:
        """Of its writer."""
        if self.is_up and incarnation == self.incarnation and event.sequence_id in self._leases:
            self._inbox.append((False, event))
            self._handle()

    def _heard(self, events: list[EngineEvent]) -> None:
        has = self._prefill.has
        self._inbox += [(has(event.sequence_id), event) for event in events]
        self._handle()

    def _handle(self) -> None:
        """Events that actions lead to come after those actions."""
        if self._is_handling:
            return
        self._is_handling = True
        now, inbox = self.events.now_s, self._inbox
        while inbox:
            is_prompt, event = inbox.popleft()
            if is_prompt:
                for action in self._prefill.handle(event, now):  # type: ignore[arg-type]
                    self._perform_prompt(action, now)
            else:
                for answer in self._decode.handle(event, now):  # type: ignore[arg-type]
                    self._perform_decode(answer, now)
        self._is_handling = False
        if self.roles.home is not Role.MIXED:
            prompts, told = self._prefill, self._work
            has_prompts, has_decodes = prompts.has_prompts, self._decode.num_sequences > 0 or prompts.has_decodes
            if told.has_prompts is not has_prompts or told.has_decodes is not has_decodes:
                self._work = Work(has_prompts, has_decodes)
                self._note_roles(self.roles.handle(self._work, now))
        self.engine.settle()
        self._post()
        self.engine.wake()

    def _post(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._outbound_s = max(self._outbound_s, self.events.now_s + self._message_s())
            self.events.at(self._outbound_s, self._network.heard, self.node_id, outbox)

    def _note_roles(self, changes: list[RoleChanged]) -> None:
        for change in changes:
            self.counters[f"role_changes_{change.reason.value}"] += 1
            self.role_changes.append(
                RoleChange(self.events.now_s, self.node_id, change.after, change.reason.value)
            )  # fmt: skip

    # ── Prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _perform_prompt(self, action: prefill.Action, now: float) -> None:  # noqa: C901 (a flat table)
        engine = self.engine
        match action:
            case Send(_, message):
                self._outbox.append(message)
            case Run():
                self._run(action, now)
            case prefill.BeginPush(sequence_id, lease, _, num_known_tokens):
                target = self._network.node(lease.node_id)
                if target.is_up and target.incarnation == lease.incarnation:
                    self._pushes[sequence_id] = Push(self, target, lease, num_known_tokens, goes_on=False)
                else:
                    failure = Failure("Unavailable", f"{lease.node_id} is gone", True)
                    self._inbox.append((True, prefill.PushRefused(sequence_id, failure)))
            case prefill.BeginMove():
                self._begin_move(action)
            case prefill.CommitPush(sequence_id):
                num_known = len(self.scheduler.token_ids(sequence_id))
                self._pushes[sequence_id].commit(action, num_known - 1)
            case prefill.AbortPush(sequence_id, reason):
                self._pushes[sequence_id].abort(reason)
            case prefill.HoldCompute(sequence_id):
                engine.cut()
                self.scheduler.hold(sequence_id)
            case prefill.Resume(sequence_id):
                self._pushes.pop(sequence_id, None)
                engine.cut()
                self.scheduler.resume(sequence_id, now)
            case prefill.StopCompute(sequence_id):
                engine.cut()
                self.scheduler.cancel(sequence_id, now)
            case prefill.ReleaseBlocks(sequence_id):
                self._pushes.pop(sequence_id, None)
                engine.cut()
                self.scheduler.release(sequence_id, now)

    def _run(self, action: Run, now: float) -> None:
        spec = action.spec
        self.engine.cut()
        self.engine.enter(spec.sequence_id, self._network.request_of(spec.sequence_id))
        try:
            self.scheduler.add(spec, hands_off=action.lease is not None, now=now)
        except BatonError as error:
            self.engine.refused(spec.sequence_id)
            self._inbox.append((True, prefill.SubmitRefused(spec.sequence_id, Failure.of(error))))

    def _begin_move(self, action: prefill.BeginMove) -> None:
        sequence_id, lease = action.sequence_id, action.lease
        target = self._network.node(lease.node_id)
        self.engine.cut()
        try:
            self.scheduler.lend(sequence_id, lease.num_cached_blocks + len(lease.block_ids))
        except BatonError as error:
            self._inbox.append((True, prefill.MoveRefused(sequence_id, Failure.of(error))))
            return
        if not target.is_up or target.incarnation != lease.incarnation:
            self.scheduler.resume(sequence_id, self.events.now_s)
            failure = Failure("Unavailable", f"{lease.node_id} is gone", True)
            self._inbox.append((True, prefill.MoveRefused(sequence_id, failure)))
            return
        num_tokens = len(self.scheduler.token_ids(sequence_id)) - 1
        push = self._pushes[sequence_id] = Push(self, target, lease, num_tokens, goes_on=True)
        push.compute(num_tokens)

    def _on_plan(self, plan: StepPlan) -> None:
        """Prompts whose KV is pushed while they are computed."""
        if self._pushes:
            for piece in plan.pieces:
                push = self._pushes.get(piece.sequence.sequence_id)
                if push is not None and not piece.token_is_on_device:
                    push.compute(piece.end)

    # ── Decodes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _perform_decode(self, action: decode.Action, now: float) -> None:  # noqa: C901 (a flat table)
        scheduler, engine = self.scheduler, self.engine
        match action:
            case Send(_, message):
                self._outbox.append(message)
            case Reserve():
                self._reserve(action, now)
            case decode.Expect(sequence_id):
                scheduler.expect(sequence_id)
            case decode.Join(sequence_id, first_token):
                engine.cut()
                try:
                    scheduler.join(sequence_id, first_token, now)
                except BatonError as error:
                    self._is_rejected = True
                    self._inbox.append((False, decode.JoinRefused(sequence_id, Failure.of(error))))
                    self._release(sequence_id, "it was not taken over")
                else:
                    del self._leases[sequence_id]
                    engine.enter(sequence_id, self._network.request_of(sequence_id))
                    engine.joined(sequence_id, first_token.index + len(first_token.token_ids))
            case decode.RejectArrival(sequence_id):
                self._is_rejected = True
                self._release(sequence_id, "it is not expected")
            case decode.RevokeLease(sequence_id, reason):
                if (push := self.arriving.get(sequence_id)) is not None:
                    push.fail(reason)
                self._release(sequence_id, reason)
            case decode.ReturnBlocks(sequence_id):
                self._leases.pop(sequence_id, None)
                scheduler.return_lease(sequence_id)
            case decode.Quarantine(sequence_id):
                scheduler.quarantine(sequence_id, now)
            case decode.StopCompute(sequence_id):
                engine.cut()
                scheduler.cancel(sequence_id, now)
            case LetGo():
                self._inbox.append((True, action))

    def _release(self, sequence_id: str, reason: str) -> None:
        lease = self._leases.get(sequence_id)
        if lease is not None:
            self._inbox.append((False, Released(sequence_id, lease.epoch, reason)))

    def _reserve(self, message: Reserve, now: float) -> None:
        spec, headroom = message.spec, message.num_headroom_tokens
        num_blocks = blocks_for(spec.num_known_tokens + 1 + headroom, self._scheduler_config.block_tokens)
        if self.scheduler.pool.num_available < num_blocks + self.engine.num_margin_blocks:
            self.engine.cut()
        try:
            reserved = self.scheduler.reserve(spec, now, headroom)
        except BatonError as error:
            self._inbox.append((False, decode.GrantRefused(spec.sequence_id, Failure.of(error))))
            return
        self._num_leases += 1
        lease = self._leases[spec.sequence_id] = Lease(
            spec.sequence_id, self._num_leases, self.node_id, self.incarnation, self.description.address,
            reserved.block_ids, message.ttl_s, reserved.num_cached_blocks,
        )  # fmt: skip
        self._inbox.append((False, lease))

    # ── Conservation ────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Nothing is left here, and nothing is lost."""
        if not self.is_up:
            return
        self.scheduler.check()
        pool = self.scheduler.pool
        left = self.scheduler.num_sequences, self._prefill.num_sequences, self._decode.num_sequences
        assert left == (0, 0, 0), f"{self.node_id} still has sequences: {left}"
        assert pool.num_available == pool.num_blocks, f"{self.node_id} still holds {pool.num_held} blocks"
        assert not self._pushes, "a push never ended"
        assert not self.arriving, "a transfer never arrived"
        assert not self._leases, "a lease never ended"
