"""All kernels that are neither a product nor an attention. Bound by bytes: each value is read once and written once.

Reductions run over one row inside one program, so a row's bits depend on that row alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.language import narrow
from engine.kernels.triton.launch import kernel

# Elements per program of silu_mul and embed.
_COLUMNS = 1024
# Head elements per program of the rotation.
_ROTATED = 4096


@kernel
def _rms_norm_kernel(
    p_out,  # [rows, COLUMNS]
    p_x,  # [rows, COLUMNS]; with a delta, the sum is written here
    p_delta,  # [rows, COLUMNS] or None
    p_weight,  # [COLUMNS]
    eps,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    b_column = tl.arange(0, BLOCK)
    m_column = b_column < COLUMNS
    b_x = tl.load(p_x + i_row * COLUMNS + b_column, mask=m_column, other=0.0).to(tl.float32)
    if HAS_DELTA:
        b_x += tl.load(p_delta + i_row * COLUMNS + b_column, mask=m_column, other=0.0).to(tl.float32)
        # The stored value is the one that is normed: rounded once.
        b_kept = narrow(b_x, p_out.dtype.element_ty)
        tl.store(p_x + i_row * COLUMNS + b_column, b_kept, mask=m_column)
        b_x = b_kept.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(b_x * b_x, 0) / COLUMNS + eps)
    b_normed = narrow(b_x * scale, p_out.dtype.element_ty).to(tl.float32)
    b_weight = tl.load(p_weight + b_column, mask=m_column, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * COLUMNS + b_column, narrow(b_normed * b_weight, p_out.dtype.element_ty), mask=m_column)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [rows, features] / sqrt(mean(x^2) + eps) * weight, rounded before and after the weight."""
    return _rms_norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x += delta in place, rounded; then ``rms_norm`` of it."""
    assert delta.is_contiguous()
    return _rms_norm(x, delta, weight, eps)


def _rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    assert x.is_contiguous()
    rows, columns = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(columns)
    if rows:
        _rms_norm_kernel[(rows,)](
            out,
            x,
            delta,
            weight,
            eps,
            COLUMNS=columns,
            BLOCK=block,
            HAS_DELTA=delta is not None,
            num_warps=max(1, min(8, block // 512)),
        )
    return out


@kernel
def _silu_mul_kernel(
    p_out,  # [rows, columns]
    p_gate_up,  # [rows, 2 * columns]
    columns,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    b_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_column = b_column < columns
    p_gate = p_gate_up + i_row * 2 * columns + b_column
    b_gate = tl.load(p_gate, mask=m_column, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + columns, mask=m_column, other=0.0).to(tl.float32)
    b_out = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(p_out + i_row * columns + b_column, narrow(b_out, p_out.dtype.element_ty), mask=m_column)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 * features] -> silu(first half) * second half."""
    assert gate_up.is_contiguous()
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, columns)
    if rows:
        block = min(_COLUMNS, triton.next_power_of_2(columns))
        _silu_mul_kernel[(rows, triton.cdiv(columns, block))](out, gate_up, columns, BLOCK=block, num_warps=4)
    return out


@kernel
def _embed_kernel(
    p_out,  # [rows, columns]
    p_table,  # [vocabulary, columns]
    p_token,  # [rows] int64
    p_drawn,  # [draws] int64: the token that ~i stands for
    columns,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    b_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_column = b_column < columns
    token = tl.load(p_token + i_row).to(tl.int64)
    token = tl.load(p_drawn + (-1 - token), mask=token < 0, other=token)
    # Still negative: no token was drawn, and the row's result is not used.
    token = tl.maximum(token, 0)
    b_value = tl.load(p_table + token * columns + b_column, mask=m_column)
    tl.store(p_out + i_row * columns + b_column, b_value, mask=m_column)


def embed(table: Tensor, token_ids: Tensor, drawn: Tensor | None = None) -> Tensor:
    """Rows of ``table`` [vocabulary, features] by id; an id ~i stands for ``drawn[i]``. If that is negative, no
    token was drawn, and the result is any row."""
    rows, columns = len(token_ids), table.shape[1]
    out = table.new_empty(rows, columns)
    if rows:
        block = min(_COLUMNS, triton.next_power_of_2(columns))
        _embed_kernel[(rows, triton.cdiv(columns, block))](
            out, table, token_ids, token_ids if drawn is None else drawn, columns, BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def _norm_heads(b_first, b_second, m_normed, p_weight, b_half, m_half, HALF: tl.constexpr, eps):
    """RMS norm of heads [HEADS, HALF] twice (their halves), by one weight; other heads are unchanged."""
    scale = tl.math.rsqrt((tl.sum(b_first * b_first, 1) + tl.sum(b_second * b_second, 1)) / (2 * HALF) + eps)
    element = p_weight.dtype.element_ty
    b_scale = scale[:, None]
    b_w1 = tl.load(p_weight + b_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
    b_w2 = tl.load(p_weight + HALF + b_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
    # Rounded as the unfused norm rounds, before the weight and after it.
    b_n1 = narrow(narrow(b_first * b_scale, element).to(tl.float32) * b_w1, element).to(tl.float32)
    b_n2 = narrow(narrow(b_second * b_scale, element).to(tl.float32) * b_w2, element).to(tl.float32)
    return tl.where(m_normed[:, None], b_n1, b_first), tl.where(m_normed[:, None], b_n2, b_second)


@kernel
def _rope_store_kernel(
    p_query,  # [rows, H, D]
    p_cache,  # [blocks, HKV, 2, BLOCK_TOKENS, D]
    p_qkv,  # [rows, (H + 2 * HKV) * D]
    p_cos,  # [rows, D / 2] float32
    p_sin,  # [rows, D / 2] float32
    p_q_norm,  # [D] or None
    p_k_norm,  # [D] or None
    p_slot,  # [rows] int64, block * BLOCK_TOKENS + offset; negative: padding, not written to the cache
    eps,
    stride_block,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF
    i_row = tl.program_id(0).to(tl.int64)
    b_head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    b_half = tl.arange(0, BLOCK_HALF)
    m_half = b_half < HALF
    is_query, is_key = b_head < H, (b_head >= H) & (b_head < H + HKV)
    is_value = (b_head >= H + HKV) & (b_head < H + 2 * HKV)
    p_first = p_qkv + i_row * ((H + 2 * HKV) * D) + b_head[:, None] * D + b_half[None, :]
    m_first = (b_head < H + 2 * HKV)[:, None] & m_half[None, :]
    b_first = tl.load(p_first, mask=m_first, other=0.0).to(tl.float32)
    b_second = tl.load(p_first + HALF, mask=m_first, other=0.0).to(tl.float32)
    b_n1, b_n2 = b_first, b_second
    if HAS_NORM:
        b_n1, b_n2 = _norm_heads(b_n1, b_n2, is_query, p_q_norm, b_half, m_half, HALF, eps)
        b_n1, b_n2 = _norm_heads(b_n1, b_n2, is_key, p_k_norm, b_half, m_half, HALF, eps)
    b_cos = tl.load(p_cos + i_row * HALF + b_half, mask=m_half, other=0.0)[None, :]
    b_sin = tl.load(p_sin + i_row * HALF + b_half, mask=m_half, other=0.0)[None, :]
    b_r1, b_r2 = b_n1 * b_cos - b_n2 * b_sin, b_n2 * b_cos + b_n1 * b_sin
    element = p_query.dtype.element_ty
    p_to = p_query + i_row * (H * D) + b_head[:, None] * D + b_half[None, :]
    tl.store(p_to, narrow(b_r1, element), mask=is_query[:, None] & m_half[None, :])
    tl.store(p_to + HALF, narrow(b_r2, element), mask=is_query[:, None] & m_half[None, :])
    slot = tl.load(p_slot + i_row)
    if slot >= 0:
        b_kv = tl.where(is_value, b_head - H - HKV, b_head - H)
        b_slot = (b_kv * 2 + is_value.to(tl.int32)) * (BLOCK_TOKENS * D) + slot % BLOCK_TOKENS * D
        p_to = p_cache + slot // BLOCK_TOKENS * stride_block + b_slot[:, None] + b_half[None, :]
        m_kv = (is_key | is_value)[:, None] & m_half[None, :]
        tl.store(p_to, narrow(tl.where(is_value[:, None], b_first, b_r1), element), mask=m_kv)
        tl.store(p_to + HALF, narrow(tl.where(is_value[:, None], b_second, b_r2), element), mask=m_kv)


class _RopeShape(NamedTuple):
    """What of a launch depends on the model alone."""

    num_heads: int
    # Along the heads.
    num_programs: int
    constants: dict[str, int]


@functools.cache
def _rope_shape(num_all_heads: int, num_kv_heads: int, head_dim: int, block_tokens: int) -> _RopeShape:
    """``num_all_heads``: of queries, keys and values."""
    block_half = triton.next_power_of_2(head_dim // 2)
    block_h = min(triton.next_power_of_2(num_all_heads), max(1, _ROTATED // (2 * block_half)))
    num_heads = num_all_heads - 2 * num_kv_heads
    constants = {
        "H": num_heads,
        "HKV": num_kv_heads,
        "HALF": head_dim // 2,
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_H": block_h,
        "BLOCK_HALF": block_half,
    }
    return _RopeShape(num_heads, triton.cdiv(num_all_heads, block_h), constants)


def rope_store(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Norms queries and keys, rotates both, writes keys and values to their pages: queries [rows, heads, head_dim].

    qkv [rows, (heads + 2 * kv_heads) * head_dim]; cos, sin [rows, head_dim / 2] float32; slot_mapping [rows] int64,
    block * block_tokens + offset, negative for padding.
    """
    assert qkv.is_contiguous()
    rows, width = qkv.shape
    _, num_kv_heads, _, block_tokens, head_dim = cache.shape
    shape = _rope_shape(width // head_dim, num_kv_heads, head_dim, block_tokens)
    query = qkv.new_empty(rows, shape.num_heads, head_dim)
    if rows:
        query_norm, key_norm = (None, None) if norms is None else norms
        _rope_store_kernel[rows, shape.num_programs](
            query, cache, qkv, cos, sin, query_norm, key_norm, slot_mapping, eps, cache.stride(0),
            **shape.constants, HAS_NORM=norms is not None, num_warps=4,
        )  # fmt: skip
    return query
