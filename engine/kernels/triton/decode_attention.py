"""Attention of single tokens over paged keys and values: softmax(q K^T * scale) V.

Bound by the bytes of the KV cache. A program takes one split (a fixed number of positions, aligned at absolute
positions) of one row and one KV head; the query heads of the group are the rows of its tile. Partial results are
combined in the order of the splits, so a row's bits depend on its own length and window alone. Grid: (splits, KV heads,
rows), and (heads, rows) to combine, skipped where one split is the most there can be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.language import dot, load_rows, narrow, online_softmax, page_offsets
from engine.kernels.triton.launch import kernel
from engine.kernels.triton.tuning import DecodeTile

# Splits combined at a time. Part of the numerics: sums within a chunk are a tree, chunks are added in order.
_COMBINED = 16
# A window larger than any context.
NO_WINDOW = 1 << 30


@kernel(do_not_specialize=["stride_table", "num_splits"])
def _split_kernel(
    p_out,  # [rows, H, D]
    p_partial,  # [rows, H, num_splits, D] float32, each normalized by its own sum
    p_lse,  # [rows, H, num_splits] float32, base-2 logarithm of the sum of exponentials
    p_query,  # [rows, H, D], rows stride_query apart
    p_cache,  # [blocks, HKV, 2, BLOCK_TOKENS, D]
    p_table,  # [sequences, stride_table] int32: block ids
    p_table_row,  # [rows] int32: the row's sequence
    p_length,  # [rows] int32: positions the row sees, its own included; 0 is padding
    p_prefix,  # [rows] int32: positions already in the partials, whole splits
    scale_log2,  # 1 / sqrt(D) * log2(e), or the model's own scale
    window,  # a row sees its last `window` positions
    stride_query,
    stride_block,
    stride_table,
    num_splits,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
):
    i_head, i_row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(p_length + i_row)
    first = tl.maximum(length - window, 0)
    i_slot = tl.program_id(0)
    i_split = first // SPLIT + i_slot
    start, stop = tl.maximum(i_split * SPLIT, first // BLOCK_N * BLOCK_N), tl.minimum((i_split + 1) * SPLIT, length)
    used = (length + SPLIT - 1) // SPLIT - first // SPLIT
    is_direct = used <= 1
    is_mine = (start < stop) | (i_slot == 0)
    if HAS_PREFIX:
        # A row with a prefix has at least its own token after it: at least two splits, never direct.
        is_mine &= i_split * SPLIT >= tl.load(p_prefix + i_row)
    if is_mine:
        b_group, b_column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
        m_group = b_group < GROUP
        b_head = i_head * GROUP + b_group
        b_query = load_rows(p_query, i_row * stride_query + b_head * D, m_group, D, BLOCK_D)
        p_table += tl.load(p_table_row + i_row).to(tl.int64) * stride_table
        p_key = p_cache + i_head * (2 * BLOCK_TOKENS * D)
        p_value = p_key + BLOCK_TOKENS * D
        b_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_G], tl.float32)
        b_acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for n in range(start, stop, BLOCK_N):
            b_token = n + tl.arange(0, BLOCK_N)
            m_token = (b_token >= first) & (b_token < length)
            b_offset = page_offsets(p_table, n, b_token, m_token, stride_block, D, BLOCK_TOKENS, BLOCK_N)
            b_key = load_rows(p_key, b_offset, m_token, D, BLOCK_D)
            b_scores = dot(b_query, tl.trans(b_key), tl.zeros([BLOCK_G, BLOCK_N], tl.float32))
            b_scores = tl.where(m_token[None, :], b_scores, float("-inf"))
            b_weight, b_rescale, b_max, b_sum = online_softmax(b_scores, b_max, b_sum, scale_log2)
            b_value = load_rows(p_value, b_offset, m_token, D, BLOCK_D)
            b_acc = dot(narrow(b_weight, b_value.dtype), b_value, b_acc * b_rescale[:, None])
        # Only padding has no sum; its result is zeros.
        b_result = b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
        m_result = m_group[:, None] & (b_column < D)[None, :]
        b_item = i_row * (HKV * GROUP) + b_head
        if is_direct:
            p_to = p_out + b_item[:, None] * D + b_column[None, :]
            tl.store(p_to, narrow(b_result, p_out.dtype.element_ty), mask=m_result)
        else:
            b_slot = b_item * num_splits + i_slot
            tl.store(p_partial + b_slot[:, None] * D + b_column[None, :], b_result, mask=m_result)
            tl.store(p_lse + b_slot, b_max * scale_log2 + tl.log2(b_sum), mask=m_group)


@kernel(do_not_specialize=["num_splits"])
def _combine_kernel(
    p_out,  # [rows, H, D]
    p_partial,  # [rows, H, num_splits, D] float32
    p_lse,  # [rows, H, num_splits] float32
    p_length,  # [rows] int32
    window,
    num_splits,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_row = tl.program_id(1).to(tl.int64)
    length = tl.load(p_length + i_row)
    first = tl.maximum(length - window, 0)
    used = (length + SPLIT - 1) // SPLIT - first // SPLIT
    if used > 1:
        i_item = i_row * H + tl.program_id(0)
        b_column = tl.arange(0, BLOCK_D)
        m_column = b_column < D
        p_lse += i_item * num_splits
        p_partial += i_item * num_splits * D
        best = float("-inf")
        total = 0.0
        b_acc = tl.zeros([BLOCK_D], tl.float32)
        for s in range(0, used, BLOCK_S):
            b_split = s + tl.arange(0, BLOCK_S)
            m_split = b_split < used
            b_lse = tl.load(p_lse + b_split, mask=m_split, other=float("-inf"))
            b_part = tl.load(
                p_partial + b_split[:, None] * D + b_column[None, :],
                mask=m_split[:, None] & m_column[None, :],
                other=0.0,
            )
            higher = tl.maximum(best, tl.max(b_lse, 0))
            b_weight = tl.math.exp2(b_lse - higher)
            rescale = tl.math.exp2(best - higher)
            total = total * rescale + tl.sum(b_weight, 0)
            b_acc = b_acc * rescale + tl.sum(b_weight[:, None] * b_part, 0)
            best = higher
        tl.store(p_out + i_item * D + b_column, narrow(b_acc / total, p_out.dtype.element_ty), mask=m_column)


def max_splits(max_length: int, window: int | None, split: int) -> int:
    """The maximum number of splits of a row of at most ``max_length`` positions; a window may begin inside one."""
    most = -(-max_length // split)
    return max(1, most if window is None else min(most, (window - 1) // split + 2))


def decode_attention(
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    table_rows: Tensor,
    lengths: Tensor,
    *,
    scale_log2: float,
    max_length: int,
    tile: DecodeTile,
    window: int | None = None,
    prefix: SharedPartials | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """query [rows, heads, head_dim] -> [rows, heads, head_dim]; each row's own key is already in the layer's cache.

    ``tables`` [sequences, blocks] int32, ``table_rows`` and ``lengths`` [rows] int32; length 0 is padding and gives
    zeros. ``max_length`` bounds the lengths; it is known on the host, so the launch is the same for a whole graph.
    """
    rows, heads, head_dim = query.shape
    num_kv_heads, block_tokens = cache.shape[1], cache.shape[3]
    num_splits = max_splits(max_length, window, tile.split_tokens)
    out = query.new_empty(query.shape) if out is None else out
    if rows == 0:
        return out
    partials = prefix or SharedPartials.empty(query, num_splits, lengths)
    assert partials.lse.shape[2] == num_splits
    seen = NO_WINDOW if window is None else window
    block_d = triton.next_power_of_2(head_dim)
    _split_kernel[(num_splits, num_kv_heads, rows)](
        out,
        partials.values,
        partials.lse,
        query,
        cache,
        tables,
        table_rows,
        lengths,
        partials.prefix_tokens,
        scale_log2,
        seen,
        query.stride(0),
        cache.stride(0),
        tables.stride(0),
        num_splits,
        HKV=num_kv_heads,
        GROUP=heads // num_kv_heads,
        D=head_dim,
        BLOCK_TOKENS=block_tokens,
        SPLIT=tile.split_tokens,
        BLOCK_G=max(16, triton.next_power_of_2(heads // num_kv_heads)),
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        HAS_PREFIX=prefix is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        _combine_kernel[(heads, rows)](
            out,
            partials.values,
            partials.lse,
            lengths,
            seen,
            num_splits,
            H=heads,
            D=head_dim,
            SPLIT=tile.split_tokens,
            BLOCK_D=block_d,
            BLOCK_S=_COMBINED,
            num_warps=4,
        )
    return out


class SharedPartials:
    """Partial results of a step's rows, by split; those of the first ``prefix_tokens`` positions are filled in
    already."""

    __slots__ = ("lse", "prefix_tokens", "values")

    def __init__(self, values: Tensor, lse: Tensor, prefix_tokens: Tensor) -> None:
        self.values = values  # [rows, heads, splits, head_dim] float32
        self.lse = lse  # [rows, heads, splits] float32
        self.prefix_tokens = prefix_tokens  # [rows] int32, multiples of the split

    @classmethod
    def empty(cls, query: Tensor, num_splits: int, prefix_tokens: Tensor) -> SharedPartials:
        """Memory for ``num_splits``; with one split nothing is written, so it is empty."""
        rows, heads, head_dim = query.shape
        splits = num_splits if num_splits > 1 else 0
        values = torch.empty(rows, heads, splits, head_dim, dtype=torch.float32, device=query.device)
        lse = torch.empty(rows, heads, num_splits, dtype=torch.float32, device=query.device)
        return cls(values, lse, prefix_tokens)
