"""Compares int8 with the dtype it was quantized from, in one run: tokens/s, logits, greedy tokens, right answers.

The reference is float32. Errors are those of logits under teacher forcing: every model gets the tokens that float32
chose.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.types import SamplingParams, SequenceSpec
from bench import model as bench_model
from bench.engine import BATCHES, PREFILL_TOKENS, Ours, prompts_of
from bench.measure import BandwidthProbe, ratio
from demo import MODEL_DIR
from demo.evaluate import evaluate, held_out
from demo.tasks import Task
from engine.config import EngineConfig
from engine.runner import Runner
from engine.step import Piece, Sequence, StepPlan
from loadgen.samples import Samples

_NUM_TOKENS = 64
_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens/s are medians."""

    what: str
    ratio: float
    int8_tokens_s: float
    plain_tokens_s: float
    read_gb_s: float
    spread: float
    samples_int8: tuple[float, ...]
    samples_plain: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Error:
    """Errors against float32 of the same weights, with the deviation of the logits themselves."""

    model: str
    runs_as: str
    # Share of the generated tokens up to the first that differs.
    same_tokens: float
    # Share of the steps, given the same tokens before.
    same_argmax: float
    mean_error: float
    max_error: float
    logits_deviation: float
    kl: float


def _speed(ours: dict[str, Ours], probe: BandwidthProbe, repeats: int, quick: bool) -> list[Speed]:
    rows = []
    for n in PREFILL_TOKENS[:1] if quick else PREFILL_TOKENS:
        timed: dict[str, Callable[[], float]] = {name: partial(one.prefill_s, n) for name, one in ours.items()}
        rows.append(_row(f"prefill {n}", n, timed, probe, repeats))
    for batch in BATCHES[:2] if quick else BATCHES:
        timed = {name: one.ready_to_decode(batch) for name, one in ours.items()}
        rows.append(_row(f"decode batch {batch}", batch, timed, probe, repeats))
    return rows


def _row(
    what: str, num_tokens: int, timed: dict[str, Callable[[], float]], probe: BandwidthProbe, repeats: int
) -> Speed:
    samples: dict[str, list[float]] = {name: [] for name in timed}
    bandwidths = []
    for i in range(repeats + 1):  # the first round is a warm-up
        found = {name: take() for name, take in timed.items()}
        if i:
            bandwidths.append(probe.read_gb_s())
            for name, seconds in found.items():
                samples[name].append(seconds)
    int8_s, plain_s = Samples.of(samples["int8"]), Samples.of(samples["plain"])
    print(f"  {what}: {ratio(plain_s, int8_s):.2f} times {_DTYPE}", flush=True)
    return Speed(
        what=what,
        ratio=ratio(plain_s, int8_s),
        int8_tokens_s=num_tokens / int8_s.median,
        plain_tokens_s=num_tokens / plain_s.median,
        read_gb_s=Samples.of(bandwidths).median,
        spread=int8_s.spread,
        samples_int8=tuple(num_tokens / s for s in int8_s.values),
        samples_plain=tuple(num_tokens / s for s in plain_s.values),
    )


class Greedy:
    """A runner without the scheduler, all prompts in one batch."""

    def __init__(self, folder: Path, dtype: str, quantization: str) -> None:
        self.runner = Runner.load(folder, EngineConfig(dtype=dtype, quantization=quantization, kv_bytes=512 << 20))

    def generate(
        self, prompts: Seq[Seq[int]], num_tokens: int, forced: Seq[Seq[int]] | None = None
    ) -> tuple[list[list[int]], Tensor]:
        """Greedy tokens, or the given ones, and the logits of each: [prompts, num_tokens, vocabulary]."""
        sequences, next_block = [], 0
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, seed=0)
        for i, prompt in enumerate(prompts):
            sequence = Sequence(SequenceSpec(f"bench/{i}/0", tuple(prompt), sampling))
            num_blocks = self.runner.layout.blocks_for(len(prompt) + num_tokens)
            sequence.block_ids = list(range(next_block, next_block + num_blocks))
            next_block += num_blocks
            sequences.append(sequence)
        logits = []
        for step in range(num_tokens):
            pieces = [Piece(s, s.num_computed, len(s.token_ids) - s.num_computed, samples=True) for s in sequences]
            launched = self.runner.launch(StepPlan(tuple(pieces)))
            logits.append(launched.logits.clone())
            sampled = launched.result().sampled
            for i, s in enumerate(sequences):
                s.num_computed = len(s.token_ids)
                s.token_ids.append(sampled[s.sequence_id].token_ids[0] if forced is None else forced[i][step])
        for s in sequences:
            self.runner.forget(s.sequence_id)
        return [s.token_ids[-num_tokens:] for s in sequences], torch.stack(logits, dim=1)


def _errors(name: str, folder: Path, prompts: Seq[Seq[int]]) -> list[Error]:
    tokens, expected = Greedy(folder, "float32", "none").generate(prompts, _NUM_TOKENS)
    rows = []
    for quantization in ("none", "int8"):
        one = Greedy(folder, _DTYPE, quantization)
        own, _ = one.generate(prompts, _NUM_TOKENS)
        _, logits = one.generate(prompts, _NUM_TOKENS, tokens)
        error, truth = (logits - expected).abs(), expected.log_softmax(-1)
        rows.append(
            Error(
                model=name,
                runs_as=_DTYPE if quantization == "none" else quantization,
                same_tokens=sum(map(_num_same, own, tokens)) / (len(prompts) * _NUM_TOKENS),
                same_argmax=(logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
                mean_error=error.mean().item(),
                max_error=error.max().item(),
                logits_deviation=expected.std().item(),
                kl=(truth.exp() * (truth - logits.log_softmax(-1))).sum(-1).mean().item(),
            )
        )
    return rows


def _num_same(tokens: list[int], others: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))


def _answers(count: int) -> list[dict[str, Any]]:
    """Share of right answers of the demo model, by kind."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    rows = []
    for dtype, quantization in (("float32", "none"), (_DTYPE, "none"), (_DTYPE, "int8")):
        one = Greedy(Path(MODEL_DIR), dtype, quantization)

        def answer(task: Task, one: Greedy = one) -> str:
            [tokens], _ = one.generate([prompt_ids(tokenizer, task)], task.num_output_tokens)
            end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
            return str(tokenizer.decode(tokens[:end], skip_special_tokens=True))

        shares = evaluate(answer, held_out(count))
        rows.append({"runs as": dtype if quantization == "none" else quantization, **shares})
    return rows


def prompt_ids(tokenizer: Any, task: Task) -> list[int]:
    text = task.prompt
    if task.kind == "chat":
        messages = [{"role": "user", "content": task.prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def run(quick: bool) -> dict[str, Any]:
    """Speed, errors and answers. ``quick`` uses fewer sizes, repeats and prompts."""
    from transformers import AutoTokenizer

    folder, repeats = bench_model.bench_model(), 3 if quick else 5
    ours = {"int8": Ours(folder, _DTYPE, "int8"), "plain": Ours(folder, _DTYPE)}
    kernels = ours["int8"].runner.kernels
    speed = _speed(ours, BandwidthProbe(), repeats, quick)
    del ours
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    texts = [prompt_ids(tokenizer, task) for task in held_out(1 if quick else 4)]
    errors = [
        *_errors("demo", Path(MODEL_DIR), texts),
        *_errors(bench_model.NAME, folder, prompts_of(4 if quick else 8, 64)),
    ]
    answers = _answers(5 if quick else 60)
    return {
        "dtype": _DTYPE,
        "kernels": kernels,
        "speed": [asdict(row) for row in speed],
        "errors": [asdict(row) for row in errors],
        "right answers": answers,
    }
