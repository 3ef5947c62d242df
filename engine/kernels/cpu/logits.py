"""Logits in float32 and, in the same pass, the best token of each row and whether the row is finite.

A task processes up to ``_PIECE`` logits of one row and writes four numbers: [best logit, its token id, 0 or NaN if a
logit is not finite, unused]. The host combines the pieces of a row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.cpu.kernel import Kernel
from engine.kernels.cpu.llvm import Emitter, Int, Isa, Vec, itemsize
from engine.kernels.cpu.once import once
from engine.kernels.cpu.pointwise import dtype_name
from engine.kernels.cpu.program import Record, Tape
from engine.kernels.interface import Peaks

_PIECE = 1 << 14
_NUMBERS = 4
# Token ids are exact in float32 up to this number.
_MAX_VOCABULARY = 1 << 24


def summarize(isa: Isa, tape: Tape, logits: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, vocabulary] in the model's dtype -> the same in float32, and the numbers for ``peaks_of``."""
    size, rows = logits.shape[1], tape.rows(logits)
    assert size <= _MAX_VOCABULARY, f"a vocabulary of {size} tokens, expected at most {_MAX_VOCABULARY}"
    pieces = -(-size // _PIECE)
    wide = logits if logits.dtype == torch.float32 else tape.empty(logits, size, dtype=torch.float32)
    summary = tape.empty(logits, pieces, _NUMBERS, dtype=torch.float32)
    kernel = _kernel(isa, dtype_name(logits), size)
    tape.run([Record(kernel, (logits, wide, summary), rows, units=pieces)])
    return wide, summary


def peaks_of(numbers: NDArray[np.float32]) -> Peaks:
    """[rows, pieces, 4]. Of equal logits the lower token id is best."""
    best = numbers[:, :, 0].argmax(1)
    token_ids = numbers[np.arange(len(best)), best, 1].astype(np.int64)
    return Peaks(token_ids.tolist(), (numbers[:, :, 2] == 0).all(1).tolist())


@once
def _kernel(isa: Isa, dtype: str, size: int) -> Kernel:
    item, pieces = itemsize(dtype), -(-size // _PIECE)

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        logits, wide, summary = parameters
        row, first = task // pieces, task % pieces * _PIECE
        last = (first + _PIECE).min(size)

        def part(start: Int, stop: Int, width: int) -> list[Vec]:
            """Best, its token id, 0 or NaN, in every lane."""
            none, zero = e.constant(-math.inf, width), e.constant(0.0, width)
            with e.loop(start, stop, width, [none, zero, zero, e.count_from(start, width)]) as loop:
                best, best_id, spoilt, token_id = loop.values
                at = row * size + loop.index
                value = e.load(dtype, logits + at * item, width)
                if dtype != "float32":
                    e.store("float32", value, wide + at * 4)
                is_better = value.is_above(best)
                loop.following = [
                    value.where(is_better, best),
                    token_id.where(is_better, best_id),
                    e.fma(value, zero, spoilt),
                    token_id + float(width),
                ]
            best, best_id, spoilt, _ = loop.values
            top = e.lane_max(best)
            # Of the lanes with the best value, the one with the lowest id.
            lowest = e.lane_max(none.where(top.is_above(best), best_id * -1.0)) * -1.0
            return [e.resize(x, 1) for x in (top, lowest, e.lane_sum(spoilt))]

        whole = last - (last - first) % isa.lanes
        best, best_id, spoilt = part(first, whole, isa.lanes)
        late, late_id, late_spoilt = part(whole, last, 1)
        is_later = late.is_above(best)
        numbers = late.where(is_later, best), late_id.where(is_later, best_id), spoilt + late_spoilt
        for i, number in enumerate(numbers):
            e.store("float32", number, summary + task * (_NUMBERS * 4) + 4 * i)

    return Kernel(f"logits_{dtype}", isa, 3, build)
