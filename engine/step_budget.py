"""What a step has left for prompts: tokens, rows of logits and, beside sequences that decode, time. Cuts prompts into
chunks.

Pure. The scheduler decides whose turn it is.
"""

from __future__ import annotations

from engine.entry import Entry
from engine.scheduler_config import SchedulerConfig
from engine.step import Piece, StepShape
from engine.step_times import MeasuredSteps

# A chunk ends on a block boundary if that costs at most one part in so many of it: whole blocks can be pushed at once.
_MAX_LOSS = 4
# Else on whole tiles of rows of the kernels.
_TILE = 8


class StepBudget:
    def __init__(
        self, config: SchedulerConfig, measured: MeasuredSteps, decoding: StepShape, limit_s: float | None
    ) -> None:
        """``decoding``: what is in the step already. ``limit_s``: how long it may take, None: as long as it takes."""
        self.shape = decoding
        self._config = config
        self._measured = measured
        self._limit_s = limit_s
        self._num_tokens = config.max_batch_tokens - decoding.num_decoding
        # Rows whose logits are computed: so many have room in the kernels' memory.
        self._num_slots = config.max_num_seqs - decoding.num_decoding

    @property
    def is_full(self) -> bool:
        """Nothing more goes in. A step that has no prompt yet takes some, however long it is."""
        if self._num_tokens <= 0 or self._num_slots <= 0:
            return True
        if self._limit_s is None or not self.shape.num_prompt_tokens:
            return False
        return self._fitting(self._limit_s, 0) < self._config.min_chunk_tokens

    def take(self, entry: Entry) -> Piece:
        """The next chunk of a prompt, if the step is not full."""
        start, wanted, sequence = entry.start, entry.num_unplanned, entry.sequence
        count = min(wanted, self._num_tokens, max(0, sequence.first_scored - start) + self._num_slots)
        if self._limit_s is not None:
            count = min(count, max(self._fitting(self._limit_s, start), self._config.min_chunk_tokens))
        if count < wanted:
            count = self._rounded(start, count)
        scored = sequence.scored(start, start + count)
        piece = Piece(sequence, start, count, samples=count == wanted, scored=scored)
        self.shape = self.shape.with_prompt(start, count)
        self._num_tokens -= count
        self._num_slots -= max(1, len(scored) + piece.samples)
        return piece

    def _fitting(self, limit_s: float, start: int) -> int:
        return self._measured.fitting_tokens(limit_s, self.shape, start)

    def _rounded(self, start: int, count: int) -> int:
        """Down to a block boundary, else to whole tiles of rows."""
        ragged = (start + count) % self._config.block_tokens
        if ragged < count and (self._limit_s is None or ragged * _MAX_LOSS <= count):
            return count - ragged
        return count - count % _TILE if self._limit_s is not None and count > _TILE else count
