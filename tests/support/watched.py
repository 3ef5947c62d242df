"""A watched cluster whose metrics are those of a simulated run, as its processes would export them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from baton import PROTOCOL_VERSION
from baton.metrics import Metrics, exposition
from baton.observe import Relay
from baton.types import FinishReason, KvLayout, ModelDescription, NodeDescription, NodeStatus, Role
from engine.step import StepShape
from planner.advise.cluster import Watched
from planner.advise.commands import Member
from planner.advise.samples import Samples, Window
from planner.advise.setup import Setup
from planner.fitted import Line, Point, Transfers
from planner.measured import Measured
from planner.observed import Observed
from planner.profiles import simulated_as
from planner.results import Run
from planner.steps import RecordedStep
from planner.uncontended import measured
from planner.workload import Workload
from router.cluster.config import PolicyConfig
from router.flow.messages import Outcome, OutcomeKind
from router.metrics import RouterMetrics

LAYOUT = KvLayout(2, 4096, 2, 64, 16, "float32")
# A prompt of 1,000 tokens takes 0.1 s, a step of 10 sequences 14 ms.
LINE = Line(base_s=2e-3, prompt_token_s=1e-4, pair_s=0.0, sequence_s=1e-3, kv_token_s=1e-7)
_SHAPES = (
    *(StepShape().with_prompt(0, tokens) for tokens in (16, 64, 256, 1024, 2048)),
    *(StepShape(0, 0, batch, batch * context) for batch in (1, 4, 16, 64) for context in (100, 1000)),
    *(StepShape(0, 0, 8, 4000).with_prompt(0, tokens) for tokens in (64, 512)),
)
PROFILE = Measured(
    model="m", device="cpu", software_version="0", kv_layout=LAYOUT, line=LINE,
    points=tuple(Point(shape, LINE.step_s(shape)) for shape in _SHAPES), transfers=Transfers(0.0, 1e9),
)  # fmt: skip


def member(node_id: str, role: Role, *, address: str = "127.0.0.1:1", **status: Any) -> Member:
    description = NodeDescription(
        node_id, 1, role, address, ModelDescription("m", "f", "float32", 100_000, 512), LAYOUT, PROTOCOL_VERSION, 1,
        "host", ("shm",), "cpu", "k", "0",
    )  # fmt: skip
    return Member(description, NodeStatus(role, total_blocks=4096, free_blocks=3072, **status))


def members_of(setup: Setup, **fields: Any) -> tuple[Member, ...]:
    return tuple(
        member(f"{role.value}-{number}", role, **fields) for role in Role for number in range(setup.count(role))
    )


def watched_as(setup: Setup, work: Workload) -> Watched:
    """The cluster has served ``work`` with that setup, and does what `PROFILE` says."""
    config = setup.config(max(request.num_output_tokens for request in work.requests))
    run = simulated_as(PROFILE, work, setup.design(PROFILE.as_machine()), config).run
    members = members_of(setup)
    steps = tuple(
        RecordedStep(members[0].node_id, "host", point.shape, float(number), point.seconds)
        for number, point in enumerate(PROFILE.points * 3)
    )
    return Watched(
        seconds=work.seconds,
        routers=(_router(setup, run),),
        members=members,
        metrics={use.name: _worker(setup, run, use.name) for use in run.machines},
        observed=Observed(steps, run.transfers),
    )


def window(before: Metrics, after: Metrics, source: str = "process") -> Window:
    return Window(*(Samples.parse(exposition(metrics).decode(), source) for metrics in (before, after)))


def _router(setup: Setup, run: Run) -> Window:
    made = []
    for has_served in (False, True):
        metrics = Metrics({"cluster": "c", "model_name": "m"})
        counted = RouterMetrics(metrics)
        counted.add_policy(PolicyConfig(disaggregation=setup.disaggregation))
        if has_served:
            _serve(counted, run)
        made.append(metrics)
    return window(*made, "router")


def _serve(counted: RouterMetrics, run: Run) -> None:
    for served in run.served:
        found = measured(served, run.profile)
        relay = Relay(
            "p", "d", 0.0, 0.0, 0.0, found.ttft_s, found.e2e_s, found.tbt_s or 0.0, 0.0, 1,
            num_tokens=served.num_tokens, num_cached_tokens=served.num_cached_tokens,
        )  # fmt: skip
        outcome = Outcome(OutcomeKind.FINISHED, finish_reason=FinishReason.STOP)
        counted.observe(outcome, relay, served.request.num_prompt_tokens)
    for gap_s, count in run.gaps_s:
        counted.tbt.observe(gap_s, count)


def _worker(setup: Setup, run: Run, name: str) -> Window:
    made = []
    (use,) = (each for each in run.machines if each.name == name)
    for share in (0.0, 1.0):
        metrics = Metrics({"node": name})
        for phase, seconds in (("prefill", use.prompt_s), ("decode", use.decode_s), ("mixed", use.mixed_s)):
            metrics.histogram("baton_step_seconds", "h", (1.0,), phase=phase).total = share * seconds
        tokens = metrics.counter("baton_computed_tokens", "h", phase="decode")
        tokens.add(share * use.num_output_tokens)
        caps = {"max_batch_tokens": setup.max_batch_tokens, "max_num_seqs": setup.max_num_seqs,
                "tbt_target_seconds": setup.tbt_target_s or 0.0}  # fmt: skip
        for cap, value in caps.items():
            metrics.gauge(f"baton_{cap}", "h", lambda value=value: float(value))
        made.append(metrics)
    return window(*made, name)


def pinned(one: Member) -> Member:
    return replace(one, status=replace(one.status, is_pinned=True))
