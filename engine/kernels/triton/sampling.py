"""Samples the token of each row of logits on the device, equal to engine.sampler: same Philox number, same token.

Bound by the bytes of the logits. A row is cut into chunks, a program each; their results are combined in the order of
the chunks, and probabilities are integers (engine.mass), so bits depend on neither batch nor grid. Passes over a row:
one for its best value, where greedy rows end; one for masses, after which a row without filters reads one chunk more;
with top_k or top_p twice the chunks that hold values near the bound (`nucleus`). Changes of a row's logits are applied
in the first pass, to a copy: log-probabilities are those of the model's own logits (`logprobs`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.interface import NO_TOKEN, Draws, SlotTables
from engine.kernels.triton.launch import kernel
from engine.kernels.triton.logprobs import Reporter
from engine.kernels.triton.nucleus import gather_kernel, kept_kernel, select_kernel
from engine.kernels.triton.rows import (
    CUT_BITS,
    NUM_CUTS,
    OPTIONS,
    best_of,
    cut_at,
    kept_masses,
    mass_of,
    row_of,
    span_of,
)

# Values of a row per program; at most 2^CUT_BITS / 2.
_CHUNK = 4096
# Values that a program searches at a time, and the maximum it gathers for that.
_BLOCK = 1024
_MAX_GATHERED = 8192
# With more warps, Triton 3.6 spills.
_SELECT_OPTIONS = {**OPTIONS, "num_warps": 4}
_NO_TOKEN = tl.constexpr(NO_TOKEN)


@triton.jit
def _uniform(seed, position):
    """A number in [0, 1) with 53 random bits: Philox4x32-10 of counter ``position`` under key ``seed``."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    c0, c1, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = (c0.to(tl.uint64) << 21) | (c1.to(tl.uint64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _newest(p_newest, p_drawn, i_row):
    """The token to be counted; negative if there is none or none was drawn."""
    newest = tl.load(p_newest + i_row)
    is_drawn = (newest < 0) & (newest > _NO_TOKEN)
    drawn = tl.load(p_drawn + tl.where(is_drawn, -1 - newest, 0), mask=is_drawn, other=-1)
    return tl.where(newest < 0, drawn, newest)


@triton.jit
def _edited(b_value, b_id, p_ids, p_biases, p_bans, first_id, is_banning, EDITS: tl.constexpr, CHUNK: tl.constexpr):
    """Biases and bans of the chunk that starts at ``first_id``; the lists are sorted by id."""
    b_listed = tl.load(p_ids + tl.arange(0, EDITS))
    first = tl.sum((b_listed < first_id).to(tl.int32), 0)
    end = tl.sum((b_listed < first_id + CHUNK).to(tl.int32), 0)
    for i in range(first, end):
        changed = b_value + tl.load(p_biases + i)
        changed = tl.where((tl.load(p_bans + i) != 0) & is_banning, float("-inf"), changed)
        b_value = tl.where(b_id == tl.load(p_ids + i), changed, b_value)
    return b_value


@triton.jit
def _penalized(b_value, b_seen, repetition, frequency, presence):
    """``b_seen``: twice the number of times a token was generated, plus 1 if the prompt contains it."""
    b_repeated = tl.where(b_value > 0, tl.div_rn(b_value, repetition), b_value * repetition)
    b_value = tl.where(b_seen > 0, b_repeated, b_value)
    b_count = (b_seen >> 1).to(tl.float32)
    b_value = b_value - frequency * b_count
    return b_value - presence * (b_count > 0).to(tl.float32)


@kernel
def _change_kernel(
    p_changed,  # [rows, size] float32: rows after their changes; others are not written
    p_logits,  # [rows, size] float32, rows stride_row apart
    p_slot, p_is_banning, p_newest, p_masked,  # [rows]
    p_drawn,  # [rows of the step before] int64
    p_seen,  # [slots, size] int32
    p_penalties,  # [slots, 3] float32
    p_edit_ids, p_edit_biases, p_edit_bans,  # [slots, EDITS]
    p_masks,  # [rows, words] int32
    size,
    words,
    stride_row,
    EDITS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, is_masked = tl.load(p_slot + i_row).to(tl.int64), tl.load(p_masked + i_row) != 0
    if (slot >= 0) | is_masked:
        first_id = i_chunk * CHUNK
        b_id = first_id + tl.arange(0, CHUNK)
        m_in = b_id < size
        b_value = tl.load(p_logits + i_row * stride_row + b_id, mask=m_in, other=0.0)
        # A row with NaN or infinity fails in any case, so the value here does not matter.
        b_value = tl.where(tl.abs(b_value) < float("inf"), b_value, 0.0)
        if slot >= 0:
            at = slot * EDITS
            is_banning = tl.load(p_is_banning + i_row) != 0
            b_value = _edited(
                b_value, b_id, p_edit_ids + at, p_edit_biases + at, p_edit_bans + at, first_id, is_banning, EDITS, CHUNK
            )
            repetition = tl.load(p_penalties + slot * 3)
            frequency, presence = tl.load(p_penalties + slot * 3 + 1), tl.load(p_penalties + slot * 3 + 2)
            if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
                m_new = m_in & (b_id == _newest(p_newest, p_drawn, i_row))
                b_seen = tl.load(p_seen + slot * size + b_id, mask=m_in, other=0) + tl.where(m_new, 2, 0)
                tl.store(p_seen + slot * size + b_id, b_seen, mask=m_new)
                b_value = _penalized(b_value, b_seen, repetition, frequency, presence)
        if is_masked:
            b_word = tl.load(p_masks + i_row * words + (b_id >> 5), mask=m_in, other=0)
            b_value = tl.where(((b_word >> (b_id & 31)) & 1) != 0, b_value, float("-inf"))
        tl.store(p_changed + i_row * size + b_id, b_value, mask=m_in)


@kernel
def _stats_kernel(
    p_values,  # [rows, 4, CHUNKS] float32: best, sum and sum of squares (roughly), best of the model's own
    p_places,  # [rows, 2, CHUNKS] int32: id of the best, number of the model's values that are not finite
    p_changed, p_logits, p_slot, p_masked,  # as above
    size,
    stride_row,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_id = i_chunk * CHUNK + tl.arange(0, CHUNK)
    m_in = b_id < size
    b_value = tl.load(p_logits + i_row * stride_row + b_id, mask=m_in, other=float("-inf"))
    # Comparisons with NaN are false. NaN is excluded from the maximum, whose NaN behaviour differs between machines.
    m_finite = tl.abs(b_value) < float("inf")
    num_bad = tl.sum((m_in & (m_finite == 0)).to(tl.int32), 0)
    b_value = tl.where(m_finite, b_value, float("-inf"))
    raw_best = tl.max(b_value, 0)
    best = raw_best
    if (tl.load(p_slot + i_row) >= 0) | (tl.load(p_masked + i_row) != 0):
        b_value = tl.load(p_changed + i_row * size + b_id, mask=m_in, other=float("-inf"))
        best = tl.max(b_value, 0)
    # The lowest id of equal values.
    best_id = tl.min(tl.where(m_in & (b_value == best), b_id, size), 0)
    # These decide only where to search first, so they may be rough.
    b_near = tl.where(m_in, tl.minimum(tl.maximum(b_value, -1e4), 1e4), 0.0)
    p_values += i_row * 4 * CHUNKS + i_chunk
    p_places += i_row * 2 * CHUNKS + i_chunk
    tl.store(p_values, best)
    tl.store(p_values + CHUNKS, tl.sum(b_near, 0))
    tl.store(p_values + 2 * CHUNKS, tl.sum(b_near * b_near, 0))
    tl.store(p_values + 3 * CHUNKS, raw_best)
    tl.store(p_places, best_id)
    tl.store(p_places + CHUNKS, num_bad)


@kernel
def _mass_kernel(
    p_masses,  # [rows, CHUNKS] int64: of rows without top_k and top_p
    p_span,  # [rows] float32: how far the cuts reach below the best
    p_cuts,  # [rows, NUM_CUTS, CHUNKS] int64: of the others, mass and number of the values from each cut up
    p_values, p_places, p_changed, p_logits, p_slot, p_masked,  # as above
    p_scale,  # [rows] float32
    p_top_k,  # [rows] int32
    p_top_p,  # [rows] float64
    p_reach,  # [rows] float64
    size,
    stride_row,
    num_chunks,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = tl.load(p_scale + i_row)
    if scale > 0:
        best, _, num_bad = best_of(p_values, p_places, i_row, num_chunks, CHUNKS)
        if (num_bad == 0) & (tl.abs(best) < float("inf")):
            p_row = row_of(p_logits, p_changed, p_slot, p_masked, i_row, size, stride_row)
            b_id = i_chunk * CHUNK + tl.arange(0, CHUNK)
            b_value = tl.load(p_row + b_id, mask=b_id < size, other=float("-inf"))
            least = (best.to(tl.float64) + tl.load(p_reach + i_row)).to(tl.float32)
            m_kept = (b_id < size) & (b_value >= least)
            b_mass = tl.where(m_kept, mass_of((b_value - best) * scale), 0)
            if (tl.load(p_top_k + i_row) > 0) | (tl.load(p_top_p + i_row) < 1):
                span = span_of(p_values, i_row, best, size, scale, num_chunks, CHUNKS)
                if i_chunk == 0:
                    tl.store(p_span + i_row, span)
                b_both = (b_mass << CUT_BITS) | m_kept.to(tl.int64)
                for i_cut in tl.static_range(NUM_CUTS):
                    cut = cut_at(best, span, tl.full([], i_cut, tl.int32))
                    above = tl.sum(tl.where(b_value >= cut, b_both, 0), 0)
                    tl.store(p_cuts + (i_row * NUM_CUTS + i_cut) * CHUNKS + i_chunk, above)
            else:
                tl.store(p_masses + i_row * CHUNKS + i_chunk, tl.sum(b_mass, 0))


@kernel
def _draw_kernel(
    p_token,  # [rows] int64
    p_masses, p_floor, p_values, p_places, p_changed, p_logits, p_slot, p_masked,  # as above
    p_scale, p_top_k, p_top_p, p_reach,
    p_seed,  # [rows] int64
    p_position,  # [rows] int64
    size,
    stride_row,
    num_chunks,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    best, token, num_bad = best_of(p_values, p_places, i_row, num_chunks, CHUNKS)
    scale = tl.load(p_scale + i_row)
    if (scale > 0) & (num_bad == 0) & (tl.abs(best) < float("inf")):
        b_chunk = tl.arange(0, CHUNKS)
        b_mass = tl.load(p_masses + i_row * CHUNKS + b_chunk, mask=b_chunk < num_chunks, other=0)
        total = tl.sum(b_mass, 0)
        number = _uniform(tl.load(p_seed + i_row), tl.load(p_position + i_row))
        wanted = tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)
        i_chunk = tl.sum((tl.cumsum(b_mass, 0) <= wanted).to(tl.int32), 0)
        wanted -= tl.sum(tl.where(b_chunk < i_chunk, b_mass, 0), 0)
        p_row = row_of(p_logits, p_changed, p_slot, p_masked, i_row, size, stride_row)
        is_filtered = (tl.load(p_top_k + i_row) > 0) | (tl.load(p_top_p + i_row) < 1)
        b_head = tl.cumsum(
            kept_masses(
                p_row, p_floor, i_row, i_chunk, best, tl.load(p_reach + i_row), scale, is_filtered, size, CHUNK
            ), 0
        )  # fmt: skip
        token = i_chunk * CHUNK + tl.sum((b_head <= wanted).to(tl.int32), 0)
    token = tl.where(best == float("-inf"), -2, tl.where(best == float("inf"), -3, token))
    tl.store(p_token + i_row, tl.where(num_bad == 0, token, -1).to(tl.int64))


class TritonSampler:
    """Samples for up to ``max_rows`` sequences a step. Owns the memory between its kernels, and the slots of changed
    logits."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, *, chunk: int = _CHUNK) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(max_rows, *shape, dtype=dtype, device=device)

        self._size = vocab_size
        self._chunk = chunk
        self._num_chunks = triton.cdiv(vocab_size, chunk)
        self._chunks = triton.next_power_of_2(self._num_chunks)
        self.tables = SlotTables.zeros(max_rows, vocab_size, device)
        self.masks = torch.zeros(max_rows, triton.cdiv(vocab_size, 32), dtype=torch.int32, device=device)
        self._changed = empty(vocab_size, dtype=torch.float32)
        self._values = empty(4, self._chunks, dtype=torch.float32)
        self._places = empty(2, self._chunks, dtype=torch.int32)
        self._masses = empty(self._chunks, dtype=torch.int64)
        self._cuts = empty(NUM_CUTS.value, self._chunks, dtype=torch.int64)
        self._plan = empty(6, dtype=torch.int64)
        self._span = empty(dtype=torch.float32)
        self._bounds = empty(2, dtype=torch.float32)
        self._floor = empty(2, dtype=torch.int32)
        self._found = empty(_MAX_GATHERED, dtype=torch.float32)
        self._found_ids = empty(_MAX_GATHERED, dtype=torch.int32)
        self._reporter = Reporter(max_rows, self._chunks, device)
        # Of rows whose logits stay as they are.
        self._no_slot = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self._no_mask = torch.zeros(max_rows, dtype=torch.int32, device=device)

    @property
    def report(self) -> Tensor:
        """[max_rows, REPORT_WORDS] int64: reports of the last step, for the rows that asked for log-probabilities."""
        return self._reporter.report

    def draw(self, logits: Tensor, draws: Draws, drawn: Tensor) -> None:
        """Writes a token id per row of ``logits`` [rows, vocabulary] float32 to the first entries of ``drawn``,
        which holds those of the step before."""
        rows, stride = len(logits), logits.stride(0)
        if not rows:
            return
        tables, size, chunks = self.tables, self._size, self._num_chunks
        grid, shape = (rows, chunks), {"CHUNKS": self._chunks, "CHUNK": self._chunk, **OPTIONS}
        source = self._changed, logits, draws.slot, draws.is_masked
        _change_kernel[grid](
            self._changed, logits, draws.slot, draws.is_banning, draws.newest, draws.is_masked, drawn, *tables,
            self.masks, size, self.masks.shape[1], stride,
            EDITS=tables.edit_ids.shape[1], CHUNK=self._chunk, **OPTIONS,
        )  # fmt: skip
        _stats_kernel[grid](self._values, self._places, *source, size, stride, **shape)
        looked = self._values, self._places, *source
        filters = draws.scale, draws.top_k, draws.top_p, draws.reach
        _mass_kernel[grid](self._masses, self._span, self._cuts, *looked, *filters, size, stride, chunks, **shape)
        gather_kernel[grid](
            self._plan, self._bounds, self._found, self._found_ids, self._span, self._cuts, *looked, *filters,
            size, stride, chunks, MAX_GATHERED=_MAX_GATHERED, **shape,
        )  # fmt: skip
        select_kernel[rows,](
            self._floor, self._plan, self._bounds, self._found, self._found_ids, *looked, *filters, size, stride,
            chunks, MAX_GATHERED=_MAX_GATHERED, CHUNKS=self._chunks, BLOCK=_BLOCK, **_SELECT_OPTIONS,
        )  # fmt: skip
        kept_kernel[grid](
            self._masses, self._floor, self._plan, self._cuts, *looked, *filters, size, stride, chunks, **shape
        )
        _draw_kernel[rows,](
            drawn,
            self._masses,
            self._floor,
            *looked,
            *filters,
            draws.seed,
            draws.position,
            size,
            stride,
            chunks,
            **shape,
        )
        self._reporter.launch(logits, self._values, drawn, draws.num_logprobs, chunks, self._chunk)

    def score(self, logits: Tensor, token_ids: Tensor, num_top: Tensor) -> Tensor:
        rows, stride, chunks = len(logits), logits.stride(0), self._num_chunks
        source = self._changed, logits, self._no_slot, self._no_mask
        _stats_kernel[rows, chunks](
            self._values, self._places, *source, self._size, stride, CHUNKS=self._chunks, CHUNK=self._chunk, **OPTIONS
        )
        is_bad = self._places[:rows, 1, :chunks].sum(-1) > 0
        # No report is made of a row without a token.
        tokens = torch.where(is_bad, -1, token_ids)
        self._reporter.launch(logits, self._values, tokens, num_top, chunks, self._chunk)
        report = self.report[:rows]
        report[:, 0].masked_fill_(is_bad, -1)
        return report
