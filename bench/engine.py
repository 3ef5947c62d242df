"""Compares the CPU engine with transformers: prefill and decode tokens/s of the bench model, interleaved in one run.

Both decode from a prepared KV cache of about 512 tokens a sequence; the step that fills the cache is not timed. For
transformers it is ``generate`` (greedy), timed from the first token to the last; for Baton it is the runner with greedy
sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from baton.types import DTYPE_BYTES, SamplingParams, SequenceSpec
from bench import model as bench_model
from bench.measure import BandwidthProbe, ratio
from engine.config import EngineConfig
from engine.runner import Runner
from engine.step import Piece, Sequence, StepPlan
from loadgen.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT_TOKENS = 512
PREFILL_TOKENS = (512, 2048)
BATCHES = (1, 8, 32)
_DECODE_STEPS = {1: 32, 8: 16, 32: 12}
_MAX_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Tokens/s are medians; ``floor_share`` is Baton / the rate that the bandwidth allows."""

    what: str
    ratio: float
    baton_tokens_s: float
    transformers_tokens_s: float
    baton_ms: float
    floor_share: float | None
    read_gb_s: float
    spread: float
    samples_baton: tuple[float, ...]
    samples_transformers: tuple[float, ...]


def prompts_of(count: int, num_tokens: int) -> list[tuple[int, ...]]:
    rng = Random(f"{count}/{num_tokens}")
    return [tuple(rng.randrange(1, bench_model.VOCAB_SIZE) for _ in range(num_tokens)) for _ in range(count)]


class Ours:
    """Baton's runner without the scheduler: blocks are assigned once, steps are planned as the scheduler would."""

    def __init__(self, folder: Path, dtype: str, quantization: str = "none") -> None:
        block_tokens = EngineConfig().block_tokens
        self._blocks_each = -(-max(max(PREFILL_TOKENS), CONTEXT_TOKENS + 128) // block_tokens)
        num_blocks = max(BATCHES) * -(-(CONTEXT_TOKENS + 128) // block_tokens) + self._blocks_each
        config = EngineConfig(dtype=dtype, quantization=quantization, num_blocks=num_blocks)
        self.runner = Runner.load(folder, config)

    def _sequences(self, prompts: list[tuple[int, ...]], extra_tokens: int) -> list[Sequence]:
        sampling = SamplingParams(temperature=0.0, max_tokens=4096, seed=0)
        made, next_block = [], 0
        for i, prompt in enumerate(prompts):
            sequence = Sequence(SequenceSpec(f"bench/{i}/0", prompt, sampling))
            num_blocks = self.runner.layout.blocks_for(len(prompt) + extra_tokens)
            sequence.block_ids = list(range(next_block, next_block + num_blocks))
            next_block += num_blocks
            made.append(sequence)
        return made

    def _step(self, sequences: list[Sequence]) -> None:
        pieces = tuple(Piece(s, s.num_computed, len(s.token_ids) - s.num_computed, samples=True) for s in sequences)
        result = self.runner.execute(StepPlan(pieces))
        for sequence in sequences:
            sequence.num_computed = len(sequence.token_ids)
            sequence.token_ids += result.sampled[sequence.sequence_id].token_ids

    def prefill_s(self, num_tokens: int) -> float:
        sequences = self._sequences(prompts_of(1, num_tokens), 1)
        started = time.perf_counter()
        self._step(sequences)
        taken = time.perf_counter() - started
        self.runner.forget(sequences[0].sequence_id)
        return taken

    def ready_to_decode(self, batch: int) -> Callable[[], float]:
        """Fills the cache. The function that it returns runs the steps from that cache and returns seconds a step."""
        num_steps = _DECODE_STEPS[batch]
        sequences = self._sequences(prompts_of(batch, CONTEXT_TOKENS), num_steps + 1)
        at_once = _MAX_BATCH_TOKENS // CONTEXT_TOKENS
        for i in range(0, batch, at_once):
            self._step(sequences[i : i + at_once])

        def decode() -> float:
            for sequence in sequences:
                del sequence.token_ids[CONTEXT_TOKENS + 1 :]
                sequence.num_computed = CONTEXT_TOKENS
            started = time.perf_counter()
            for _ in range(num_steps):
                self._step(sequences)
            return (time.perf_counter() - started) / num_steps

        return decode


class Theirs:
    """transformers, with its own dynamic cache and default attention (SDPA)."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    def prefill_s(self, num_tokens: int) -> float:
        token_ids = self._torch.tensor(prompts_of(1, num_tokens))
        with self._torch.inference_mode():
            started = time.perf_counter()
            self._model(input_ids=token_ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            return time.perf_counter() - started

    def ready_to_decode(self, batch: int) -> Callable[[], float]:
        """As in `Ours`. ``generate`` starts with all but the prompt's last token in the cache, so each stamp is one
        step."""
        from transformers import DynamicCache

        num_steps = _DECODE_STEPS[batch]
        token_ids = self._torch.tensor(prompts_of(batch, CONTEXT_TOKENS))
        cache = DynamicCache(config=self._model.config)
        with self._torch.inference_mode():
            self._model(input_ids=token_ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        mask = self._torch.ones_like(token_ids)
        never = self._torch.zeros(batch, dtype=self._torch.bool)

        def decode() -> float:
            stamps: list[float] = []

            def stamp(token_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
                stamps.append(time.perf_counter())
                return never

            self._model.generate(
                token_ids,
                attention_mask=mask,
                past_key_values=deepcopy(cache),
                do_sample=False,
                min_new_tokens=num_steps + 1,
                max_new_tokens=num_steps + 1,
                stopping_criteria=[stamp],
            )
            return (stamps[-1] - stamps[0]) / (len(stamps) - 1)

        return decode


def _row(
    what: str, num_tokens: int, ours: Callable[[], float], theirs: Callable[[], float],
    probe: BandwidthProbe, repeats: int, step_bytes: int | None,
) -> Row:  # fmt: skip
    """Interleaves both, with a bandwidth probe beside each sample. The first round is a warm-up."""
    baton_s, transformers_s, bandwidths = [], [], []
    for i in range(repeats + 1):
        before = probe.read_gb_s()
        mine, other = ours(), theirs()
        if i:
            baton_s.append(mine)
            transformers_s.append(other)
            bandwidths.append((before + probe.read_gb_s()) / 2)
    bandwidth = Samples.of(bandwidths).median
    mine_s = Samples.of(baton_s)
    times = ratio(Samples.of(transformers_s), mine_s)
    print(f"  {what}: {times:.2f} times transformers", flush=True)
    return Row(
        what=what,
        ratio=times,
        baton_tokens_s=num_tokens / mine_s.median,
        transformers_tokens_s=num_tokens / Samples.of(transformers_s).median,
        baton_ms=mine_s.median * 1e3,
        floor_share=None if step_bytes is None else step_bytes / (bandwidth * 1e9) / mine_s.median,
        read_gb_s=bandwidth,
        spread=mine_s.spread,
        samples_baton=tuple(num_tokens / s for s in baton_s),
        samples_transformers=tuple(num_tokens / s for s in transformers_s),
    )


def run(quick: bool, dtype: str = "bfloat16") -> dict[str, Any]:
    """Rows of prefill and decode. ``quick`` runs one length, two batches and fewer repeats."""
    folder = bench_model.bench_model()
    ours, theirs, probe = Ours(folder, dtype), Theirs(folder, dtype), BandwidthProbe()
    repeats = 3 if quick else 5
    rows: list[Row] = []
    for n in PREFILL_TOKENS[:1] if quick else PREFILL_TOKENS:
        rows.append(
            _row(f"prefill {n}", n, partial(ours.prefill_s, n), partial(theirs.prefill_s, n), probe, repeats, None)
        )
    for batch in BATCHES[:2] if quick else BATCHES:
        kv_bytes = batch * CONTEXT_TOKENS * bench_model.kv_bytes_per_token(DTYPE_BYTES[dtype])
        step_bytes = bench_model.NUM_STEP_PARAMETERS * DTYPE_BYTES[dtype] + kv_bytes
        mine, other = ours.ready_to_decode(batch), theirs.ready_to_decode(batch)
        rows.append(_row(f"decode batch {batch}", batch, mine, other, probe, repeats, step_bytes))
    return {
        "dtype": dtype,
        "model": bench_model.NAME,
        "context_tokens": CONTEXT_TOKENS,
        "kernels": ours.runner.kernels,
        "rows": [asdict(row) for row in rows],
    }
