"""Finds the tokens that top_k and top_p keep: the bounding value, and the last id among the tokens that have it.

Without a sort: `sampling` computes the mass above a few cuts, so the bound is known to lie between two of them. The
values there are gathered in the order of ids, and a program per row searches them, in intervals of float32's order. If
there are too many to gather, it reads the whole row. Cuts affect the time, never the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.triton.launch import kernel
from engine.kernels.triton.rows import (
    COUNT_MASK,
    CUT_BITS,
    NUM_CUTS,
    best_of,
    cut_at,
    kept_masses,
    key_of,
    mass_of,
    row_of,
)


@triton.jit
def _share(part, total):
    """engine.mass.share"""
    wanted = tl.math.ceil(part * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(wanted, total), 1)


@kernel
def gather_kernel(
    p_plan,  # [rows, 6] int64: kind (0 keeps all, 1 top_k, 2 top_p), values, mass above, wanted, cut, cut above or -1
    p_bounds,  # [rows, 2] float32: the values to search lie from here up, but not from there up
    p_found,  # [rows, MAX_GATHERED] float32
    p_found_ids,  # [rows, MAX_GATHERED] int32
    p_span, p_cuts, p_values, p_places, p_changed, p_logits, p_slot, p_masked,  # as above
    p_scale, p_top_k, p_top_p, p_reach,
    size,
    stride_row,
    num_chunks,
    MAX_GATHERED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale, top_k, top_p = tl.load(p_scale + i_row), tl.load(p_top_k + i_row), tl.load(p_top_p + i_row)
    if (scale > 0) & ((top_k > 0) | (top_p < 1)):
        best, _, num_bad = best_of(p_values, p_places, i_row, num_chunks, CHUNKS)
        if (num_bad == 0) & (tl.abs(best) < float("inf")):
            b_cut, b_chunk = tl.arange(0, NUM_CUTS), tl.arange(0, CHUNKS)
            p_row_cuts = p_cuts + i_row * NUM_CUTS * CHUNKS + b_cut[:, None] * CHUNKS + b_chunk[None, :]
            b_both = tl.load(p_row_cuts, mask=(b_chunk < num_chunks)[None, :], other=0)
            b_counts = b_both & COUNT_MASK
            b_count, b_mass = tl.sum(b_counts, 1), tl.sum(b_both >> CUT_BITS, 1)
            is_k = (top_k > 0) & (top_k < tl.max(b_count, 0))
            wanted = tl.where(is_k, top_k.to(tl.int64), _share(top_p, tl.max(b_mass, 0)))
            i_cut = tl.sum((tl.where(is_k, b_count, b_mass) < wanted).to(tl.int32), 0)
            # top_p after top_k is a share of the mass that top_k keeps, so all of that mass is needed.
            i_above = tl.where(is_k, -1, i_cut - 1)
            mass_above = tl.sum(tl.where(b_cut == i_above, b_mass, 0), 0)
            b_sign = (b_cut == i_cut).to(tl.int64) - (b_cut == i_above).to(tl.int64)
            b_inside = tl.sum(b_counts * b_sign[:, None], 0)
            num_found = tl.sum(b_inside, 0)
            span = tl.load(p_span + i_row)
            low = cut_at(best, span, i_cut)
            high = tl.where(i_above >= 0, cut_at(best, span, i_above), float("inf"))
            kind = tl.where(is_k, 1, tl.where(top_p < 1, 2, 0))
            if i_chunk == 0:
                p_plan += i_row * 6
                tl.store(p_plan, kind.to(tl.int64))
                tl.store(p_plan + 1, num_found)
                tl.store(p_plan + 2, mass_above)
                tl.store(p_plan + 3, wanted)
                tl.store(p_plan + 4, i_cut.to(tl.int64))
                tl.store(p_plan + 5, i_above.to(tl.int64))
                tl.store(p_bounds + i_row * 2, low)
                tl.store(p_bounds + i_row * 2 + 1, high)
            num_mine = tl.sum(tl.where(b_chunk == i_chunk, b_inside, 0), 0)
            if (kind > 0) & (num_found <= MAX_GATHERED) & (num_mine > 0):
                p_row = row_of(p_logits, p_changed, p_slot, p_masked, i_row, size, stride_row)
                b_id = i_chunk * CHUNK + tl.arange(0, CHUNK)
                b_value = tl.load(p_row + b_id, mask=b_id < size, other=float("-inf"))
                least = (best.to(tl.float64) + tl.load(p_reach + i_row)).to(tl.float32)
                m_found = (b_id < size) & (b_value >= least) & (b_value >= low) & ((b_value >= high) == 0)
                before = tl.sum(tl.where(b_chunk < i_chunk, b_inside, 0), 0)
                b_to = i_row * MAX_GATHERED + before + tl.cumsum(m_found.to(tl.int32), 0) - 1
                tl.store(p_found + b_to, b_value, mask=m_found)
                tl.store(p_found_ids + b_to, b_id, mask=m_found)


@triton.jit
def _value_of(key):
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _found(p_from, at, num_values, least, low, high, BLOCK: tl.constexpr):
    """A block of values, their keys, and which of them are searched."""
    b_at = at + tl.arange(0, BLOCK)
    b_value = tl.load(p_from + b_at, mask=b_at < num_values, other=float("-inf"))
    m_found = (b_at < num_values) & (b_value >= least) & (b_value >= low) & ((b_value >= high) == 0)
    return b_value, key_of(b_value), m_found


@triton.jit
def _search(
    p_from, num_values, least, low, high, wanted, above, key, end, best, scale,
    IS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key from which on values have the mass ``wanted``, with ``above``; in [key, end), where ``key`` is
    one."""
    while end - key > 1:
        step = (end - key + 3) >> 2
        b_low, b_middle, b_high = (
            tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64),
        )  # fmt: skip
        for at in range(0, num_values, BLOCK):
            b_value, b_key, m_found = _found(p_from, at, num_values, least, low, high, BLOCK)
            if IS_COUNT:
                b_weight = m_found.to(tl.int64)
            else:
                b_weight = tl.where(m_found, mass_of((b_value - best) * scale), 0)
            b_low += tl.where(b_key >= key + step, b_weight, 0)
            b_middle += tl.where(b_key >= key + 2 * step, b_weight, 0)
            b_high += tl.where(b_key >= key + 3 * step, b_weight, 0)
        num_steps = (above + tl.sum(b_low, 0) >= wanted).to(tl.int64)
        num_steps += (above + tl.sum(b_middle, 0) >= wanted).to(tl.int64)
        num_steps += (above + tl.sum(b_high, 0) >= wanted).to(tl.int64)
        key += num_steps * step
        end = tl.minimum(end, key + step)
    return key


@triton.jit
def _around(p_from, num_values, least, low, high, key, best, scale, BLOCK: tl.constexpr):
    """(mass of values above ``key``, their number, number of those at it)."""
    b_mass, b_count = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    b_equal = tl.zeros([BLOCK], tl.int64)
    for at in range(0, num_values, BLOCK):
        b_value, b_key, m_found = _found(p_from, at, num_values, least, low, high, BLOCK)
        m_above = m_found & (b_key > key)
        b_mass += tl.where(m_above, mass_of((b_value - best) * scale), 0)
        b_count += m_above.to(tl.int64)
        b_equal += (m_found & (b_key == key)).to(tl.int64)
    return tl.sum(b_mass, 0), tl.sum(b_count, 0), tl.sum(b_equal, 0)


@triton.jit
def _nth_equal(p_from, num_values, least, low, high, key, nth, BLOCK: tl.constexpr):
    """Index of the ``nth`` value of that key, from 0, in memory order, which is the order of ids."""
    place = tl.zeros([], tl.int32)
    passed = tl.zeros([], tl.int32)
    for at in range(0, num_values, BLOCK):
        _, b_key, m_found = _found(p_from, at, num_values, least, low, high, BLOCK)
        b_equal = (m_found & (b_key == key)).to(tl.int32)
        b_rank = tl.cumsum(b_equal, 0) - 1 + passed
        b_at = at + tl.arange(0, BLOCK)
        place = tl.maximum(place, tl.max(tl.where((b_equal > 0) & (b_rank == nth), b_at, 0), 0))
        passed += tl.sum(b_equal, 0)
    return place


@kernel
def select_kernel(
    p_floor,  # [rows, 2] int32: larger keys are kept, and of this key ids up to the second number
    p_plan, p_bounds, p_found, p_found_ids,  # as above
    p_values, p_places, p_changed, p_logits, p_slot, p_masked, p_scale, p_top_k, p_top_p, p_reach,
    size,
    stride_row,
    num_chunks,
    MAX_GATHERED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    scale, top_k, top_p = tl.load(p_scale + i_row), tl.load(p_top_k + i_row), tl.load(p_top_p + i_row)
    if (scale > 0) & ((top_k > 0) | (top_p < 1)):
        best, _, num_bad = best_of(p_values, p_places, i_row, num_chunks, CHUNKS)
        if (num_bad == 0) & (tl.abs(best) < float("inf")):
            kind, num_found = tl.load(p_plan + i_row * 6), tl.load(p_plan + i_row * 6 + 1)
            floor = tl.full([], -2147483648, tl.int64)
            last = tl.zeros([], tl.int32) + size
            if kind > 0:
                is_gathered = num_found <= MAX_GATHERED
                num_values = tl.where(is_gathered, num_found, size).to(tl.int32)
                p_from = p_found + i_row * MAX_GATHERED
                if num_found > MAX_GATHERED:
                    p_from = row_of(p_logits, p_changed, p_slot, p_masked, i_row, size, stride_row)
                least = (best.to(tl.float64) + tl.load(p_reach + i_row)).to(tl.float32)
                low, high = tl.load(p_bounds + i_row * 2), tl.load(p_bounds + i_row * 2 + 1)
                above, wanted = tl.load(p_plan + i_row * 6 + 2), tl.load(p_plan + i_row * 6 + 3)
                floor = key_of(low).to(tl.int64)
                end = key_of(best).to(tl.int64) + 1
                ties = tl.zeros([], tl.int64)
                num_equal = tl.zeros([], tl.int64)
                if kind == 1:
                    floor = _search(
                        p_from, num_values, least, low, high, wanted, above, floor, end, best, scale, True, BLOCK
                    )
                    mass, count, num_equal = _around(p_from, num_values, least, low, high, floor, best, scale, BLOCK)
                    ties = tl.minimum(wanted - count, num_equal)
                    wanted = _share(top_p, mass + ties * mass_of((_value_of(floor) - best) * scale))
                if top_p < 1:
                    key = _search(
                        p_from, num_values, least, low, high, wanted, above, floor,
                        tl.minimum(end, key_of(high).to(tl.int64)), best, scale, False, BLOCK,
                    )  # fmt: skip
                    mass, _num_above, num_equal = _around(p_from, num_values, least, low, high, key, best, scale, BLOCK)
                    each = tl.maximum(mass_of((_value_of(key) - best) * scale), 1)
                    most = tl.where((kind == 1) & (key == floor), ties, num_equal)
                    ties = tl.minimum(tl.maximum((wanted - above - mass + each - 1) // each, 1), most)
                    floor = key
                if ties < num_equal:
                    place = _nth_equal(p_from, num_values, least, low, high, floor, ties - 1, BLOCK)
                    last = tl.where(
                        is_gathered,
                        tl.load(p_found_ids + i_row * MAX_GATHERED + place, mask=is_gathered, other=0),
                        place,
                    )
            tl.store(p_floor + i_row * 2, floor.to(tl.int32))
            tl.store(p_floor + i_row * 2 + 1, last)


@kernel
def kept_kernel(
    p_masses, p_floor, p_plan, p_cuts, p_values, p_places, p_changed, p_logits, p_slot, p_masked,  # as above
    p_scale, p_top_k, p_top_p, p_reach,
    size,
    stride_row,
    num_chunks,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale, top_k, top_p = tl.load(p_scale + i_row), tl.load(p_top_k + i_row), tl.load(p_top_p + i_row)
    if (scale > 0) & ((top_k > 0) | (top_p < 1)):
        best, _, num_bad = best_of(p_values, p_places, i_row, num_chunks, CHUNKS)
        if (num_bad == 0) & (tl.abs(best) < float("inf")):
            kind, i_cut = tl.load(p_plan + i_row * 6), tl.load(p_plan + i_row * 6 + 4)
            i_above = tl.load(p_plan + i_row * 6 + 5)
            p_chunk_cuts = p_cuts + i_row * NUM_CUTS * CHUNKS + i_chunk
            to = tl.load(p_chunk_cuts + tl.where(kind > 0, i_cut, NUM_CUTS - 1) * CHUNKS)
            above = tl.load(p_chunk_cuts + i_above * CHUNKS, mask=i_above >= 0, other=0)
            # With nothing between the cuts, the values above them are kept.
            mass = tl.where(kind > 0, above, to) >> CUT_BITS
            if (kind > 0) & (((to - above) & COUNT_MASK) != 0):
                p_row = row_of(p_logits, p_changed, p_slot, p_masked, i_row, size, stride_row)
                reach = tl.load(p_reach + i_row)
                mass = tl.sum(kept_masses(p_row, p_floor, i_row, i_chunk, best, reach, scale, True, size, CHUNK), 0)
            tl.store(p_masses + i_row * CHUNKS + i_chunk, mass)
