"""Counts and records the steps of the engine thread. Metrics are bound early; nothing here runs per token."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from baton.errors import BadLogits
from baton.metrics import LATENCY_BUCKETS_S, Counter, Metrics
from baton.timeline import Timeline
from engine.cost import CostModel
from engine.events import EngineEvent, Failed, Output
from engine.step import StepPlan

_STEP_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_SIZE_BUCKETS = tuple(float(2**i) for i in range(16))
# Steps wait for so many of their like, or for so many seconds of them, before they are counted.
_MAX_UNCOUNTED = 64
_MAX_UNCOUNTED_S = 0.05


class StepPhase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class _PhaseMeter:
    """The children of one phase."""

    def __init__(self, metrics: Metrics, phase: StepPhase) -> None:
        name = phase.value
        self.seconds = metrics.histogram(
            "baton_step_seconds", "Engine step, scheduling left out", _STEP_BUCKETS_S, phase=name
        )
        self.tokens = metrics.histogram("baton_step_tokens", "Tokens computed in a step", _SIZE_BUCKETS, phase=name)
        self.sequences = metrics.histogram("baton_step_sequences", "Sequences in a step", _SIZE_BUCKETS, phase=name)
        self.failures = metrics.counter("baton_step_failures", "Steps that went wrong", phase=name)


class _CostMeter:
    def __init__(self, metrics: Metrics, cost: CostModel, phase: StepPhase) -> None:
        self._cost = cost
        self._flops = metrics.counter(
            "baton_model_flops", "Floating-point operations that the steps' shapes need", phase=phase.value
        )
        self._bytes = metrics.counter(
            "baton_model_bytes", "Memory traffic that the steps' shapes need: weights and KV", phase=phase.value
        )

    def step(self, plan: StepPlan) -> None:
        flops, num_bytes = self._cost.step(plan)
        self._flops.add(flops)
        self._bytes.add(num_bytes)


class EngineMeter:
    """Written by the engine thread alone. Without a cost model nothing is said of operations and bytes."""

    def __init__(self, metrics: Metrics, cost: CostModel | None = None) -> None:
        self._phases = {phase: _PhaseMeter(metrics, phase) for phase in StepPhase}
        self._costs = {} if cost is None else {phase: _CostMeter(metrics, cost, phase) for phase in StepPhase}
        help_text = "Tokens whose KV was computed, by what they were: of a prompt (reruns included) or generated"
        self._prompt_tokens: Counter = metrics.counter("baton_computed_tokens", help_text, phase="prefill")
        self._decode_tokens: Counter = metrics.counter("baton_computed_tokens", help_text, phase="decode")
        self._queue = metrics.histogram(
            "baton_prefill_queue_seconds", "Prompts: arrival at the node to the first chunk", LATENCY_BUCKETS_S
        )
        self._compute = metrics.histogram(
            "baton_prefill_compute_seconds", "Prompts: first chunk to the first token", LATENCY_BUCKETS_S
        )

        self._bad_logits: Counter = metrics.counter(
            "baton_bad_logits", "Sequences that failed because their logits were NaN or infinite"
        )

    def step(self, plan: StepPlan, num_prompt: int, seconds: float, *, has_failed: bool) -> None:
        """``num_prompt`` of its tokens are known ones: of prompts, reruns included."""
        num_tokens = plan.num_tokens
        phase = StepPhase.MIXED
        if num_prompt in (0, num_tokens):
            phase = StepPhase.PREFILL if num_prompt else StepPhase.DECODE
        meter = self._phases[phase]
        if has_failed:
            meter.failures.add()
            return
        meter.seconds.observe(seconds)
        meter.tokens.observe(num_tokens)
        meter.sequences.observe(len(plan.pieces))
        self._prompt_tokens.add(num_prompt)
        self._decode_tokens.add(num_tokens - num_prompt)
        if self._costs:
            self._costs[phase].step(plan)

    def outcome(self, events: list[EngineEvent]) -> None:
        """Once per step, with what it brought."""
        for event in events:
            if isinstance(event, Output) and event.prefill is not None:
                self._queue.observe(event.prefill.queue_s)
                self._compute.observe(event.prefill.compute_s)
            elif isinstance(event, Failed) and event.failure.code == BadLogits.__name__:
                self._bad_logits.add()


class TakenStep(NamedTuple):
    """A step that is over. The plan's pieces still say what was computed when their sequences have changed."""

    plan: StepPlan
    has_failed: bool
    started_s: float
    ended_s: float
    # From the end of the step before, or from when work came, to its end.
    turn_s: float


class StepBook:
    """Counts and records steps some at a time. Written by the engine thread alone.

    A step leaves nothing of this code in the processor's caches: one by one they took 26 us at batch 8, in a row 10.
    Metrics and trace are behind by 50 ms of steps at the most, and by nothing when the engine is idle.
    """

    def __init__(self, timeline: Timeline, meter: EngineMeter | None) -> None:
        self._timeline = timeline
        self._meter = meter
        self._uncounted: list[TakenStep] = []
        self._uncounted_s = 0.0

    def add(self, step: TakenStep) -> None:
        self._uncounted.append(step)
        self._uncounted_s += step.ended_s - step.started_s
        if self._uncounted_s >= _MAX_UNCOUNTED_S or len(self._uncounted) >= _MAX_UNCOUNTED:
            self.settle()

    def settle(self) -> None:
        if not self._uncounted:
            return
        for plan, has_failed, started_s, ended_s, turn_s in self._uncounted:
            prompts = [p for p in plan.pieces if p.start < p.sequence.spec.num_known_tokens]
            num_prompt = sum([p.num_tokens for p in prompts])
            names = [p.sequence.sequence_id for p in prompts]
            self._timeline.step(
                started_s, ended_s, num_prompt, len(plan.pieces) - len(prompts), names,
                plan.shape.num_prompt_pairs, plan.shape.num_kv_tokens, turn_s,
            )  # fmt: skip
            if self._meter is not None:
                self._meter.step(plan, num_prompt, ended_s - started_s, has_failed=has_failed)
        self._uncounted.clear()
        self._uncounted_s = 0.0
