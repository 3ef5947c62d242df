"""Shared parts of kernels: products that the interpreter computes as the hardware does, and addresses in paged
memory."""

from __future__ import annotations

import triton
import triton.language as tl

# Must be set before this module is imported: `triton.jit` reads the same variable when it decorates.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32. The interpreter multiplies the bits of bfloat16 as integers, so there the operands are
    float32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:  # noqa: RET505 - the compiler drops this branch, but not what follows a return
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """float32 to another dtype, rounded to nearest; the interpreter truncates bfloat16, so there it is rounded by
    hand."""
    if INTERPRET and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_even = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(b_x == b_x, b_even.to(tl.float32, bitcast=True), b_x).to(dtype)
    else:  # noqa: RET505 - the compiler drops this branch, but not what follows a return
        return b_x.to(dtype)


@triton.jit
def page_offsets(
    p_table, n, b_token, m_token, stride_block, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Elements from a head's keys in block 0 to those of ``b_token`` = n + [0, BLOCK_N), int64 [BLOCK_N].

    ``n`` is a multiple of BLOCK_N and the tile holds a position that exists.
    """
    if BLOCK_TOKENS % BLOCK_N == 0:
        page = tl.load(p_table + n // BLOCK_TOKENS).to(tl.int64)
        return page * stride_block + (n % BLOCK_TOKENS + tl.arange(0, BLOCK_N)) * D
    b_page = tl.load(p_table + b_token // BLOCK_TOKENS, mask=m_token, other=0)
    return b_page.to(tl.int64) * stride_block + (b_token % BLOCK_TOKENS) * D


@triton.jit
def load_rows(p_rows, b_offset, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D elements at ``b_offset`` [N] behind ``p_rows``, [N, BLOCK_D]; zeros for missing rows or columns."""
    b_column = tl.arange(0, BLOCK_D)
    if BLOCK_D == D:
        return tl.load(p_rows + b_offset[:, None] + b_column[None, :], mask=m_row[:, None], other=0.0)
    return tl.load(
        p_rows + b_offset[:, None] + b_column[None, :], mask=m_row[:, None] & (b_column < D)[None, :], other=0.0
    )


@triton.jit
def online_softmax(b_scores, b_max, b_sum, scale_log2):
    """One tile of scores [M, N], hidden ones -inf: (weights, rescaling of the accumulated result, maximum, sum).

    Weights are exp2((score - maximum) * scale_log2). A tile that a row does not see leaves the row's bits unchanged.
    """
    b_new = tl.maximum(b_max, tl.max(b_scores, 1))
    # A row that has seen nothing yet has maximum -inf; -inf - -inf would be NaN.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) * scale_log2
    b_weight = tl.math.exp2(b_scores * scale_log2 - b_shift[:, None])
    b_rescale = tl.math.exp2(b_max * scale_log2 - b_shift)
    return b_weight, b_rescale, b_new, b_sum * b_rescale + tl.sum(b_weight, 1)
