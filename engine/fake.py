"""A runner without a model, for tests of everything around it. Deterministic, and dependent on the KV that it reads.

It writes token ids into the KV blocks, layer by layer, and draws the next token from a digest of what it reads back: a
lost, stale or misplaced block changes the output, as with a real model.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from baton.types import (
    KvLayout,
    ModelDescription,
    PositionLogprobs,
    PrefixCaching,
    SamplingParams,
    SequenceSpec,
    TokenChunk,
    TokenLogprob,
)
from engine.step import Piece, StepPlan, StepResult, TokenMask

_CELL_BYTES = 4


@dataclass(frozen=True, slots=True)
class Row:
    """What a device is told of a piece when the step is launched; ``tokens`` leaves out one that it drew itself."""

    sequence_id: str
    sampling: SamplingParams
    num_prompt: int
    start: int
    stop: int
    samples: bool
    tokens: tuple[int, ...]
    block_ids: tuple[int, ...]
    # Positions, and the tokens behind them.
    scored: range = range(0)
    targets: tuple[int, ...] = ()
    # As a TokenMask gives it; None allows all.
    mask: bytes | None = None
    # Why there is no mask, and no token.
    error: Exception | None = None
    is_pooled: bool = False

    @classmethod
    def of(cls, piece: Piece) -> Row:
        seq, mask, error = piece.sequence, None, None
        if piece.samples and seq.token_mask is not None:
            try:
                mask = seq.token_mask.bits(seq.token_ids)
            except Exception as refused:
                error = refused
        return cls(
            seq.sequence_id, seq.spec.sampling, len(seq.spec.prompt_token_ids), piece.start, piece.end, piece.samples,
            tuple(seq.token_ids[piece.start : piece.end]), tuple(seq.block_ids),
            piece.scored, tuple(seq.token_ids[piece.scored.start + 1 : piece.scored.stop + 1]), mask, error,
            seq.pool is not None,
        )  # fmt: skip


class Computed:
    """A step of a FakeRunner; computed already, or when its result is asked for."""

    __slots__ = ("_compute", "_result")

    def __init__(self, compute: Callable[[], StepResult]) -> None:
        self._compute = compute
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            self._result = self._compute()
        return self._result


class FakeRunner:
    """Implements RunnerLike over a buffer of ``layout.total_bytes``; ``step_delay_s`` is spent in every step.

    One that ``overlaps`` is a device with a queue: it is told everything at the launch, computes as late as it may, and
    feeds a token that it drew to the step after.
    """

    device = "cpu"
    kernels = "fake"
    # What a step costs is not known.
    cost = None
    prefix_caching = PrefixCaching(phases_agree=True)

    def __init__(
        self,
        layout: KvLayout,
        *,
        buffer: memoryview | None = None,
        vocab_size: int = 32000,
        max_model_tokens: int = 4096,
        step_delay_s: float = 0.0,
        pause: Callable[[float], None] = time.sleep,
        overlaps: bool = False,
        max_drawn: int = 1,
    ) -> None:
        """``max_drawn``: tokens that a step draws at most for one sequence, where its blocks have room."""
        assert layout.block_bytes >= layout.block_tokens * _CELL_BYTES, "a block must hold its token ids"
        self.layout = layout
        self.vocab_size = vocab_size
        self.description = ModelDescription("fake", "fake", layout.dtype, max_model_tokens, vocab_size)
        self.step_delay_s = step_delay_s
        self._pause = pause
        self._max_drawn = max_drawn
        self._cells = (memoryview(bytearray(layout.total_bytes)) if buffer is None else buffer).cast("B").cast("I")
        self.forgotten: list[str] = []
        # Names of the threads that said they will launch.
        self.entered_by: list[str] = []
        self.overlaps = overlaps
        self.num_steps = 0
        # Of them, launched while another one was under way, and pieces whose token the host did not know.
        self.num_overlapped = 0
        self.num_fed = 0
        self._queue: deque[Computed] = deque()
        # What the newest computed step drew, as far as a device could.
        self._drawn: dict[str, int] = {}
        # Raised by the next launch, once; and by the next step that is computed, where that is later.
        self.next_error: Exception | None = None
        self.late_error: Exception | None = None
        # By sequence, what is returned for it instead of what was drawn.
        self.nonsense: dict[str, TokenChunk] = {}
        self.forget_error: Exception | None = None

    def enter_thread(self) -> None:
        self.entered_by.append(threading.current_thread().name)

    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        return self.launch(plan, on_layer).result()

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> Computed:
        error, self.next_error = self.next_error, None
        if error is not None:
            raise error
        self.num_steps += 1
        rows = [Row.of(p) for p in plan.pieces]
        if not self.overlaps:
            step = Computed(lambda: self._compute(rows, on_layer))
            step.result()
            return step
        assert len(self._queue) < 2, "two steps are under way already"
        self.num_overlapped += len(self._queue)
        self.num_fed += sum(p.token_is_on_device for p in plan.pieces)
        step = Computed(lambda: self._compute_next(rows))
        self._queue.append(step)
        for layer in range(self.layout.num_layers if on_layer is not None else 0):
            assert on_layer is not None
            on_layer(layer)
        return step

    def _compute_next(self, rows: Sequence[Row]) -> StepResult:
        self._queue.popleft()
        result = self._compute(rows, None)
        # Others of the device's steps go on: it has what this one drew.
        late, self.late_error = self.late_error, None
        if late is not None:
            raise late
        return result

    def _compute(self, rows: Sequence[Row], on_layer: Callable[[int], None] | None) -> StepResult:
        before, self._drawn = self._drawn, {}
        tokens = [r.tokens if len(r.tokens) == r.stop - r.start else (before[r.sequence_id],) for r in rows]
        for layer in range(self.layout.num_layers):
            if self.step_delay_s:
                self._pause(self.step_delay_s / self.layout.num_layers)
            for row, values in zip(rows, tokens, strict=True):
                self._write(layer, row, values)
            if on_layer is not None:
                on_layer(layer)
        sampled = {r.sequence_id: self._draw(r) for r in rows if r.samples and r.error is None}
        self._drawn = {sequence_id: chunk.token_ids[0] for sequence_id, chunk in sampled.items()}
        sampled |= {name: given for name, given in self.nonsense.items() if name in sampled}
        failed = {r.sequence_id: r.error for r in rows if r.error is not None}
        scored = {r.sequence_id: self._score(r) for r in rows if r.scored and not r.is_pooled}
        return StepResult(sampled, failed, scored, {r.sequence_id: self._pool(r) for r in rows if r.is_pooled})

    def forget(self, sequence_id: str) -> None:
        self.forgotten.append(sequence_id)
        error, self.forget_error = self.forget_error, None
        if error is not None:
            raise error

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

    def _write(self, layer: int, row: Row, tokens: Sequence[int]) -> None:
        for position, cell, count in self._runs(layer, row.block_ids, row.start, row.stop):
            # Layers differ, so that swapped layers show as well; 0 stays the mark of a block never written.
            first = position - row.start
            values = (token + 1 + layer for token in tokens[first : first + count])
            self._cells[cell : cell + count] = memoryview(array("I", values))

    def _draw(self, row: Row) -> TokenChunk:
        """As many tokens as there may be, and all but the last of them into the blocks."""
        room = len(row.block_ids) * self.layout.block_tokens
        index, drawn = row.stop - row.num_prompt, [self._draw_one(row)]
        # The mask is of the first token.
        most = self._max_drawn if row.mask is None else 1
        while len(drawn) < most and row.stop < room:
            row = replace(row, start=row.stop, stop=row.stop + 1)
            for layer in range(self.layout.num_layers):
                self._write(layer, row, (drawn[-1][0],))
            drawn.append(self._draw_one(row))
        reports = tuple(report for _, report in drawn if report is not None)
        return TokenChunk(row.sequence_id, index, tuple(token_id for token_id, _ in drawn), reports)

    def _draw_one(self, row: Row) -> tuple[int, PositionLogprobs | None]:
        digest = self._digest(row, row.stop)
        return _sample(digest, row.sampling, row.stop, row.stop - row.num_prompt, self.vocab_size, row.mask)

    def _score(self, row: Row) -> tuple[PositionLogprobs, ...]:
        num_top = row.sampling.prompt_logprobs
        assert num_top is not None
        return tuple(
            _scored(self._digest(row, position + 1), token_id, num_top, self.vocab_size)
            for position, token_id in zip(row.scored, row.targets, strict=True)
        )

    def _pool(self, row: Row) -> NDArray[np.float32]:
        positions = [*row.scored, *[row.stop - 1] * row.samples]
        return np.array([_hidden(self._digest(row, position + 1)) for position in positions], dtype=np.float32)

    def _digest(self, row: Row, stop: int) -> hashlib.blake2b:
        """Of what the blocks hold up to position ``stop``."""
        digest = hashlib.blake2b(digest_size=8)
        for layer in range(self.layout.num_layers):
            for _, cell, count in self._runs(layer, row.block_ids, 0, stop):
                digest.update(self._cells[cell : cell + count])
        return digest


def expected_tokens(
    spec: SequenceSpec, layout: KvLayout, vocab_size: int = 32000, mask: TokenMask | None = None
) -> list[int]:
    """What a FakeRunner generates for ``spec``, from the spec alone: the oracle of every test that uses one."""
    known = [*spec.prompt_token_ids, *spec.generated_token_ids]
    num_prompt = len(spec.prompt_token_ids)
    assert spec.sampling.max_tokens is not None
    while len(known) - num_prompt < spec.sampling.max_tokens:
        digest = _digest_of(known, layout)
        num_generated = len(known) - num_prompt
        bits = None if mask is None else mask.bits(known)
        known.append(_sample(digest, spec.sampling, len(known), num_generated, vocab_size, bits)[0])
        if known[-1] in spec.sampling.stop_token_ids and num_generated >= spec.sampling.min_tokens:
            break
        if mask is not None and mask.is_over(known):
            break
    return known[num_prompt:]


def expected_scores(spec: SequenceSpec, layout: KvLayout, vocab_size: int = 32000) -> list[PositionLogprobs]:
    """What a FakeRunner reports of the prompt's tokens behind the first: as ``expected_tokens``."""
    prompt, num_top = spec.prompt_token_ids, spec.sampling.prompt_logprobs
    assert num_top is not None
    return [
        _scored(_digest_of(prompt[:end], layout), prompt[end], num_top, vocab_size) for end in range(1, len(prompt))
    ]


def expected_embedding(spec: SequenceSpec, layout: KvLayout) -> bytes:
    """What a FakeRunner's prompt is embedded as: as ``expected_tokens``."""
    prompt = spec.prompt_token_ids
    first = 1 if spec.sampling.pooling == "mean" else len(prompt)
    rows = [_hidden(_digest_of(prompt[:end], layout)) for end in range(first, len(prompt) + 1)]
    mean: NDArray[np.float32] = np.array(rows, dtype=np.float64).mean(0).astype("<f4")
    return mean.tobytes()


def _hidden(digest: hashlib.blake2b) -> list[float]:
    return [byte / 16 - 8 for byte in digest.digest()]


def _digest_of(token_ids: Sequence[int], layout: KvLayout) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=8)
    for layer in range(layout.num_layers):
        digest.update(array("I", (token + 1 + layer for token in token_ids)))
    return digest


def _scored(digest: hashlib.blake2b, token_id: int, num_top: int, vocab_size: int) -> PositionLogprobs:
    """A pure function of the tokens before (in ``digest``) and of the token; exact in float32."""
    raw = int.from_bytes(digest.digest(), "little")
    top = tuple(TokenLogprob((raw + i) % vocab_size, -0.5 - i) for i in range(num_top))
    return PositionLogprobs(TokenLogprob(token_id, -1 - raw % 1024 / 64), 1 + raw % vocab_size, top)


def _sample(
    digest: hashlib.blake2b,
    sampling: SamplingParams,
    position: int,
    num_generated: int,
    vocab_size: int,
    mask: bytes | None,
) -> tuple[int, PositionLogprobs | None]:
    """A pure function of the tokens so far (in ``digest``), the seed and the position."""
    if not sampling.is_greedy:
        digest.update(f"{sampling.seed}/{position}".encode())
    raw = int.from_bytes(digest.digest(), "little")
    token = raw % vocab_size
    banned = sampling.stop_token_ids if num_generated < sampling.min_tokens else ()
    # As often as there are tokens: nothing is allowed then.
    for _ in range(vocab_size):
        if token not in banned and (mask is None or mask[token // 8] >> token % 8 & 1):
            break
        token = (token + 1) % vocab_size
    if sampling.logprobs is None:
        return token, None
    top = tuple(TokenLogprob((token + i) % vocab_size, -0.5 - i) for i in range(sampling.logprobs))
    return token, PositionLogprobs(TokenLogprob(token, -0.5), 1, top)
