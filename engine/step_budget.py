"""What a step has left for prompts: tokens, sequences and, beside sequences that decode, time. Cuts them into chunks.

Pure. The scheduler decides whose turn it is.
"""

from __future__ import annotations

from engine.entry import Entry
from engine.scheduler_config import SchedulerConfig
from engine.step import Piece, StepShape
from engine.step_times import MeasuredSteps

# A chunk ends on a block boundary if that costs at most one part in so many of it: whole blocks can be pushed at once.
_MAX_LOSS = 4


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
        self._num_slots = config.max_num_seqs - decoding.num_decoding

    def fitting(self, start: int, num_tokens: int) -> int:
        """Of a prompt that lacks ``num_tokens`` from position ``start`` on, how many this step computes; 0: it is full.

        A step that has no prompt yet takes some, however long it is.
        """
        if self._num_slots <= 0:
            return 0
        count = min(num_tokens, self._num_tokens)
        if self._limit_s is not None and count > 0:
            least = min(count, self._config.min_chunk_tokens)
            fitting = self._measured.fitting_tokens(self._limit_s, self.shape, start)
            if fitting < least:
                return 0 if self.shape.num_prompt_tokens else least
            count = min(count, fitting)
        return count if count == num_tokens else self._rounded(start, count)

    def take(self, entry: Entry, num_tokens: int) -> Piece:
        piece = Piece(entry.sequence, entry.start, num_tokens, samples=num_tokens == entry.num_unplanned)
        self.shape = self.shape.with_prompt(piece.start, num_tokens)
        self._num_tokens -= num_tokens
        self._num_slots -= 1
        return piece

    def _rounded(self, start: int, count: int) -> int:
        """Down to a block boundary, else to whole tiles of rows."""
        ragged = (start + count) % self._config.block_tokens
        if ragged < count and (self._limit_s is None or ragged * _MAX_LOSS <= count):
            return count - ragged
        tile = self._config.min_chunk_tokens
        return count - count % tile if self._limit_s is not None and count > tile else count
