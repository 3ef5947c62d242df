"""Log-probabilities of the rows that ask for them: reduces the model's own logits to the values that the host needs.

Two launches: a program per chunk of a row computes its part of the mass, of the chosen token's rank and of the most
likely tokens; one program per row combines them. Rows without a request return at once. A chunk considers only values
above a bound that follows from the best values of all chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.interface import REPORT_TOP, REPORT_WORDS
from engine.kernels.triton.launch import kernel
from engine.kernels.triton.rows import OPTIONS
from engine.mass import COEFFICIENTS, LEAST_EXPONENT, LOG2E, REPORTED_BITS, REPORTED_TERMS

_LEAST_EXPONENT = tl.constexpr(LEAST_EXPONENT)
_EXPONENT_BIAS = tl.constexpr(1023 + REPORTED_BITS)
_LOG2E = tl.constexpr(LOG2E)
_LAST = tl.constexpr(COEFFICIENTS[REPORTED_TERMS - 1])
_C8, _C7, _C6, _C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(c) for c in reversed(COEFFICIENTS[: REPORTED_TERMS - 1]))


@triton.jit
def _mass_of(b_y):
    """engine.mass: 2^y in units of 2^-REPORTED_BITS, int64; y float64, at most 0."""
    b_y = tl.maximum(b_y, _LEAST_EXPONENT)
    b_whole = tl.math.floor(b_y + 0.5)
    b_rest = b_y - b_whole
    b_power = b_rest * _LAST + _C8
    b_power = b_power * b_rest + _C7
    b_power = b_power * b_rest + _C6
    b_power = b_power * b_rest + _C5
    b_power = b_power * b_rest + _C4
    b_power = b_power * b_rest + _C3
    b_power = b_power * b_rest + _C2
    b_power = b_power * b_rest + _C1
    b_power = b_power * b_rest + _C0
    b_unit = ((b_whole.to(tl.int64) + _EXPONENT_BIAS) << 52).to(tl.float64, bitcast=True)
    return (b_power * b_unit + 0.5).to(tl.int64)


@triton.jit
def _most_likely(b_value, b_id, m_value, floor, num_wanted, TOP: tl.constexpr):
    """Ids and values [TOP] of the ``num_wanted`` largest values from ``floor`` up, the lowest of equal ids first;
    the rest is -1 and -inf."""
    b_place = tl.arange(0, TOP)
    b_top = tl.full([TOP], float("-inf"), tl.float32)
    b_top_id = tl.full([TOP], -1, tl.int32)
    num_found = tl.zeros([], tl.int32)
    best = tl.max(tl.where(m_value, b_value, float("-inf")), 0)
    while (num_found < num_wanted) & (best >= floor) & (best > float("-inf")):
        first = tl.min(tl.where(m_value & (b_value == best), b_id, 2147483647), 0)
        b_top = tl.where(b_place == num_found, best, b_top)
        b_top_id = tl.where(b_place == num_found, first, b_top_id)
        m_value &= b_id != first
        num_found += 1
        best = tl.max(tl.where(m_value, b_value, float("-inf")), 0)
    return b_top_id, b_top


@kernel
def _part_kernel(
    p_mass,  # [rows, CHUNKS] int64
    p_rank,  # [rows, CHUNKS] int32: number of values larger than the chosen token's
    p_top_ids,  # [rows, CHUNKS, TOP] int32
    p_top,  # [rows, CHUNKS, TOP] float32
    p_logits,  # [rows, size] float32, rows stride_row apart
    p_best,  # [rows, 4, CHUNKS] float32: the last of the four is the best value of each chunk
    p_token,  # [rows] int64: negative if no token was drawn
    p_num_top,  # [rows] int32: negative if no report is requested
    size,
    stride_row,
    num_chunks,
    TOP: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_top, token = tl.load(p_num_top + i_row), tl.load(p_token + i_row)
    if (num_top >= 0) & (token >= 0):
        b_chunk = tl.arange(0, CHUNKS)
        b_best = tl.load(p_best + (i_row * 4 + 3) * CHUNKS + b_chunk, mask=b_chunk < num_chunks, other=float("-inf"))
        best = tl.max(b_best, 0)
        b_id = i_chunk * CHUNK + tl.arange(0, CHUNK)
        m_in = b_id < size
        b_value = tl.load(p_logits + i_row * stride_row + b_id, mask=m_in, other=float("-inf"))
        chosen = tl.load(p_logits + i_row * stride_row + token)
        b_y = (b_value.to(tl.float64) - best.to(tl.float64)) * _LOG2E
        at = i_row * CHUNKS + i_chunk
        tl.store(p_mass + at, tl.sum(tl.where(m_in, _mass_of(b_y), 0), 0))
        tl.store(p_rank + at, tl.sum((m_in & (b_value > chosen)).to(tl.int32), 0))
        # With that many chunks, the num_top-th best of their best values is at most that of all values.
        b_larger = tl.sum((b_best[None, :] > b_best[:, None]).to(tl.int32), 1)
        floor = tl.min(tl.where(b_larger < num_top, b_best, float("inf")), 0)
        floor = tl.where(num_chunks < num_top, float("-inf"), floor)
        b_top_id, b_top = _most_likely(b_value, b_id, m_in, floor, num_top, TOP)
        b_to = at * TOP + tl.arange(0, TOP)
        tl.store(p_top_ids + b_to, b_top_id)
        tl.store(p_top + b_to, b_top)


@kernel
def _whole_kernel(
    p_report,  # [rows, 4 + 2 * TOP] int64
    p_mass, p_rank, p_top_ids, p_top, p_logits, p_best, p_token, p_num_top,  # as above
    stride_row,
    num_chunks,
    TOP: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    num_top, token = tl.load(p_num_top + i_row), tl.load(p_token + i_row)
    if (num_top >= 0) & (token >= 0):
        b_chunk = tl.arange(0, CHUNKS)
        m_chunk = b_chunk < num_chunks
        at = i_row * CHUNKS
        best = tl.max(tl.load(p_best + (i_row * 4 + 3) * CHUNKS + b_chunk, mask=m_chunk, other=float("-inf")), 0)
        mass = tl.sum(tl.load(p_mass + at + b_chunk, mask=m_chunk, other=0), 0)
        rank = tl.sum(tl.load(p_rank + at + b_chunk, mask=m_chunk, other=0), 0) + 1
        chosen = tl.load(p_logits + i_row * stride_row + token)
        b_at = tl.arange(0, CHUNKS * TOP)
        m_at = b_at < num_chunks * TOP
        b_id = tl.load(p_top_ids + at * TOP + b_at, mask=m_at, other=-1)
        b_value = tl.load(p_top + at * TOP + b_at, mask=m_at, other=float("-inf"))
        b_top_id, b_top = _most_likely(b_value, b_id, m_at & (b_id >= 0), float("-inf"), num_top, TOP)
        p_report += i_row * (4 + 2 * TOP)
        tl.store(p_report, mass)
        tl.store(p_report + 1, rank.to(tl.int64))
        tl.store(p_report + 2, best.to(tl.int32, bitcast=True).to(tl.int64))
        tl.store(p_report + 3, chosen.to(tl.int32, bitcast=True).to(tl.int64))
        b_place = tl.arange(0, TOP)
        tl.store(p_report + 4 + b_place, b_top_id.to(tl.int64))
        tl.store(p_report + 4 + TOP + b_place, b_top.to(tl.int32, bitcast=True).to(tl.int64))


class Reporter:
    """Owns the memory between its two kernels, and the reports, [max_rows, REPORT_WORDS] int64."""

    def __init__(self, max_rows: int, chunks: int, device: torch.device) -> None:
        """``chunks``: number of chunks of a row, a power of two."""

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(max_rows, *shape, dtype=dtype, device=device)

        self.report = torch.zeros(max_rows, REPORT_WORDS, dtype=torch.int64, device=device)
        self._chunks = chunks
        self._mass = empty(chunks, dtype=torch.int64)
        self._rank = empty(chunks, dtype=torch.int32)
        self._top_ids = empty(chunks, REPORT_TOP, dtype=torch.int32)
        self._top = empty(chunks, REPORT_TOP, dtype=torch.float32)

    def launch(
        self, logits: Tensor, bests: Tensor, tokens: Tensor, num_top: Tensor, num_chunks: int, chunk: int
    ) -> None:
        """``bests`` [max_rows, 4, chunks]: the last of the four is the best value of each chunk."""
        rows, size = logits.shape
        parts = self._mass, self._rank, self._top_ids, self._top
        asked = logits, bests, tokens, num_top
        shape = {"TOP": REPORT_TOP, "CHUNKS": self._chunks, **OPTIONS}
        _part_kernel[rows, num_chunks](*parts, *asked, size, logits.stride(0), num_chunks, CHUNK=chunk, **shape)
        _whole_kernel[rows,](self.report, *parts, *asked, logits.stride(0), num_chunks, **shape)
