"""The cluster's policy in simulated time: what it makes of one node that is three times slower, with and without the
measured step times; and one prefill and one decode node, split or whole.

Pure code, no process: the router's scheduler places on nodes that compute in steps, as engines do, and take the roles
that workers do. A step takes what its prompt tokens, sequences and KV take, times the node's slowness.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from baton.machine import Tick
from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role, StepTimes
from router.cluster.config import PolicyConfig
from router.cluster.policy import Decision, Demand
from router.cluster.scheduler import Scheduler
from router.config import LimitsConfig
from worker.roles import RoleChanged, Roles, RolesConfig, SetRole, Work

# About those of the bench model on one core.
TIMES = StepTimes(0.012, 1.7e-3, 1e-3, 1e-6)
_BLOCK_TOKENS, _NUM_BLOCKS = 16, 4096
_STATUS_S = 0.25
# Prompt tokens of a step without a target.
_CHUNK_TOKENS = 512
_BYTE_S = 1e-9
SLOWNESS = 3.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Poisson arrivals at a rate, for a while; lengths vary by half around these."""

    rate: float
    prompt_tokens: int
    output_tokens: int
    start_s: float
    end_s: float


@dataclass(eq=False, slots=True)
class Request:
    number: int
    arrived_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    decision: Decision | None = None
    num_left: int = 0
    num_done: int = 0
    first_token_s: float | None = None
    token_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    client: str = ""

    @property
    def sequence_id(self) -> str:
        return f"{self.number}/0/0"

    @property
    def has_tokens(self) -> bool:
        return self.first_token_s is not None

    def can_move_from(self, node_id: str) -> bool:
        return False

    def demand(self, now: float) -> Demand:
        return Demand(self.num_prompt_tokens)


class Node:
    def __init__(self, node_id: str, home: Role, slowness: float, target_s: float | None) -> None:
        model = ModelDescription("bench", "bench", "bfloat16", 1 << 20, 512)
        layout = KvLayout(16, _NUM_BLOCKS, 4, 64, _BLOCK_TOKENS, "bfloat16")
        self.description = NodeDescription(
            node_id, 1, home, "a:1", model, layout, 1, 1, "h", (), "none", "none", "0", tbt_target_s=target_s
        )
        self.node_id = node_id
        self.slowness = slowness
        self.roles = Roles(home, RolesConfig())
        self.prompts: list[Request] = []
        self.decodes: list[Request] = []
        self.is_stepping = False
        self.num_computed = self.num_generated = 0

    @property
    def num_kv_tokens(self) -> int:
        return sum(x.num_prompt_tokens + x.num_done for x in self.decodes)

    def step_s(self, num_prompt_tokens: int) -> float:
        return self.slowness * TIMES.step_s(num_prompt_tokens, len(self.decodes), self.num_kv_tokens)

    def chunk(self) -> dict[Request, int]:
        """Prompt tokens of the next step, in the order they came."""
        budget = _CHUNK_TOKENS
        target_s = self.description.tbt_target_s
        if target_s is not None and self.decodes:
            rest_s = target_s - self.step_s(0)
            budget = min(budget, max(_BLOCK_TOKENS, int(rest_s / (self.slowness * TIMES.prompt_token_s))))
        found = {}
        for request in self.prompts:
            if budget > 0:
                found[request] = min(budget, request.num_left)
                budget -= found[request]
        return found

    def status(self, told: StepTimes) -> NodeStatus:
        queued_tokens = sum(x.num_left for x in self.prompts)
        held = self.num_kv_tokens + sum(x.num_prompt_tokens - x.num_left for x in self.prompts)
        return NodeStatus(
            self.roles.acting, home=self.roles.home, is_pinned=self.roles.is_pinned, total_blocks=_NUM_BLOCKS,
            free_blocks=max(0, _NUM_BLOCKS - held // _BLOCK_TOKENS), queued_prompt_tokens=queued_tokens,
            num_waiting=len(self.prompts), num_running=len(self.decodes), running_tokens=self.num_kv_tokens,
            step_times=told,
        )  # fmt: skip


class Simulation:
    """``knows_speed``: nodes tell their own step times, else all of them the average one's."""

    def __init__(
        self,
        pools: Mapping[Role, int],
        traffic: list[Traffic],
        *,
        slow: str = "",
        knows_speed: bool = True,
        target_s: float | None = None,
        policy: PolicyConfig | None = None,
        seed: int = 5,
    ) -> None:
        self.now = 0.0
        self._source = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = itertools.count()
        limits = LimitsConfig(max_client_running=1 << 20, max_queued=1 << 20, max_active=1 << 20)
        self.scheduler: Scheduler[Request] = Scheduler(limits, policy or PolicyConfig(), 0.0)
        self.nodes = {
            f"{role.value}-{i}": Node(
                f"{role.value}-{i}", role, SLOWNESS if f"{role.value}-{i}" == slow else 1.0, target_s
            )
            for role, num in pools.items()
            for i in range(num)
        }
        self._knows_speed = knows_speed
        for node in self.nodes.values():
            self.scheduler.node_up(node.description, node.status(self._told(node)), True, 0.0)
        self.requests: list[Request] = []
        self.reasons: Counter[str] = Counter()
        # When, which node, and its acting role from then on, or the home role with a star.
        self.role_changes: list[tuple[float, str, str]] = []
        for each in traffic:
            self._at(each.start_s, lambda each=each: self._arrive(each))  # type: ignore[misc]
        self._at(0.0, self._statuses)
        self._end_s = max(each.end_s for each in traffic)

    def run(self, most_s: float = 36_000.0) -> None:
        """Until all requests have ended and all nodes are at home."""
        while self._events and self.now < most_s:
            self.now, _, what = heapq.heappop(self._events)
            what()
            self._place()
            is_over = self.now > self._end_s and not self.scheduler.num_in_flight
            if is_over and all(node.roles.acting is node.roles.home for node in self.nodes.values()):
                return

    def _at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._counter), what))

    def _told(self, node: Node) -> StepTimes:
        mean = sum(x.slowness for x in self.nodes.values()) / len(self.nodes)
        factor = node.slowness if self._knows_speed else mean
        return StepTimes(
            *(factor * x for x in (TIMES.base_s, TIMES.prompt_token_s, TIMES.sequence_s, TIMES.kv_token_s))
        )

    def _statuses(self) -> None:
        for node in self.nodes.values():
            if node.roles.wake_at_s is not None and node.roles.wake_at_s <= self.now:
                self._note(node, node.roles.handle(Tick(), self.now))
            self.scheduler.node_status(node.node_id, node.status(self._told(node)))
        change = self.scheduler.role_change(self.now)
        if change is not None:
            node = self.nodes[change.node_id]
            self._note(node, node.roles.handle(SetRole(change.role, change.expected), self.now), star="*")
        self.scheduler.has_news = True
        self._at(self.now + _STATUS_S, self._statuses)

    def _note(self, node: Node, changed: list[RoleChanged], star: str = "") -> None:
        self.role_changes += [(self.now, node.node_id, each.after.value + star) for each in changed]

    def _arrive(self, traffic: Traffic) -> None:
        if self.now >= traffic.end_s:
            return
        num_prompt, num_output = (
            max(2, round(x * self._source.uniform(0.5, 1.5))) for x in (traffic.prompt_tokens, traffic.output_tokens)
        )
        request = Request(len(self.requests), self.now, num_prompt, num_output)
        request.num_left = request.num_prompt_tokens
        self.requests.append(request)
        self.scheduler.arrive(request, self.now)
        self._at(self.now + self._source.expovariate(traffic.rate), lambda: self._arrive(traffic))

    def _place(self) -> None:
        while self.scheduler.has_news and (request := self.scheduler.next(self.now)) is not None:
            decision = self.scheduler.decide(request, self.now)
            if not isinstance(decision, Decision):
                self.scheduler.has_news = False
                return
            self.scheduler.assign(request, decision, request.num_prompt_tokens, self.now)
            self.scheduler.confirmed(request.sequence_id)
            self.reasons[decision.reason.value] += 1
            request.decision = decision
            node = self.nodes[decision.placement.prefill_id]
            node.prompts.append(request)
            self._work(node)

    def _work(self, node: Node) -> None:
        """What the node has to do has changed."""
        self._note(node, node.roles.handle(Work(bool(node.prompts), bool(node.decodes)), self.now))
        if node.is_stepping or not (node.prompts or node.decodes):
            return
        node.is_stepping = True
        chunk, decodes = node.chunk(), list(node.decodes)
        self._at(self.now + node.step_s(sum(chunk.values())), lambda: self._stepped(node, chunk, decodes))

    def _stepped(self, node: Node, chunk: dict[Request, int], decodes: list[Request]) -> None:
        node.is_stepping = False
        for request, num_tokens in chunk.items():
            request.num_left -= num_tokens
            node.num_computed += num_tokens
            if not request.num_left:
                node.prompts.remove(request)
                self._computed(node, request)
        for request in decodes:
            node.num_generated += 1
            request.num_done += 1
            request.gaps_s.append(self.now - request.token_s)
            request.token_s = self.now
            if request.num_done == request.num_output_tokens:
                node.decodes.remove(request)
                self._ended(node, request)
        self._work(node)

    def _computed(self, node: Node, request: Request) -> None:
        request.first_token_s = request.token_s = self.now
        request.num_done = 1
        self.scheduler.prefilled(request.sequence_id)
        assert request.decision is not None
        target = self.nodes[request.decision.placement.decode_id]
        move_s = 0.0 if target is node else request.num_prompt_tokens * 2**14 * _BYTE_S
        self._at(self.now + move_s, lambda: self._joined(target, request))

    def _joined(self, node: Node, request: Request) -> None:
        node.decodes.append(request)
        self._work(node)

    def _ended(self, node: Node, request: Request) -> None:
        request.ended_s = self.now
        mean_s = sum(request.gaps_s) / len(request.gaps_s)
        self.scheduler.generated(node.node_id, request.num_output_tokens, mean_s)
        self.scheduler.release(request, self.now)
        self.scheduler.depart(request, self.now)


def run(quick: bool) -> dict[str, Any]:
    seconds = 300.0 if quick else 2000.0
    return {
        "slow node": [
            heterogeneous(slow, knows_speed, seconds)
            for slow in ("prefill-0", "decode-0", "mixed-0")
            for knows_speed in (False, True)
        ],
        "disaggregation": [
            disaggregation(mode, rate, target_s, seconds)
            for target_s in (None, 0.1)
            for rate in (0.25, 0.4, 0.5)
            for mode in ("always", "auto", "never")
        ],
    }


def heterogeneous(slow: str, knows_speed: bool, seconds: float) -> dict[str, Any]:
    """Three nodes of each pool, or four mixed ones, of which one is three times slower, at about 70 % of what they can
    do. By its speed it would have a seventh of its pool's work, or a tenth."""
    pools = {Role.MIXED: 4} if slow.startswith("mixed") else {Role.PREFILL: 3, Role.DECODE: 3}
    prompt, output, rate = (200, 150, 4.0) if slow.startswith("decode") else (1000, 60, 0.95)
    simulation = Simulation(
        pools, [Traffic(rate, prompt, output, 0.0, seconds)], slow=slow, knows_speed=knows_speed,
        policy=PolicyConfig(disaggregation="always", repurpose_after_s=None),
    )  # fmt: skip
    simulation.run()
    peers = [node for node in simulation.nodes.values() if node.roles.home is simulation.nodes[slow].roles.home]
    is_decode = slow.startswith("decode")
    work = {node.node_id: node.num_generated if is_decode else node.num_computed for node in peers}
    return {
        "slow": slow,
        "speed": "measured" if knows_speed else "unknown",
        "its share of work": work[slow] / sum(work.values()),
        "share by its speed": 1 / (1 + SLOWNESS * (len(peers) - 1)),
    } | _latencies(simulation)


def disaggregation(mode: str, rate: float, target_s: float | None, seconds: float) -> dict[str, Any]:
    """One prefill and one decode node."""
    simulation = Simulation(
        {Role.PREFILL: 1, Role.DECODE: 1}, [Traffic(rate, 1024, 64, 0.0, seconds)], target_s=target_s,
        policy=PolicyConfig(disaggregation=mode),
    )  # fmt: skip
    simulation.run()
    whole = sum(num for reason, num in simulation.reasons.items() if reason != "pools")
    return {
        "requests/s": rate,
        "target ms": None if target_s is None else target_s * 1e3,
        "disaggregation": mode,
        "whole": whole / len(simulation.requests),
    } | _latencies(simulation)


def _latencies(simulation: Simulation) -> dict[str, Any]:
    done = [x for x in simulation.requests if x.ended_s is not None and x.first_token_s is not None]
    assert len(done) == len(simulation.requests), "a request waits for ever"
    ttft = sorted((x.first_token_s or 0.0) - x.arrived_s for x in done)
    e2e = sorted((x.ended_s or 0.0) - x.arrived_s for x in done)
    gaps = sorted(gap for x in done for gap in x.gaps_s)
    return {
        "ttft p50 s": _at_share(ttft, 0.5),
        "ttft p99 s": _at_share(ttft, 0.99),
        "gap p50 ms": _at_share(gaps, 0.5) * 1e3,
        "gap p99 ms": _at_share(gaps, 0.99) * 1e3,
        "e2e p50 s": _at_share(e2e, 0.5),
        "e2e p99 s": _at_share(e2e, 0.99),
    }


def _at_share(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
