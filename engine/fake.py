"""A runner without a model, for tests of everything around it. Deterministic, and true to the KV it is given.

It writes token ids into the KV blocks, layer by layer, and draws the next token from a digest of what it reads back:
a lost, stale or misplaced block changes the output, just as it would with a real model.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Sequence

from baton.types import KvLayout, ModelDescription, PositionLogprobs, SamplingParams, SequenceSpec, TokenLogprob
from engine.step import Piece, Sampled, StepPlan, StepResult

_CELL_BYTES = 4


class FakeRunner:
    """Implements RunnerLike over a buffer of ``layout.total_bytes``; ``step_delay_s`` is spent in every step."""

    device = "cpu"
    kernels = "fake"
    # What a step costs is not known.
    cost = None

    def __init__(
        self,
        layout: KvLayout,
        *,
        buffer: memoryview | None = None,
        vocab_size: int = 32000,
        max_model_tokens: int = 4096,
        step_delay_s: float = 0.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        assert layout.block_bytes >= layout.block_tokens * _CELL_BYTES, "a block must hold its token ids"
        self.layout = layout
        self.vocab_size = vocab_size
        self.description = ModelDescription("fake", "fake", layout.dtype, max_model_tokens, vocab_size)
        self.step_delay_s = step_delay_s
        self._pause = pause
        self._cells = (memoryview(bytearray(layout.total_bytes)) if buffer is None else buffer).cast("B").cast("I")
        self.forgotten: list[str] = []
        self.num_steps = 0
        # Raised by the next step, once.
        self.next_error: Exception | None = None

    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        error, self.next_error = self.next_error, None
        if error is not None:
            raise error
        self.num_steps += 1
        for layer in range(self.layout.num_layers):
            if self.step_delay_s:
                self._pause(self.step_delay_s / self.layout.num_layers)
            for piece in plan.pieces:
                self._write(layer, piece)
            if on_layer is not None:
                on_layer(layer)
        return StepResult({p.sequence.sequence_id: self._draw(p) for p in plan.pieces if p.samples})

    def forget(self, sequence_id: str) -> None:
        self.forgotten.append(sequence_id)

    def close(self) -> None:
        """Let go of the buffer."""
        self._cells.release()

    def _runs(self, layer: int, block_ids: Sequence[int], start: int, stop: int) -> list[tuple[int, int, int]]:
        """(position, first cell, number of cells) of every run of positions [start, stop) inside one block."""
        size = self.layout.block_tokens
        runs = []
        while start < stop:
            count = min(stop, (start // size + 1) * size) - start
            cell = self.layout.offset(layer, block_ids[start // size]) // _CELL_BYTES + start % size
            runs.append((start, cell, count))
            start += count
        return runs

    def _write(self, layer: int, piece: Piece) -> None:
        seq = piece.sequence
        for position, cell, count in self._runs(layer, seq.block_ids, piece.start, piece.start + piece.num_tokens):
            # Layers differ, so that swapped layers show as well; 0 stays the mark of a block never written.
            values = (token + 1 + layer for token in seq.token_ids[position : position + count])
            self._cells[cell : cell + count] = memoryview(array("I", values))

    def _draw(self, piece: Piece) -> Sampled:
        seq, stop = piece.sequence, piece.start + piece.num_tokens
        digest = hashlib.blake2b(digest_size=8)
        for layer in range(self.layout.num_layers):
            for _, cell, count in self._runs(layer, seq.block_ids, 0, stop):
                digest.update(self._cells[cell : cell + count])
        return _sample(digest, seq.spec.sampling, stop, seq.num_generated, self.vocab_size)


def expected_tokens(spec: SequenceSpec, layout: KvLayout, vocab_size: int = 32000) -> list[int]:
    """What a FakeRunner generates for ``spec``, from the spec alone: the oracle of every test that uses one."""
    known = [*spec.prompt_token_ids, *spec.generated_token_ids]
    num_prompt = len(spec.prompt_token_ids)
    assert spec.sampling.max_tokens is not None
    while len(known) - num_prompt < spec.sampling.max_tokens:
        digest = hashlib.blake2b(digest_size=8)
        for layer in range(layout.num_layers):
            digest.update(array("I", (token + 1 + layer for token in known)))
        num_generated = len(known) - num_prompt
        known.append(_sample(digest, spec.sampling, len(known), num_generated, vocab_size).token_id)
        if known[-1] in spec.sampling.stop_token_ids and num_generated >= spec.sampling.min_tokens:
            break
    return known[num_prompt:]


def _sample(
    digest: hashlib.blake2b, sampling: SamplingParams, position: int, num_generated: int, vocab_size: int
) -> Sampled:
    """A pure function of the tokens so far (in ``digest``), the seed and the position."""
    if not sampling.is_greedy:
        digest.update(f"{sampling.seed}/{position}".encode())
    raw = int.from_bytes(digest.digest(), "little")
    token = raw % vocab_size
    while num_generated < sampling.min_tokens and token in sampling.stop_token_ids:
        token = (token + 1) % vocab_size
    if sampling.logprobs is None:
        return Sampled(token)
    top = tuple(TokenLogprob((token + i) % vocab_size, -0.5 - i) for i in range(sampling.logprobs))
    return Sampled(token, PositionLogprobs(TokenLogprob(token, -0.5), 1, top))
