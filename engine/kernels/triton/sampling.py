"""The token of each row of logits, on the device: what engine.sampler draws, from the same number of the same Philox.

Bound by the bytes of the logits, read once for greedy rows, and once per digit and filter for the others. A program
has one row. Without filters the quantile is taken in the order of ids; with top_k or top_p in the order of falling
logits, equal ones by id, which needs no sort: digit by digit the program finds the value at which the count, or the
mass in float64, of all larger ones passes the bound. Penalties, biases and log-probabilities stay on the host. A row
that holds a NaN or an infinity gives -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.interface import Draws

# Values that a program holds at a time. Part of the numerics: masses are summed by place in the block, then over it.
_BLOCK = 2048


@triton.jit
def _sortable(b_value):
    """float32 as int64 keys of the same order; equal values, zeros of both signs too, have equal keys."""
    b_bits = tl.where(b_value == 0.0, 0, b_value.to(tl.int32, bitcast=True))
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return b_bits.to(tl.int64) + 2147483648


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
def _values(p_row, at, size, least, floor, BLOCK: tl.constexpr):
    """Ids, values, keys of a block, and which of them are not less than ``least`` and ``floor``."""
    b_id = at + tl.arange(0, BLOCK)
    b_value = tl.load(p_row + b_id, mask=b_id < size, other=float("-inf"))
    b_key = _sortable(b_value)
    return b_id, b_value, b_key, (b_id < size) & (b_value >= least) & (b_key >= floor)


@triton.jit
def _weight(b_value, m_kept, best, temperature, IS_COUNT: tl.constexpr):
    """1 for what is kept, or its probability times a constant; 0 for the rest."""
    if IS_COUNT:
        return m_kept.to(tl.float64)
    else:  # noqa: RET505 - the compiler drops this branch, but not what follows a return
        b_scaled = (tl.where(m_kept, b_value, best).to(tl.float64) - best) / temperature
        return tl.where(m_kept, tl.exp(b_scaled), 0.0)


@triton.jit
def _key_value(key):
    """The float64 of a key."""
    bits = key - 2147483648
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _around(p_row, size, key, least, best, temperature, IS_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(weight of all values >= ``least`` above ``key``, number of those at it)."""
    b_above = tl.zeros([BLOCK], tl.float64)
    b_equal = tl.zeros([BLOCK], tl.int32)
    for at in range(0, size, BLOCK):
        _, b_value, b_key, m_kept = _values(p_row, at, size, least, key, BLOCK)
        b_above += _weight(b_value, m_kept & (b_key > key), best, temperature, IS_COUNT)
        b_equal += (m_kept & (b_key == key)).to(tl.int32)
    return tl.sum(b_above, 0), tl.sum(b_equal, 0).to(tl.float64)


@triton.jit
def _search(
    p_row, size, wanted, least, floor, best, temperature,
    IS_COUNT: tl.constexpr, IS_STRICT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key from which on, with it, values weigh ``wanted`` (strict: more); the smallest if none does.

    Two bits of the key a pass: no sort, and no memory but the row itself.
    """
    best_key = _sortable(best.to(tl.float32))
    prefix = tl.zeros([], tl.int64)
    smallest = best_key
    for i_pass in range(16):
        step = tl.full([], 1, tl.int64) << (30 - 2 * i_pass)
        b_low = tl.zeros([BLOCK], tl.float64)
        b_middle = tl.zeros([BLOCK], tl.float64)
        b_high = tl.zeros([BLOCK], tl.float64)
        for at in range(0, size, BLOCK):
            _, b_value, b_key, m_kept = _values(p_row, at, size, least, floor, BLOCK)
            b_weight = _weight(b_value, m_kept, best, temperature, IS_COUNT)
            b_low += tl.where(b_key >= prefix + step, b_weight, 0.0)
            b_middle += tl.where(b_key >= prefix + 2 * step, b_weight, 0.0)
            b_high += tl.where(b_key >= prefix + 3 * step, b_weight, 0.0)
            smallest = tl.minimum(smallest, tl.min(tl.where(m_kept, b_key, best_key), 0))
        low, middle, high = tl.sum(b_low, 0), tl.sum(b_middle, 0), tl.sum(b_high, 0)
        if IS_STRICT:
            digit = (low > wanted).to(tl.int64) + (middle > wanted).to(tl.int64) + (high > wanted).to(tl.int64)
        else:
            digit = (low >= wanted).to(tl.int64) + (middle >= wanted).to(tl.int64) + (high >= wanted).to(tl.int64)
        # Nothing lies above the best, and nothing weighs 0.
        prefix += step * tl.minimum(digit, (tl.maximum(best_key - prefix, 0)) // step)
    return tl.maximum(prefix, smallest)


@triton.jit
def _nth_equal(p_row, size, key, nth, BLOCK: tl.constexpr):
    """Id of the ``nth`` value of that key, from 0, in the order of ids."""
    found = tl.zeros([], tl.int32)
    passed = tl.zeros([], tl.int32)
    for at in range(0, size, BLOCK):
        b_id, _, b_key, m_kept = _values(p_row, at, size, float("-inf"), key, BLOCK)
        b_equal = (m_kept & (b_key == key)).to(tl.int32)
        b_rank = tl.cumsum(b_equal, 0) - 1 + passed
        found = tl.maximum(found, tl.max(tl.where((b_equal > 0) & (b_rank == nth), b_id, 0), 0))
        passed += tl.sum(b_equal, 0)
    return found


@triton.jit
def _by_id(p_row, size, number, least, best, temperature, BLOCK: tl.constexpr):
    """The id at quantile ``number`` of the values >= ``least``, in the order of ids."""
    b_total = tl.zeros([BLOCK], tl.float64)
    for at in range(0, size, BLOCK):
        _, b_value, _, m_kept = _values(p_row, at, size, least, 0, BLOCK)
        b_total += _weight(b_value, m_kept, best, temperature, False)
    wanted = tl.sum(b_total, 0) * number
    found = tl.zeros([], tl.int32) + size
    last = tl.zeros([], tl.int32)
    passed = tl.zeros([], tl.float64)
    for at in range(0, size, BLOCK):
        b_id, b_value, _, m_kept = _values(p_row, at, size, least, 0, BLOCK)
        b_weight = _weight(b_value, m_kept, best, temperature, False)
        b_head = tl.cumsum(b_weight, 0) + passed
        found = tl.minimum(found, tl.min(tl.where(m_kept & (b_head > wanted), b_id, size), 0))
        last = tl.maximum(last, tl.max(tl.where(m_kept, b_id, 0), 0))
        passed += tl.sum(b_weight, 0)
    return tl.minimum(found, last)


@triton.jit
def _by_value(p_row, size, number, top_k, top_p, least, best, temperature, BLOCK: tl.constexpr):
    """The id at quantile ``number`` of what top_k and top_p leave, in the order of falling values.

    What is left is everything above key ``floor`` and the first ``ties`` values at it.
    """
    floor = tl.zeros([], tl.int64)
    ties = tl.zeros([], tl.float64)
    if top_k > 0:
        wanted = top_k.to(tl.float64)
        floor = _search(p_row, size, wanted, least, floor, best, temperature, True, False, BLOCK)
        above, equal = _around(p_row, size, floor, least, best, temperature, True, BLOCK)
        ties = tl.minimum(wanted - above, equal)
    above, _ = _around(p_row, size, floor, least, best, temperature, False, BLOCK)
    # Without top_k there is no floor, and no value of its key.
    at_floor = tl.where(ties > 0, _key_value(floor), best)
    total = above + ties * tl.exp((at_floor - best) / temperature)
    if top_p < 1:
        wanted = top_p * total
        key = _search(p_row, size, wanted, least, floor, best, temperature, False, False, BLOCK)
        above, equal = _around(p_row, size, key, least, best, temperature, False, BLOCK)
        each = tl.exp((_key_value(key) - best) / temperature)
        most = tl.where(key == floor, ties, equal)
        ties = tl.minimum(tl.maximum(tl.math.ceil((wanted - above) / tl.where(each > 0, each, 1.0)), 1.0), most)
        floor = key
        total = above + ties * each
    wanted = number * total
    key = _search(p_row, size, wanted, least, floor, best, temperature, False, True, BLOCK)
    above, equal = _around(p_row, size, key, least, best, temperature, False, BLOCK)
    each = tl.exp((_key_value(key) - best) / temperature)
    most = tl.where(key == floor, ties, equal)
    nth = tl.minimum(tl.math.floor((wanted - above) / tl.where(each > 0, each, 1.0)), most - 1)
    return _nth_equal(p_row, size, key, tl.maximum(nth, 0.0).to(tl.int32), BLOCK)


@triton.jit
def _sample_kernel(
    p_token,  # [rows] int64
    p_logits,  # [rows, size] float32, rows stride_row apart
    p_temperature,  # [rows] float64
    p_top_k,  # [rows] int32
    p_top_p,  # [rows] float64
    p_min_p,  # [rows] float64
    p_seed,  # [rows] int64
    p_position,  # [rows] int64
    size,
    stride_row,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * stride_row
    # The best value, and of equal ones the lowest id.
    best32 = tl.zeros([], tl.float32) + float("-inf")
    token = tl.zeros([], tl.int32)
    num_bad = tl.zeros([], tl.int32)
    for at in range(0, size, BLOCK):
        b_id = at + tl.arange(0, BLOCK)
        b_value = tl.load(p_row + b_id, mask=b_id < size, other=float("-inf"))
        # Comparisons with NaN are false. It is kept out of the maximum, whose NaN differ between machines.
        m_finite = tl.abs(b_value) < float("inf")
        num_bad += tl.sum(((b_id < size) & (m_finite == 0)).to(tl.int32), 0)
        b_value = tl.where(m_finite, b_value, float("-inf"))
        highest = tl.max(b_value, 0)
        first = tl.min(tl.where(b_value == highest, b_id, size), 0)
        token = tl.where(highest > best32, first, token)
        best32 = tl.maximum(best32, highest)
    temperature = tl.load(p_temperature + i_row)
    if (temperature > 0) & (num_bad == 0):
        best = best32.to(tl.float64)
        top_k, top_p, min_p = tl.load(p_top_k + i_row), tl.load(p_top_p + i_row), tl.load(p_min_p + i_row)
        least = tl.zeros([], tl.float32) + float("-inf")
        left = tl.zeros([], tl.float64) + size
        if min_p > 0:
            least = (best + temperature * tl.log(min_p)).to(tl.float32)
            left, _ = _around(p_row, size, tl.zeros([], tl.int64), least, best, temperature, True, BLOCK)
        # top_k that keeps all that min_p left is off, which decides about the order.
        top_k = tl.where(top_k < left, top_k, 0)
        number = _uniform(tl.load(p_seed + i_row), tl.load(p_position + i_row))
        if (top_k > 0) | (top_p < 1):
            token = _by_value(p_row, size, number, top_k, top_p, least, best, temperature, BLOCK)
        else:
            token = _by_id(p_row, size, number, least, best, temperature, BLOCK)
    tl.store(p_token + i_row, tl.where(num_bad == 0, token, -1).to(tl.int64))


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """One token id per row of ``logits`` [rows, vocabulary] float32, int64; -1 where there is none to draw."""
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _sample_kernel[(rows,)](out, logits, *draws, size, logits.stride(0), BLOCK=_BLOCK, num_warps=8)
    return out
