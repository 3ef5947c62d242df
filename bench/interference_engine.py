"""The part of `bench.interference` that needs no quiet machine: one replica of the bench model with one thread, timed
by the processor time of this process.

The work is fixed: eight streams that have begun generate so many tokens each while prompts arrive, and what a target
for gaps costs is how much longer all of it takes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from typing import Any

from baton.types import SamplingParams, SequenceSpec
from bench import model as bench_model
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.events import EngineEvent, Output
from engine.replica import Replica
from engine.runner import Runner
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from loadgen.samples import Samples

_NUM_BLOCKS = 300
_POLL_S = 0.01
_STOP_S = 60.0


class ProcessorClock:
    """Stands still while the process waits for a processor."""

    def now(self) -> float:
        return time.process_time()


@dataclass(frozen=True, slots=True)
class Work:
    num_streams: int
    stream_prompt_tokens: int
    stream_tokens: int
    num_prompts: int
    prompt_tokens: int
    answer_tokens: int
    period_s: float


@dataclass(slots=True)
class Inbox:
    """When tokens came; written by the engine thread."""

    stamps_s: dict[str, list[float]] = field(default_factory=dict)
    num_ended: int = 0

    def listen(self, events: list[EngineEvent]) -> None:
        now = time.process_time()
        for event in events:
            assert isinstance(event, Output), event
            self.stamps_s.setdefault(event.sequence_id, []).append(now)
            self.num_ended += event.chunk.finish_reason is not None


def _spec(name: str, rng: Random, num_prompt: int, num_tokens: int) -> SequenceSpec:
    token_ids = tuple(rng.randrange(1, bench_model.VOCAB_SIZE) for _ in range(num_prompt))
    return SequenceSpec(name, token_ids, SamplingParams(temperature=0.0, seed=0, max_tokens=num_tokens))


def _measure_one(runner: Runner, work: Work, target_ms: int | None) -> dict[str, Any]:
    limits = SchedulerConfig(tbt_target_s=None if target_ms is None else target_ms / 1e3, has_prefix_cache=False)
    limits = replace(limits, block_tokens=runner.layout.block_tokens, max_model_tokens=bench_model.MAX_MODEL_TOKENS)
    scheduler = Scheduler(limits, BlockPool(_NUM_BLOCKS))
    replica = Replica(runner, scheduler, num_layers=runner.layout.num_layers, clock=ProcessorClock())
    rng, inbox = Random(0), Inbox()
    arrived_s: list[float] = []
    replica.start()
    try:
        for i in range(work.num_streams):
            spec = _spec(f"stream-{i}", rng, work.stream_prompt_tokens, work.stream_tokens)
            replica.submit(spec, hands_off=False, listener=inbox.listen)
        while len(inbox.stamps_s) < work.num_streams:
            time.sleep(_POLL_S)
        began_s = time.process_time()
        while inbox.num_ended < work.num_streams + work.num_prompts:
            num, now = len(arrived_s), time.process_time()
            if num < work.num_prompts and now >= began_s + num * work.period_s:
                arrived_s.append(now)
                spec = _spec(f"prompt-{num}", rng, work.prompt_tokens, work.answer_tokens)
                replica.submit(spec, hands_off=False, listener=inbox.listen)
            time.sleep(_POLL_S)
        taken_s = max(stamps[-1] for stamps in inbox.stamps_s.values()) - began_s
    finally:
        replica.stop(_STOP_S)
    gaps = [b - a for name, stamps in inbox.stamps_s.items() if "stream" in name for a, b in pairwise(stamps)]
    ttft = [inbox.stamps_s[f"prompt-{i}"][0] - at for i, at in enumerate(arrived_s)]
    return _row(target_ms, Samples.of(gaps), Samples.of(ttft), taken_s)


def _row(target_ms: int | None, gaps: Samples, ttft: Samples, taken_s: float) -> dict[str, Any]:
    p99_ms = gaps.percentile(0.99) * 1e3
    return {
        "target_ms": target_ms,
        "gap_p50_ms": gaps.median * 1e3,
        "gap_p99_ms": p99_ms,
        "gap_max_ms": max(gaps.values) * 1e3,
        "p99_over_target": None if target_ms is None else p99_ms / target_ms,
        "ttft_p50_s": ttft.median,
        "ttft_max_s": max(ttft.values),
        "all_work_s": taken_s,
    }


def measure(work: Work, targets_ms: Sequence[int | None]) -> list[dict[str, Any]]:
    runner = Runner.load(bench_model.bench_model(), EngineConfig(num_blocks=_NUM_BLOCKS, num_threads=1))
    return [_measure_one(runner, work, target_ms) for target_ms in targets_ms]
