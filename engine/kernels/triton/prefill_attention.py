"""Causal attention of prompt chunks over paged or contiguous keys and values: softmax(q K^T * scale) V.

Bound by matrix operations: 4 * H * D flops per (query, key) pair. A tile is BLOCK_M // GROUP tokens of one sequence
times the GROUP query heads that share a KV head. Key tiles are at absolute multiples of BLOCK_N, and a tile that a row
does not see leaves its bits unchanged, so a row's result does not depend on how its prompt was cut into chunks. Only
key tiles that cross the diagonal or the edge of the window are masked. Grid: (tiles * KV heads), or fewer programs that
take one after another; the host lists tiles longest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.decode_attention import NO_WINDOW
from engine.kernels.triton.language import dot, load_rows, narrow, online_softmax, page_offsets
from engine.kernels.triton.launch import kernel
from engine.kernels.triton.tuning import PrefillTile
from engine.staging import to_device


class Chunk(NamedTuple):
    """Queries at rows [row, row + num_tokens) and positions [start, start + num_tokens) of a sequence."""

    row: int
    start: int
    num_tokens: int
    # Row of the block table; for contiguous keys, of the list of first rows.
    sequence: int


@triton.jit
def _key_offsets(
    p_table, n, b_token, m_token, stride_block,
    D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, IS_PAGED: tl.constexpr,
):  # fmt: skip
    if IS_PAGED:
        return page_offsets(p_table, n, b_token, m_token, stride_block, D, BLOCK_TOKENS, BLOCK_N)
    # Contiguous: the table holds the sequence's first row, and the row stride is stride_block.
    return (tl.load(p_table) + b_token).to(tl.int64) * stride_block


@triton.jit
def _attend(
    b_acc, b_max, b_sum, b_query, b_position, n, last, first,
    p_key, p_value, p_table, scale_log2, window, stride_block,
    D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_PAGED: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    b_token = n + tl.arange(0, BLOCK_N)
    if IS_MASKED:
        # Positions that no query of the tile sees are not read: they may hold anything.
        m_token = (b_token <= last) & (b_token >= first)
    else:
        m_token = tl.full([BLOCK_N], True, tl.int1)
    b_offset = _key_offsets(p_table, n, b_token, m_token, stride_block, D, BLOCK_TOKENS, BLOCK_N, IS_PAGED)
    b_key = load_rows(p_key, b_offset, m_token, D, BLOCK_D)
    b_scores = dot(b_query, tl.trans(b_key), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if IS_MASKED:
        m_seen = (b_token[None, :] <= b_position[:, None]) & (b_token[None, :] > b_position[:, None] - window)
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
    b_weight, b_rescale, b_max, b_sum = online_softmax(b_scores, b_max, b_sum, scale_log2)
    b_value = load_rows(p_value, b_offset, m_token, D, BLOCK_D)
    b_acc = dot(narrow(b_weight, b_value.dtype), b_value, b_acc * b_rescale[:, None])
    return b_acc, b_max, b_sum


@kernel(do_not_specialize=["num_tiles", "stride_table"])
def _prefill_kernel(
    p_out,  # [rows, H, D]
    p_query,  # [rows, H, D], rows stride_query apart
    p_key,  # paged: [blocks, HKV, 2, BLOCK_TOKENS, D]; contiguous: [rows, HKV, D], rows stride_block apart
    p_value,  # values of the same
    p_tables,  # paged: [sequences, stride_table] int32 block ids; contiguous: [sequences, 1] int32 first rows
    p_tiles,  # [num_tiles, 4] int32: first row, first position, tokens, sequence
    num_tiles,
    scale_log2,
    window,
    stride_query,
    stride_block,
    stride_head,
    stride_table,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_PAGED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    b_packed, b_column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    for i_item in range(tl.program_id(0), num_tiles * HKV, tl.num_programs(0)):
        i_head = i_item % HKV
        p_tile = p_tiles + i_item // HKV * 4
        row, start = tl.load(p_tile), tl.load(p_tile + 1)
        count, sequence = tl.load(p_tile + 2), tl.load(p_tile + 3).to(tl.int64)
        b_within = b_packed // GROUP
        m_row = b_within < count
        b_position = start + b_within
        b_head = i_head * GROUP + b_packed % GROUP
        b_row = (row + b_within).to(tl.int64)
        b_query = load_rows(p_query, b_row * stride_query + b_head * D, m_row, D, BLOCK_D)
        p_table = p_tables + sequence * stride_table
        p_k, p_v = p_key + i_head * stride_head, p_value + i_head * stride_head

        last = start + count - 1
        first = tl.maximum(start + 1 - window, 0)
        # Keys in [low, left) cross the edge of some row's window; those in [left, right) are seen by every row.
        low = first // BLOCK_N * BLOCK_N
        right = (start + 1) // BLOCK_N * BLOCK_N
        left = low
        if HAS_WINDOW:
            left = (tl.maximum(last + 1 - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
            left = tl.maximum(low, tl.minimum(left, right))
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if HAS_WINDOW:
            for n in range(low, left, BLOCK_N):
                b_acc, b_max, b_sum = _attend(
                    b_acc, b_max, b_sum, b_query, b_position, n, last, first,
                    p_k, p_v, p_table, scale_log2, window, stride_block,
                    D, BLOCK_TOKENS, BLOCK_M, BLOCK_N, BLOCK_D, IS_PAGED, True,
                )  # fmt: skip
        for n in range(left, right, BLOCK_N):
            b_acc, b_max, b_sum = _attend(
                b_acc, b_max, b_sum, b_query, b_position, n, last, first,
                p_k, p_v, p_table, scale_log2, window, stride_block,
                D, BLOCK_TOKENS, BLOCK_M, BLOCK_N, BLOCK_D, IS_PAGED, False,
            )  # fmt: skip
        for n in range(tl.maximum(left, right), last + 1, BLOCK_N):
            b_acc, b_max, b_sum = _attend(
                b_acc, b_max, b_sum, b_query, b_position, n, last, first,
                p_k, p_v, p_table, scale_log2, window, stride_block,
                D, BLOCK_TOKENS, BLOCK_M, BLOCK_N, BLOCK_D, IS_PAGED, True,
            )  # fmt: skip
        # Only padding rows of the tile can have seen no key.
        b_result = b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
        p_to = p_out + (b_row * (HKV * GROUP) + b_head)[:, None] * D + b_column[None, :]
        m_result = m_row[:, None] & (b_column < D)[None, :]
        tl.store(p_to, narrow(b_result, p_out.dtype.element_ty), mask=m_result)


def list_tiles(chunks: Sequence[Chunk], group_size: int, block_m: int) -> np.ndarray:
    """[tiles, 4] int32: first row, first position, tokens, sequence; those with the longest context first."""
    step = block_m // group_size
    assert step > 0, f"a tile of {block_m} rows holds no token of {group_size} heads"
    parts = []
    for chunk in chunks:
        offset = np.arange(0, chunk.num_tokens, step, dtype=np.int32)
        counts = np.minimum(chunk.num_tokens - offset, step)
        same = np.full_like(offset, chunk.sequence)
        parts.append(np.stack((chunk.row + offset, chunk.start + offset, counts, same), axis=1))
    if not parts:
        return np.empty((0, 4), dtype=np.int32)
    tiles = np.concatenate(parts).astype(np.int32)
    return tiles[np.argsort(-(tiles[:, 1] + tiles[:, 2]), kind="stable")]


def tiles_on(device: torch.device, tiles: np.ndarray) -> Tensor:
    """The list on the device of the kernel."""
    return to_device(torch.from_numpy(np.ascontiguousarray(tiles)), device)


def paged_prefill_attention(
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    tiles: Tensor,
    *,
    scale_log2: float,
    tile: PrefillTile,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """query [rows, heads, head_dim] -> the same; the chunk's own keys and values are already in the cache.

    ``tables`` [sequences, blocks] int32; ``tiles`` from ``list_tiles`` with the same block_m. Rows in no tile are not
    written.
    """
    block_tokens, head_dim = cache.shape[3], cache.shape[4]
    flat = cache.view(-1)
    return _launch(
        query, flat, flat[block_tokens * head_dim :], tables, tiles, scale_log2, tile, window, out,
        num_kv_heads=cache.shape[1], stride_block=cache.stride(0), stride_head=cache.stride(1),
        block_tokens=block_tokens, is_paged=True,
    )  # fmt: skip


def contiguous_prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_rows: Tensor,
    tiles: Tensor,
    *,
    scale_log2: float,
    tile: PrefillTile,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The same with key, value [rows, kv_heads, head_dim] of equal strides: position p of a sequence is row
    ``first_rows[sequence, 0] + p``."""
    assert key.stride() == value.stride()
    return _launch(
        query, key, value, first_rows, tiles, scale_log2, tile, window, out,
        num_kv_heads=key.shape[1], stride_block=key.stride(0), stride_head=key.stride(1),
        block_tokens=1, is_paged=False,
    )  # fmt: skip


def _launch(
    query: Tensor, key: Tensor, value: Tensor, tables: Tensor, tiles: Tensor, scale_log2: float, tile: PrefillTile,
    window: int | None, out: Tensor | None, *, num_kv_heads: int, stride_block: int, stride_head: int,
    block_tokens: int, is_paged: bool,
) -> Tensor:  # fmt: skip
    heads, head_dim = query.shape[1:]
    out = query.new_empty(query.shape) if out is None else out
    items = len(tiles) * num_kv_heads
    if items == 0:
        return out
    _prefill_kernel[(items if tile.num_programs == 0 else min(items, tile.num_programs),)](
        out,
        query,
        key,
        value,
        tables,
        tiles,
        len(tiles),
        scale_log2,
        NO_WINDOW if window is None else window,
        query.stride(0),
        stride_block,
        stride_head,
        tables.stride(0),
        HKV=num_kv_heads,
        GROUP=heads // num_kv_heads,
        D=head_dim,
        BLOCK_TOKENS=block_tokens,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim),
        IS_PAGED=is_paged,
        HAS_WINDOW=window is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
