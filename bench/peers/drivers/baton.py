"""Driver of Baton: scheduler and runner combined as in the engine thread, without overlap."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from baton.types import SamplingParams, SequenceSpec
from bench.peers.drivers.protocol import MAX_BATCH_TOKENS, MAX_MODEL_TOKENS, MAX_SEQUENCES, Start, serve
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.events import EngineEvent, Output
from engine.runner import Runner
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig


class Baton:
    def __init__(self, start: Start) -> None:
        config = EngineConfig(
            dtype="bfloat16",
            num_threads=start.num_threads,
            scheduler=SchedulerConfig(max_batch_tokens=MAX_BATCH_TOKENS, max_num_seqs=MAX_SEQUENCES),
            num_blocks=-(-start.kv_tokens // EngineConfig().block_tokens),
        )
        self._runner = Runner.load(Path(start.model), config)
        if self._runner.overlaps:
            raise RuntimeError(
                f"{self._runner.device}: steps overlap there, expected a CPU: this driver takes each alone"
            )
        assert config.num_blocks is not None
        self._scheduler = Scheduler(
            replace(config.scheduler, block_tokens=config.block_tokens, max_model_tokens=MAX_MODEL_TOKENS),
            BlockPool(config.num_blocks),
        )
        self._num_added = 0
        self._live: list[str] = []
        self.settings = {
            "kernels": self._runner.kernels,
            "dtype": config.dtype,
            "threads": start.num_threads,
            "block_tokens": config.block_tokens,
            "max_batch_tokens": MAX_BATCH_TOKENS,
        }

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        self._num_added += 1
        name = f"peers/{self._num_added}/0"
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=0, ignore_eos=True)
        self._scheduler.add(SequenceSpec(name, tuple(prompt), sampling), hands_off=False, now=time.monotonic())
        return name

    def _step(self) -> list[EngineEvent]:
        plan, events = self._scheduler.schedule(time.monotonic())
        if plan is None:
            raise RuntimeError("nothing to compute")
        events += self._scheduler.apply(plan, self._runner.execute(plan), time.monotonic())
        for name in self._scheduler.take_gone():
            self._runner.forget(name)
        return events

    def prefill(self, prompt: list[int]) -> tuple[float, int]:
        started = time.perf_counter()
        self._add(prompt, 1)
        while not (tokens := _tokens(self._step())):
            pass
        return time.perf_counter() - started, tokens[0]

    def fill(self, prompts: list[list[int]]) -> None:
        self._live = [self._add(prompt, MAX_MODEL_TOKENS - len(prompt)) for prompt in prompts]
        begun: set[str] = set()
        while len(begun) < len(prompts):
            begun |= {event.sequence_id for event in self._step() if isinstance(event, Output)}

    def decode(self, num_steps: int) -> tuple[float, int]:
        started = time.perf_counter()
        tokens = sum(len(_tokens(self._step())) for _ in range(num_steps))
        return time.perf_counter() - started, tokens

    def clear(self) -> None:
        for name in self._live:
            self._scheduler.cancel(name, time.monotonic())
        for name in self._scheduler.take_gone():
            self._runner.forget(name)
        self._live = []


def _tokens(events: list[EngineEvent]) -> list[int]:
    failed = [event for event in events if not isinstance(event, Output)]
    if failed:
        raise RuntimeError(f"the step failed: {failed[0]}")
    return [token for event in events if isinstance(event, Output) for token in event.chunk.token_ids]


if __name__ == "__main__":
    serve(Baton, ("baton-serve", "torch", "llvmlite"))
