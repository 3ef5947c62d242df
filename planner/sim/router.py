"""The router of a simulated cluster: the flows of all requests over the cluster-level scheduler, without sessions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from baton import errors
from baton.node_messages import NodeMessage
from baton.observe import Relay
from baton.types import Embedding, PromptLogprobs, SamplingParams, TokenChunk
from planner.results import Ending, Served, Told
from planner.sim.config import Outage, SimulationConfig
from planner.sim.events import Events
from planner.sim.host import Loop
from planner.sim.node import Node
from planner.sim.requests import STOP_ID, SimulatedRequest, prompt_ids
from planner.workload import Request
from router.cluster.policy import Decision, Obstacle
from router.cluster.rebalance import Planned
from router.cluster.scheduler import Scheduler
from router.flow.flows import Flows
from router.flow.machine import Flow
from router.flow.messages import (
    AttemptFailed,
    Begin,
    ClientCancelled,
    FromNode,
    MoveOver,
    NodeLost,
    Outcome,
    OutcomeKind,
    Prompt,
    Tick,
    ToNode,
)
from router.flow.move import MoveOutcome
from worker.roles import SetRole

# Of the wire: what still arrives of a request that is over is late by less.
_LATE_S = 30.0
_ENDINGS = {
    OutcomeKind.FINISHED: Ending.WHOLE, OutcomeKind.REJECTED: Ending.REFUSED, OutcomeKind.CANCELLED: Ending.CANCELLED,
    OutcomeKind.FAILED: Ending.FAILED,
}  # fmt: skip


class SimulatedRouter(Flows[SimulatedRequest]):
    def __init__(
        self,
        config: SimulationConfig,
        events: Events,
        prefixes: dict[str, int],
        counters: defaultdict[str, float],
        told: Told,
        loop: Loop | None = None,
    ) -> None:
        super().__init__(Scheduler(config.limits, config.policy, 0.0), events)
        self.ended_s = 0.0
        self._config = config
        self._events = events
        self._prefixes = prefixes
        self._counters = counters
        self._told = told
        # None: what comes takes no time.
        self._loop = loop
        self._nodes: dict[str, Node] = {}
        # Of nodes that died, those that are not lost yet.
        self._silent: set[str] = set()
        # By number.
        self._requests: dict[str, SimulatedRequest] = {}
        # Clients' bound on an answer, and its end: schedulers know no lengths.
        self._sampling: dict[int, SamplingParams] = {}

    def start(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = dict(nodes)
        config, now = self._config, self._events.now_s
        for number, node in enumerate(self._nodes.values()):
            self.scheduler.node_up(node.description, node.status(), True, now)
            # Nodes report one after the other.
            self._events.regularly(now + config.status_s * (number + 1) / len(nodes), self._hear_status, node)
        self._events.regularly(now + config.tick_s, self._tick)

    def request_of(self, sequence_id: str) -> SimulatedRequest:
        return self._requests[sequence_id.partition("/")[0]]

    # ── Clients ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def arrive(self, request: Request, served: Served) -> None:
        """It is at the router's door."""
        begins_s = self._events.now_s if self._loop is None else self._loop.begins_s(num_requests=1)
        if begins_s > self._events.now_s:
            self._events.at(begins_s, self._take_up, request, served)
        else:
            self._take_up(request, served)

    def _take_up(self, request: Request, served: Served) -> None:
        now = self._events.now_s
        try:
            self.scheduler.check_capacity(1, "", now)
        except errors.BatonError:
            self._over(served, Ending.REFUSED)
            return
        prompt = Prompt(prompt_ids(request, self._prefixes))
        flow = Flow(
            str(request.number), 0, prompt, self._sampling_of(request), arrived_s=now,
            deadline_s=now + self._config.timeout_s, config=self._config.flow, priority=request.priority,
        )  # fmt: skip
        item = SimulatedRequest(flow, served, self._num_untold)
        self._requests[str(request.number)] = item
        self._feed(item, Begin())
        if request.cancelled_after_s is not None:
            self._events.at(now + request.cancelled_after_s, self._cancel, item)
        self.place()

    def _sampling_of(self, request: Request) -> SamplingParams:
        most = max(self._config.max_output_tokens, request.num_output_tokens)
        if most not in self._sampling:
            self._sampling[most] = SamplingParams(seed=0, max_tokens=most, stop_token_ids=(STOP_ID,))
        return self._sampling[most]

    def _cancel(self, item: SimulatedRequest) -> None:
        if not item.flow.has_ended:
            self._sync(item)
            self._feed(item, ClientCancelled("the client has left"))
            self.place()

    def _num_untold(self, item: SimulatedRequest) -> int:
        placement = item.flow.placement
        if placement is None or not item.flow.tokens or item.flow.has_ended:
            return 0
        node = self._nodes[placement.decode_id]
        return node.engine.num_untold(item.sequence_id) if node.is_up else 0

    def _begin_move(self, move: Planned[SimulatedRequest]) -> None:
        # Its target is told all tokens but the newest.
        self._sync(move.item)
        super()._begin_move(move)

    def _sync(self, item: SimulatedRequest) -> None:
        """Tell its flow of all tokens that were drawn by now: nodes tell simulated ones when it matters."""
        placement = item.flow.placement
        if placement is not None and self._num_untold(item):
            chunk = self._nodes[placement.decode_id].engine.untold(item.sequence_id)
            if chunk is not None:
                self._feed(item, FromNode(placement.decode_id, chunk))

    # ── Nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def heard(self, node_id: str, messages: Sequence[NodeMessage]) -> None:
        if self._loop is not None:
            # Of tokens the newest: those before it were work at a rate.
            num_tokens = sum(isinstance(message, TokenChunk) for message in messages)
            begins_s = self._loop.begins_s(num_tokens=num_tokens)
            if begins_s > self._events.now_s:
                self._events.at(begins_s, self._hear, node_id, messages)
                return
        self._hear(node_id, messages)

    def _hear(self, node_id: str, messages: Sequence[NodeMessage]) -> None:
        if self.scheduler.node(node_id) is not None:
            self.on_node_messages(node_id, messages)
            self.place()

    def _hear_status(self, node: Node) -> None:
        self._events.regularly(self._events.now_s + self._config.status_s, self._hear_status, node)
        if node.is_up and node.node_id not in self._silent:
            while (change := node.cache_change()) is not None:
                self.scheduler.cache_changed(node.node_id, change)
            self.scheduler.node_status(node.node_id, node.status())
            self.place()

    def _tick(self) -> None:
        now = self._events.now_s
        self._events.regularly(now + self._config.tick_s, self._tick)
        self.scheduler.has_news = True
        self.scheduler.prefix_index.sweep()
        if (change := self.scheduler.role_change(now)) is not None:
            self._counters["role_changes_asked"] += 1
            self._nodes[change.node_id].set_role(SetRole(change.role, change.expected))
        self.place()
        while self._move_next():
            pass

    def strike(self, outage: Outage) -> None:
        """The machine dies; its silence makes the node suspect, then lost."""
        node, now, membership = self._nodes[outage.machine], self._events.now_s, self._config.membership
        if not node.is_up:
            return
        self._counters["failures"] += 1
        node.die()
        self._silent.add(node.node_id)
        self._events.at(now + membership.suspect_s, self._suspect, node.node_id)
        self._events.at(now + membership.lost_s, self._give_up, node.node_id)
        if outage.back_s is not None:
            self._events.at(max(outage.back_s, now), self._come_back, node)

    def _suspect(self, node_id: str) -> None:
        if node_id in self._silent:
            self.scheduler.node_changed(node_id, False, self._events.now_s)

    def _give_up(self, node_id: str) -> None:
        if node_id not in self._silent:
            return
        self._silent.remove(node_id)
        for sequence_id, lost in self._lose(node_id, "it says nothing"):
            self._tell_loss(sequence_id, lost)
        self.place()

    def _tell_loss(self, sequence_id: str, lost: NodeLost) -> None:
        item = self.scheduler.item(sequence_id)
        if item is not None:
            self._feed(item, lost)

    def _come_back(self, node: Node) -> None:
        # Another process at its address: the one before is lost for certain.
        self._give_up(node.node_id)
        self._counters["recoveries"] += 1
        node.start()
        self.scheduler.node_up(node.description, node.status(), True, self._events.now_s)
        self.place()

    def place(self) -> None:
        """Place waiting sequences until one has to wait, if anything has changed that could make room."""
        scheduler = self.scheduler
        if scheduler.has_news:
            scheduler.has_news = False
            now = self._events.now_s
            while scheduler.num_waiting and (item := scheduler.next(now)) is not None and self._place(item, now):
                pass

    # ── What flows ask for ──────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, action: ToNode) -> None:
        if self.scheduler.node(action.node_id) is not None:
            self._nodes[action.node_id].send(action.message)

    def _deliver(self, item: SimulatedRequest, chunk: TokenChunk) -> None:
        served = item.served
        if served.first_token_s is None:
            served.first_token_s = self._events.now_s
            self._told(served)

    def _deliver_prompt(self, item: SimulatedRequest, found: PromptLogprobs | Embedding) -> None:
        raise AssertionError("no simulated request asks for anything of its prompt")

    def _arm(self, item: SimulatedRequest, now: float) -> None:
        wake_s = item.flow.wake_at_s
        if not item.flow.has_ended and (item.timer_s is None or wake_s < item.timer_s):
            item.timer_s = wake_s
            self._events.regularly(max(now, wake_s), self._on_timer, item, wake_s)

    def _on_timer(self, item: SimulatedRequest, timer_s: float) -> None:
        if item.flow.has_ended or item.timer_s != timer_s:
            return
        item.timer_s = None
        now = self._events.now_s
        if now >= item.flow.wake_at_s:
            self._sync(item)
        if not item.flow.has_ended and now >= item.flow.wake_at_s:
            self._feed(item, Tick())
            self.place()
        else:
            self._arm(item, now)

    def _ended(self, item: SimulatedRequest, outcome: Outcome, relay: Relay) -> None:
        served = item.served
        served.prompt_machine, served.token_machine = relay.prefill_node_id, relay.decode_node_id
        served.num_attempts, served.num_moves = relay.attempts, len(relay.moves)
        served.num_cached_tokens, served.num_tokens = relay.num_cached_tokens, relay.num_tokens
        self._over(served, _ENDINGS[outcome.kind])
        self._events.regularly(self._events.now_s + _LATE_S, self._forget, item)

    def _forget(self, item: SimulatedRequest) -> None:
        del self._requests[item.flow.request_id]

    def _over(self, served: Served, ending: Ending) -> None:
        assert served.ending is None, "a request ended twice"
        served.ending, served.ended_s = ending, self._events.now_s
        self.ended_s = self._events.now_s
        self._told(served)

    def _note(self, item: SimulatedRequest, action: AttemptFailed | MoveOver) -> None:
        if isinstance(action, AttemptFailed):
            self._counters["attempts_failed"] += 1
        else:
            self._counters[f"moves_{action.outcome.value}"] += 1
            if action.outcome is MoveOutcome.MOVED:
                self._counters[f"moves_for_{action.reason.value}"] += 1

    def _note_decision(self, decision: Decision | Obstacle) -> None:
        if isinstance(decision, Decision):
            self._counters[f"placed_{decision.reason.value}"] += 1
        else:
            self._counters["placement_waits"] += 1
