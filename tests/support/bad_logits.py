"""A model in which one token's embedding is NaN, and what an engine makes of sequences that meet it."""

from __future__ import annotations

import queue
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from baton.clock import MonotonicClock
from baton.types import SequenceSpec
from engine.blocks import BlockPool
from engine.events import EngineEvent, Failed, Output
from engine.replica import Replica, RunnerLike
from engine.runner import Runner
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from tests.support.engine_driver import random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE

BLOCK_TOKENS = 16
NUM_BLOCKS = 24
CASE = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32")

# Tokens by sequence, and the code of the error it ended with.
Outcome = dict[str, tuple[list[int], str]]


def specs() -> list[SequenceSpec]:
    """Greedy, seeded and with all that changes or reports logits, ten tokens each."""
    kinds: dict[str, dict[str, object]] = {
        "greedy": {},
        "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9},
        "changed": {"repetition_penalty": 1.3, "logprobs": 2, "logit_bias": {3: -100.0}},
        "other": {},
        "other-seeded": {"temperature": 0.8, "seed": 9, "top_k": 20},
    }
    return [
        spec(name, random_prompt(9 + 10 * i, VOCAB_SIZE, i), max_tokens=10, **kind)
        for i, (name, kind) in enumerate(kinds.items())
    ]


def spoil(folder: Path, token_id: int) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token_id] = torch.nan
    save_file(weights, folder / "model.safetensors")


def serve(runner: Runner, engine_runner: RunnerLike, sequences: list[SequenceSpec]) -> Outcome:
    """All at once, in one engine, to their ends; every block is back afterwards."""
    pool = BlockPool(runner.layout.num_blocks)
    limits = SchedulerConfig(block_tokens=BLOCK_TOKENS, max_model_tokens=200, max_batch_tokens=64, max_num_seqs=8)
    engine = Replica(
        engine_runner, Scheduler(limits, pool), num_layers=runner.layout.num_layers, clock=MonotonicClock()
    )
    heard: queue.Queue[EngineEvent] = queue.Queue()

    def listen(events: list[EngineEvent]) -> None:
        for event in events:
            heard.put(event)

    outcome: Outcome = {s.sequence_id: ([], "") for s in sequences}
    engine.start()
    try:
        for one in sequences:
            engine.submit(one, hands_off=False, listener=listen)
        num_open = len(sequences)
        while num_open:
            event = heard.get(timeout=60)
            tokens, _ = outcome[event.sequence_id]
            if isinstance(event, Output):
                tokens += event.chunk.token_ids
                num_open -= event.chunk.finish_reason is not None
            elif isinstance(event, Failed):
                outcome[event.sequence_id] = (tokens, event.failure.code)
                num_open -= 1
        engine.check()
        assert engine.stats().num_failed_steps == 0
    finally:
        assert engine.stop(30)
    assert pool.num_free == pool.num_blocks
    return outcome


def expected(clean: Outcome, sequences: list[SequenceSpec], token_id: int) -> Outcome:
    """What is left of ``clean`` when ``token_id`` has a NaN embedding: all up to that token, and with it."""
    found: Outcome = {}
    for one in sequences:
        tokens, _ = clean[one.sequence_id]
        if token_id in one.prompt_token_ids:
            found[one.sequence_id] = ([], "BadLogits")
        elif token_id in tokens[:-1]:
            found[one.sequence_id] = (tokens[: tokens.index(token_id) + 1], "BadLogits")
        else:
            found[one.sequence_id] = (tokens, "")
    return found


def token_to_spoil(clean: Outcome, sequences: list[SequenceSpec], victim: str) -> int:
    """One that ``victim`` generates on its way, and the fewest others meet."""
    tokens, _ = clean[f"{victim}/0/0"]

    def num_hit(token_id: int) -> int:
        return sum(code != "" for _, code in expected(clean, sequences, token_id).values())

    return min(tokens[2:-2], key=num_hit)
