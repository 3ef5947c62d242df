"""What masks of grammars cost at a real vocabulary: a batch of 32 sequences with one, beside the same without.

The tokenizer is byte-level BPE with 151,643 tokens, made of syllables, digits and the marks of JSON by a seeded draw.
Each step asks for the masks of all sequences, as a node does before it launches one, whether a sequence is over,
and draws from random logits, on the host. Beside it is a decode step of the bench model (0.25 B, 32,000 tokens), whose
own head is a fifth as large: shares of a step are those of a model whose step takes as long.

    python -m bench masks
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from baton.types import SamplingParams, SequenceSpec
from bench import model as bench_model
from engine.config import EngineConfig
from engine.grammars import Grammars, load_tokenizer
from engine.runner import Runner
from engine.sampler import Sampler
from engine.step import Piece, Sequence, StepPlan
from router.grammar import grammars

# Of Qwen's tokenizer, and of its models.
NUM_TOKENS = 151_643
VOCAB_SIZE = 151_936
BATCH = 32
_PROMPT_TOKENS = 64
_LIMIT_S = 60.0
_MARKS = ('"', '",', '":', '"}', '{"', '["', '"]', "},", "],", "[]", "{}", '":"', '","', " {", " [", ' "', ", ", ": ")
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        **{f"field_{n}": {"type": "string"} for n in range(8)},
        "numbers": {"type": "array", "items": {"type": "number"}},
    },
    "required": [*(f"field_{n}" for n in range(8)), "numbers"],
    "additionalProperties": False,
}


def run(quick: bool) -> dict[str, Any]:
    """Quick: a tenth of the steps."""
    num_steps = 20 if quick else 200
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        write_tokenizer(file, NUM_TOKENS)
        begun_s = time.perf_counter()
        tokenizer = load_tokenizer(file, VOCAB_SIZE)
        load_s = time.perf_counter() - begun_s
    step_ms = decode_step_ms(5 if quick else 20)
    made = _Masked(tokenizer, [tokenizer.tokenize_str(mark)[0] for mark in ('"', "}", "]")])
    rows = [made.row(way, num_steps, step_ms) for way in ("greedy", "sampled")]
    made.close()
    return {
        "vocabulary": VOCAB_SIZE, "batch": BATCH, "threads": os.cpu_count(), "tokenizer_s": round(load_s, 2),
        "decode_step_ms": round(step_ms, 1), "steps": rows,
    }  # fmt: skip


def write_tokenizer(file: Path, num_tokens: int) -> None:
    """The same file for the same number. Each token but the bytes is one before it and one more byte."""
    rng = random.Random(num_tokens)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "\u0120"
    tokens = dict.fromkeys(alphabet)
    merges: list[tuple[str, str]] = []

    def add(text: str) -> None:
        for end in range(2, len(text) + 1):
            if text[:end] not in tokens and len(tokens) < num_tokens:
                tokens[text[:end]] = None
                merges.append((text[: end - 1], text[end - 1]))

    for mark in _MARKS:
        add(mark.replace(" ", space))
    for digits in range(1000):
        add(f"{digits:03}")
    bytes_ = [letter for letter in alphabet if not letter.isascii()]
    while len(tokens) < num_tokens:
        word = "".join(rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiouy") for _ in range(rng.randint(1, 4)))
        # Names, words in a sentence, words of other scripts, and code.
        form = rng.random()
        add(
            space + word if form < 0.5
            else word.title() if form < 0.7
            else word if form < 0.85
            else "".join(rng.choice(bytes_) for _ in range(rng.randint(2, 6))) if form < 0.95
            else f"_{word}("
        )  # fmt: skip
    vocab = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(file))


def decode_step_ms(num_steps: int) -> float:
    """Of the bench model, 32 sequences of 64 tokens and more."""
    runner = Runner.load(bench_model.bench_model(), EngineConfig(num_blocks=512))
    sequences = []
    num_blocks = runner.layout.blocks_for(_PROMPT_TOKENS + num_steps + 4)
    for number in range(BATCH):
        prompt = tuple(range(1 + number, 1 + number + _PROMPT_TOKENS))
        sequence = Sequence(
            SequenceSpec(f"step/{number}/0", prompt, SamplingParams(temperature=0.0, seed=0, max_tokens=512))
        )
        sequence.block_ids = list(range(number * num_blocks, (number + 1) * num_blocks))
        sequences.append(sequence)
    taken_s = []
    for _ in range(num_steps + 2):
        pieces = tuple(Piece(s, s.num_computed, len(s.token_ids) - s.num_computed, samples=True) for s in sequences)
        begun_s = time.perf_counter()
        result = runner.execute(StepPlan(pieces))
        taken_s.append(time.perf_counter() - begun_s)
        for sequence in sequences:
            sequence.num_computed = len(sequence.token_ids)
            sequence.token_ids += result.sampled[sequence.sequence_id].token_ids
    # The first computes the prompts, the second is the kernels' first of its shape.
    return 1000 * statistics.median(taken_s[2:])


class _Masked:
    def __init__(self, tokenizer: Any, enders: Seq[int]) -> None:
        self._ready = threading.Semaphore(0)
        self._grammars = Grammars(tokenizer, VOCAB_SIZE, num_threads=os.cpu_count() or 1, on_ready=self._ready.release)
        self._sampler = Sampler(VOCAB_SIZE)
        self._grammar = grammars.of_json_schema(_SCHEMA, param="schema")
        self._logits = torch.randn(BATCH, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
        self._enders = list(enders)
        self._numbers: Iterator[int] = iter(range(1_000_000))

    def row(self, way: str, num_steps: int, step_ms: float) -> dict[str, Any]:
        temperature, bias = (0.0, 4.0) if way == "greedy" else (1.0, 11.0)
        # A part of JSON ends after a few tokens.
        likely = self._logits.clone()
        likely[:, self._enders] += bias
        masked = [self._sequence(temperature, self._grammar) for _ in range(BATCH)]
        plain = [self._sequence(temperature, "") for _ in range(BATCH)]
        made: list[float] = []
        over: list[float] = []
        with_mask: list[float] = []
        without: list[float] = []
        for step in range(num_steps):
            # Another row for each sequence at each step.
            logits = likely.roll(step * 17, dims=0)
            pieces = tuple(Piece(s, len(s.token_ids) - 1, 1, samples=True) for s in masked)
            stamps = [time.perf_counter()]
            self._grammars.prepare(StepPlan(pieces))
            stamps.append(time.perf_counter())
            drawn = self._sampler.sample(logits, masked)
            stamps.append(time.perf_counter())
            for sequence in masked:
                sequence.token_ids += drawn.sampled[sequence.sequence_id].token_ids
            ended = [i for i, s in enumerate(masked) if _has_ended(s)]
            stamps.append(time.perf_counter())
            self._sampler.sample(logits, plain)
            stamps.append(time.perf_counter())
            for samples, (begun_s, ended_s) in zip((made, with_mask, over, without), pairwise(stamps), strict=True):
                samples.append(1000 * (ended_s - begun_s))
            for index in ended:
                masked[index] = self._sequence(temperature, self._grammar)
        more = statistics.median(with_mask) - statistics.median(without)
        cost = statistics.median(made) + statistics.median(over) + more
        return {
            "drawing": way, "steps": num_steps, "masks_ms": round(statistics.median(made), 2),
            "masks_ms_p99": round(sorted(made)[int(0.99 * len(made))], 2),
            "is_over_ms": round(statistics.median(over), 2), "draw_ms": round(statistics.median(with_mask), 2),
            "draw_without_ms": round(statistics.median(without), 2), "cost_ms": round(cost, 2),
            "share_of_step": round(cost / step_ms, 4), "samples_masks_ms": [round(ms, 3) for ms in made],
        }  # fmt: skip

    def close(self) -> None:
        self._grammars.close()

    def _sequence(self, temperature: float, grammar: str) -> Sequence:
        number = next(self._numbers)
        sampling = SamplingParams(
            temperature=temperature, seed=number, max_tokens=4096, grammar=grammar, stop_token_ids=(NUM_TOKENS,)
        )
        spec = SequenceSpec(f"mask/{number}/0", (5, 6, 7), sampling)
        sequence = Sequence(spec)
        if grammar:
            mask = sequence.token_mask = self._grammars.mask(spec)
            while not mask.is_ready:
                if not self._ready.acquire(timeout=_LIMIT_S):
                    raise TimeoutError(f"a grammar is not built after {_LIMIT_S:g} s: {json.dumps(_SCHEMA)}")
        return sequence


def _has_ended(sequence: Sequence) -> bool:
    """As the scheduler finds out: by the stop id, else by the mask."""
    mask = sequence.token_mask
    return sequence.token_ids[-1] == NUM_TOKENS or (mask is not None and mask.is_over(sequence.token_ids))
