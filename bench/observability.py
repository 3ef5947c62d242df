"""The cost of metrics and tracing: a cluster with all of it on and off (bench.observability_cluster), and its parts
alone.

The parts are processor time of the engine thread around the meter's calls, and of the router's bookkeeping in a loop.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.clock import MonotonicClock
from baton.metrics import Metrics, exposition
from baton.observe import Lifeline
from baton.types import FinishReason, SamplingParams, SequenceSpec, TransferReport
from bench import observability_cluster
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.events import EngineEvent, Output
from engine.meter import EngineMeter
from engine.replica import Replica, StepUnderway
from engine.runner import Runner
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan, StepResult
from loadgen.samples import Samples
from router.flow.messages import Outcome, OutcomeKind
from router.metrics import RouterMetrics

_MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
_WAIT_S = 120.0
_REPORT = TransferReport("shm", True, 1 << 20, 4, 0.01, 0.002)


class _TimedStep:
    def __init__(self, step: StepUnderway, ends_s: list[float]) -> None:
        self._step = step
        self._ends_s = ends_s

    def result(self) -> StepResult:
        result = self._step.result()
        self._ends_s.append(time.thread_time())
        return result


class _Timed:
    """A runner that records its thread's processor time at the end of each step."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.overlaps = runner.overlaps
        self.ends_s: list[float] = []

    def enter_thread(self) -> None:
        self._runner.enter_thread()

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> _TimedStep:
        return _TimedStep(self._runner.launch(plan, on_layer), self.ends_s)

    def forget(self, sequence_id: str) -> None:
        self._runner.forget(sequence_id)


class _Watched(EngineMeter):
    """Adds up the processor time of its own calls."""

    spent_s = 0.0

    def step(self, plan: StepPlan, num_prompt: int, seconds: float, *, has_failed: bool) -> None:
        began_s = time.thread_time()
        super().step(plan, num_prompt, seconds, has_failed=has_failed)
        self.spent_s += time.thread_time() - began_s

    def outcome(self, events: list[EngineEvent]) -> None:
        began_s = time.thread_time()
        super().outcome(events)
        self.spent_s += time.thread_time() - began_s


class _Engine:
    def __init__(self) -> None:
        runner = Runner.load(_MODEL, EngineConfig(dtype="float32", num_blocks=128, num_threads=1))
        self._runner = _Timed(runner)
        config = SchedulerConfig(
            block_tokens=runner.layout.block_tokens,
            max_model_tokens=runner.description.max_model_tokens,
            vocab_size=runner.description.vocab_size,
        )
        self._meter = _Watched(Metrics(), runner.cost)
        scheduler = Scheduler(config, BlockPool(runner.layout.num_blocks))
        self._replica = Replica(
            self._runner, scheduler, num_layers=runner.layout.num_layers, clock=MonotonicClock(), meter=self._meter
        )
        self._replica.start()
        self._num_rounds = 0

    def round(self, batch: int, num_tokens: int) -> tuple[float, float]:
        """Processor seconds of a decode step (from the end of one step to the end of the next), and of the meter in
        it."""
        self._num_rounds += 1
        left = batch
        done = threading.Event()

        def listen(events: list[EngineEvent]) -> None:
            nonlocal left
            left -= sum(isinstance(e, Output) and e.chunk.finish_reason is not None for e in events)
            if left == 0:
                done.set()

        self._runner.ends_s.clear()
        self._meter.spent_s = 0.0
        for i in range(batch):
            sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=num_tokens, ignore_eos=True)
            spec = SequenceSpec(f"{self._num_rounds}/{i}", tuple(range(1, 33)), sampling)
            self._replica.submit(spec, hands_off=False, listener=listen)
        if not done.wait(_WAIT_S):
            raise TimeoutError(f"no end of a round within {_WAIT_S} s")
        # The first steps compute the prompts.
        ends_s = self._runner.ends_s[batch + 1 :]
        return (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1), self._meter.spent_s / len(self._runner.ends_s)

    def stop(self) -> None:
        self._replica.stop(10.0)


def _engine_rows(rounds: int) -> list[dict[str, Any]]:
    """Measured on the demo's model: its steps are very short, so the share of the meter is largest."""
    engine = _Engine()
    # Two pairs of clock readings a step; about half of each falls between the two readings.
    readings_us = 2 * _us(time.thread_time, 10_000)
    rows = []
    try:
        for batch in (1, 8, 32):
            # The first round is a warm-up.
            found = [engine.round(batch, 48) for _ in range(rounds + 1)][1:]
            steps, meter = (Samples.of(values) for values in zip(*found, strict=True))
            step_us, meter_us = steps.median * 1e6, meter.median * 1e6 - readings_us
            rows.append(
                {"batch": batch, "step_us": step_us, "meter_us": meter_us, "meter_percent": 100 * meter_us / step_us}
            )
    finally:
        engine.stop()
    return rows


def _us(work: Callable[[], object], count: int, repeats: int = 7) -> float:
    """Processor time of one call, best of several."""
    best = float("inf")
    for _ in range(repeats):
        began_s = time.thread_time()
        for _ in range(count):
            work()
        best = min(best, (time.thread_time() - began_s) / count)
    return best * 1e6


def _request(metrics: RouterMetrics) -> None:
    life = Lifeline(0.0, metrics.tbt.observe)
    life.queued(0.1)
    life.placed("p0", "d0", 0.2)
    life.leased(0.3)
    life.sent(0.3)
    life.prefilled(0.1, 0.1, 0)
    life.tokens(1, 1.0)
    life.joined(0.1, 1.1)
    life.transferred(_REPORT, 1.1)
    life.tokens(1, 1.2)
    life.ended(1.2)
    metrics.observe(Outcome(OutcomeKind.FINISHED, FinishReason.STOP), life.relay(), 10)


def run(quick: bool) -> dict[str, Any]:
    rows = _engine_rows(3 if quick else 11)
    gc.collect()
    metrics = Metrics()
    counted = RouterMetrics(metrics, has_vllm_names=True)
    life = Lifeline(0.0, counted.tbt.observe)
    bare = Lifeline(0.0)
    return {
        "cluster": observability_cluster.run(quick),
        "engine": rows,
        "router_us": {
            "request": _us(lambda: _request(counted), 1000),
            "token": _us(lambda: life.tokens(1, 1.0), 20_000),
            "token, intervals not counted": _us(lambda: bare.tokens(1, 1.0), 20_000),
            "scrape": _us(lambda: exposition(metrics), 20),
        },
    }
