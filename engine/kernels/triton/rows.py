"""Shared parts of the sampling kernels: masses, the order of values, and the division of a row into chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.mass import COEFFICIENTS, DRAWN_BITS, DRAWN_TERMS, LEAST_EXPONENT, LOG2E

# The last cut is below all values.
NUM_CUTS = tl.constexpr(8)
# The values above a cut of a chunk are packed into one number: their mass, and in the low bits their count. A mass has
# at most 37 bits, so 2^13 of them fit into int64.
CUT_BITS = tl.constexpr(13)
COUNT_MASK = tl.constexpr(2**13 - 1)
_LEAST_EXPONENT = tl.constexpr(LEAST_EXPONENT)
_EXPONENT_BIAS = tl.constexpr(127 + DRAWN_BITS)
_NATS = tl.constexpr(1 / LOG2E)
_LAST = tl.constexpr(COEFFICIENTS[DRAWN_TERMS - 1])
_C6, _C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(c) for c in reversed(COEFFICIENTS[: DRAWN_TERMS - 1]))
_CUT_STEP = tl.constexpr(1 / 7)
assert NUM_CUTS.value == 8
# Separate IEEE operations: a fused one would round differently from the host's.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 8}


@triton.jit
def mass_of(b_y):
    """engine.mass: 2^y in units of 2^-DRAWN_BITS, int64; y float32, at most 0."""
    b_y = tl.maximum(b_y, _LEAST_EXPONENT)
    b_whole = tl.math.floor(b_y + 0.5)
    b_rest = b_y - b_whole
    b_power = b_rest * _LAST + _C6
    b_power = b_power * b_rest + _C5
    b_power = b_power * b_rest + _C4
    b_power = b_power * b_rest + _C3
    b_power = b_power * b_rest + _C2
    b_power = b_power * b_rest + _C1
    b_power = b_power * b_rest + _C0
    b_unit = ((b_whole.to(tl.int32) + _EXPONENT_BIAS) << 23).to(tl.float32, bitcast=True)
    return (b_power * b_unit + 0.5).to(tl.int64)


@triton.jit
def key_of(b_value):
    """float32 as int32 of the same order; equal values, zeros of both signs too, have equal keys."""
    b_bits = tl.where(b_value == 0.0, 0, b_value.to(tl.int32, bitcast=True))
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


@triton.jit
def best_of(p_values, p_places, i_row, num_chunks, CHUNKS: tl.constexpr):
    """(best value, its id, number of the model's values that are not finite) of a row."""
    b_chunk = tl.arange(0, CHUNKS)
    m_chunk = b_chunk < num_chunks
    b_best = tl.load(p_values + i_row * 4 * CHUNKS + b_chunk, mask=m_chunk, other=float("-inf"))
    b_id = tl.load(p_places + i_row * 2 * CHUNKS + b_chunk, mask=m_chunk, other=2147483647)
    num_bad = tl.sum(tl.load(p_places + (i_row * 2 + 1) * CHUNKS + b_chunk, mask=m_chunk, other=0), 0)
    best = tl.max(b_best, 0)
    return best, tl.min(tl.where(b_best == best, b_id, 2147483647), 0), num_bad


@triton.jit
def span_of(p_values, i_row, best, size, scale, num_chunks, CHUNKS: tl.constexpr):
    """How far below ``best`` the cuts reach, for normally distributed logits: the range of most of the mass, and
    some more."""
    b_chunk = tl.arange(0, CHUNKS)
    m_chunk = b_chunk < num_chunks
    p_sums = p_values + (i_row * 4 + 1) * CHUNKS + b_chunk
    mean = tl.sum(tl.load(p_sums, mask=m_chunk, other=0.0), 0) / size
    square = tl.sum(tl.load(p_sums + CHUNKS, mask=m_chunk, other=0.0), 0) / size
    deviation = tl.sqrt(tl.maximum(square - mean * mean, 0.0))
    # Weighting by exp(logit / temperature) shifts a normal distribution up by this many deviations.
    moved = deviation * scale * _NATS
    return best - (mean + deviation * tl.minimum(moved - 2.5, 2.0))


@triton.jit
def cut_at(best, span, i_cut):
    """Separate IEEE operations, so that all compilers give the same bits."""
    below = (i_cut + 1).to(tl.float32) * _CUT_STEP
    return tl.where(i_cut < NUM_CUTS - 1, best - span * below, float("-inf"))


@triton.jit
def row_of(p_logits, p_changed, p_slot, p_masked, i_row, size, stride_row):
    p_row = p_logits + i_row * stride_row
    if (tl.load(p_slot + i_row) >= 0) | (tl.load(p_masked + i_row) != 0):
        p_row = p_changed + i_row * size
    return p_row


@triton.jit
def kept_masses(p_row, p_floor, i_row, i_chunk, best, reach, scale, is_filtered, size, CHUNK: tl.constexpr):
    b_id = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_value = tl.load(p_row + b_id, mask=b_id < size, other=float("-inf"))
    m_kept = (b_id < size) & (b_value >= (best.to(tl.float64) + reach).to(tl.float32))
    floor = tl.load(p_floor + i_row * 2, mask=is_filtered, other=-2147483648)
    last = tl.load(p_floor + i_row * 2 + 1, mask=is_filtered, other=0)
    b_key = key_of(b_value)
    m_kept &= (b_key > floor) | ((b_key == floor) & (b_id <= last))
    return tl.where(m_kept, mass_of((b_value - best) * scale), 0)
