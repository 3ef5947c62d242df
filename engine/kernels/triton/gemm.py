"""y = x W^T + b, and silu(x G^T) * (x U^T) of W = [G; U]: weights [out, in] as in checkpoints.

Two kernels of one numeric class: the inner dimension is cut into SPLITS parts, a part is summed in float32 in steps of
BLOCK_K, and the parts are added in order. Few rows: bound by the bytes of the weights; a program computes one part, and
W is the operand with many rows (so that Hopper's instructions fit one row of x), grid (tiles of W, SPLITS, tiles of x).
Many rows: bound by matrix operations; persistent programs take tiles, and the parts are added in registers. So a row's
bits depend on (out, in) alone, if the hardware sums a step alike in both; `probe` tests that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.triton.language import dot, narrow
from engine.kernels.triton.launch import kernel
from engine.kernels.triton.tuning import GemmPlan, GridTile, StreamTile

# Tiles of rows of x that are multiplied with W together, so that both stay in the L2 cache.
_GROUP_M = 8
_REDUCED_COLUMNS = 1024


@triton.jit
def _tile(p_matrix, row, k, num_rows, K, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, IS_DESCRIBED: tl.constexpr):
    """[BLOCK_R, BLOCK_K] of a row-major [num_rows, K]; zeros behind column K. Rows behind the last repeat it or are
    zeros; their results are not stored."""
    if IS_DESCRIBED:
        return p_matrix.load([row, k])
    else:  # noqa: RET505 - the compiler drops this branch, but not what follows a return
        b_row = tl.minimum(row + tl.arange(0, BLOCK_R), num_rows - 1).to(tl.int64)
        b_k = k + tl.arange(0, BLOCK_K)
        return tl.load(p_matrix + b_row[:, None] * K + b_k[None, :], mask=(b_k < K)[None, :], other=0.0)


@triton.jit
def _silu(b_x):
    return b_x / (1.0 + tl.exp(-b_x))


@kernel(do_not_specialize=["M"])
def _stream_kernel(
    p_out,  # [M, OUT]
    p_partial,  # [SPLITS, M, N] float32
    p_x,  # [M, K]
    p_weight,  # [N, K]; pointer or descriptor
    p_bias,  # [N] or None
    M,
    N,
    K,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_DESCRIBED: tl.constexpr,
):
    n, m, i_split = tl.program_id(0) * BLOCK_N, tl.program_id(2) * BLOCK_M, tl.program_id(1)
    part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    b_n, b_m = n + tl.arange(0, BLOCK_N), m + tl.arange(0, BLOCK_M)
    # With one part gate and up are combined here; with more, where the parts are added.
    GATE_HERE: tl.constexpr = IS_GATED and SPLITS == 1
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(i_split * part, tl.minimum((i_split + 1) * part, K), BLOCK_K):
        b_x = tl.trans(_tile(p_x, m, k, M, K, BLOCK_M, BLOCK_K, False))
        b_acc = dot(_tile(p_weight, n, k, N, K, BLOCK_N, BLOCK_K, IS_DESCRIBED), b_x, b_acc)
        if GATE_HERE:
            b_up = dot(_tile(p_weight, N // 2 + n, k, N, K, BLOCK_N, BLOCK_K, IS_DESCRIBED), b_x, b_up)
    if SPLITS > 1:
        b_to = (i_split.to(tl.int64) * M + b_m[None, :]) * N + b_n[:, None]
        tl.store(p_partial + b_to, b_acc, mask=(b_m < M)[None, :] & (b_n < N)[:, None])
    else:
        if HAS_BIAS:
            b_acc += tl.load(p_bias + b_n, mask=b_n < N, other=0.0).to(tl.float32)[:, None]
        columns = N
        if GATE_HERE:
            columns = N // 2
            if HAS_BIAS:
                b_up += tl.load(p_bias + columns + b_n, mask=b_n < columns, other=0.0).to(tl.float32)[:, None]
            b_acc = _silu(b_acc) * b_up
        b_to = b_m.to(tl.int64)[:, None] * columns + b_n[None, :]
        m_to = (b_m < M)[:, None] & (b_n < columns)[None, :]
        tl.store(p_out + b_to, narrow(tl.trans(b_acc), p_out.dtype.element_ty), mask=m_to)


@kernel(do_not_specialize=["M"])
def _reduce_kernel(
    p_out,  # [M, OUT]
    p_partial,  # [SPLITS, M, N] float32
    p_bias,  # [N] or None
    M,
    N,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    b_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = N // 2 if IS_GATED else N
    m_n = b_n < columns
    b_sum = tl.load(p_partial + i_row * N + b_n, mask=m_n, other=0.0)
    for s in tl.static_range(1, SPLITS):
        b_sum += tl.load(p_partial + (s * M + i_row) * N + b_n, mask=m_n, other=0.0)
    if HAS_BIAS:
        b_sum += tl.load(p_bias + b_n, mask=m_n, other=0.0).to(tl.float32)
    if IS_GATED:
        b_up = tl.load(p_partial + i_row * N + columns + b_n, mask=m_n, other=0.0)
        for s in tl.static_range(1, SPLITS):
            b_up += tl.load(p_partial + (s * M + i_row) * N + columns + b_n, mask=m_n, other=0.0)
        if HAS_BIAS:
            b_up += tl.load(p_bias + columns + b_n, mask=m_n, other=0.0).to(tl.float32)
        b_sum = _silu(b_sum) * b_up
    tl.store(p_out + i_row * columns + b_n, narrow(b_sum, p_out.dtype.element_ty), mask=m_n)


@kernel(do_not_specialize=["M"])
def _grid_kernel(
    p_out,  # [M, OUT]
    p_x,  # [M, K]; pointer or descriptor
    p_weight,  # [N, K]; pointer or descriptor
    p_bias,  # [N] or None
    M,
    N,
    K,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_DESCRIBED: tl.constexpr,
):
    columns = N // 2 if IS_GATED else N
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    for i_tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first_m = i_tile // (GROUP_M * tiles_n) * GROUP_M
        size_m = tl.minimum(tiles_m - first_m, GROUP_M)
        within = i_tile % (GROUP_M * tiles_n)
        m, n = (first_m + within % size_m) * BLOCK_M, within // size_m * BLOCK_N
        b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        b_up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if SPLITS == 1:
            b_sum, b_up_sum = _grid_part(
                b_sum, b_up_sum, p_x, p_weight, m, n, M, N, K, 0, K,
                BLOCK_M, BLOCK_N, BLOCK_K, IS_GATED, IS_DESCRIBED,
            )  # fmt: skip
        else:
            for s in range(SPLITS):
                b_part, b_up_part = _grid_part(
                    tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
                    p_x, p_weight, m, n, M, N, K, s * part, tl.minimum((s + 1) * part, K),
                    BLOCK_M, BLOCK_N, BLOCK_K, IS_GATED, IS_DESCRIBED,
                )  # fmt: skip
                b_sum += b_part
                b_up_sum += b_up_part
        b_m, b_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        m_n = b_n < columns
        if HAS_BIAS:
            b_sum += tl.load(p_bias + b_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            if HAS_BIAS:
                b_up_sum += tl.load(p_bias + columns + b_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
            b_sum = _silu(b_sum) * b_up_sum
        p_to = p_out + b_m.to(tl.int64)[:, None] * columns + b_n[None, :]
        tl.store(p_to, narrow(b_sum, p_out.dtype.element_ty), mask=(b_m < M)[:, None] & m_n[None, :])


@triton.jit
def _grid_part(
    b_acc, b_up, p_x, p_weight, m, n, M, N, K, start, stop,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_GATED: tl.constexpr, IS_DESCRIBED: tl.constexpr,
):  # fmt: skip
    for k in range(start, stop, BLOCK_K):
        b_x = _tile(p_x, m, k, M, K, BLOCK_M, BLOCK_K, IS_DESCRIBED)
        b_acc = dot(b_x, tl.trans(_tile(p_weight, n, k, N, K, BLOCK_N, BLOCK_K, IS_DESCRIBED)), b_acc)
        if IS_GATED:
            b_up = dot(b_x, tl.trans(_tile(p_weight, N // 2 + n, k, N, K, BLOCK_N, BLOCK_K, IS_DESCRIBED)), b_up)
    return b_acc, b_up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: GemmPlan, *, is_gated: bool = False) -> Tensor:
    """x [rows, in], weight [out, in], both contiguous -> [rows, out], or [rows, out / 2] if gate and up are
    combined."""
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert x.shape[1] == weight.shape[1]
    rows, columns = len(x), weight.shape[0] // 2 if is_gated else weight.shape[0]
    out = x.new_empty(rows, columns)
    if rows == 0:
        return out
    if rows < plan.grid_from_rows:
        _stream(out, x, weight, bias, plan, plan.stream, is_gated)
    else:
        _grid(out, x, weight, bias, plan, plan.grid, is_gated)
    return out


def first_rows(plan: GemmPlan) -> list[int]:
    """The smallest number of rows for each tile that ``linear`` chooses."""
    sizes = [16 << i for i in range(plan.stream.max_block_m.bit_length()) if 16 << i < plan.stream.max_block_m]
    return sorted({1, *(size + 1 for size in sizes if size + 1 < plan.grid_from_rows), plan.grid_from_rows})


def _stream(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, plan: GemmPlan, tile: StreamTile, is_gated: bool
) -> None:
    rows, columns = out.shape
    num_rows, inner = weight.shape
    block_m = max(16, min(tile.max_block_m, triton.next_power_of_2(rows)))
    is_split = plan.splits > 1
    partial = torch.empty(plan.splits if is_split else 0, rows, num_rows, dtype=torch.float32, device=x.device)
    described = _can_describe(weight, tile.has_descriptors)
    tiles = triton.cdiv(num_rows if is_split else columns, tile.block_n)
    _stream_kernel[(tiles, plan.splits, triton.cdiv(rows, block_m))](
        out,
        partial,
        x,
        TensorDescriptor.from_tensor(weight, [tile.block_n, plan.block_k]) if described else weight,
        bias,
        rows,
        num_rows,
        inner,
        SPLITS=plan.splits,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=plan.block_k,
        HAS_BIAS=bias is not None,
        IS_GATED=is_gated,
        IS_DESCRIBED=described,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if is_split:
        block = min(_REDUCED_COLUMNS, triton.next_power_of_2(columns))
        _reduce_kernel[(rows, triton.cdiv(columns, block))](
            out,
            partial,
            bias,
            rows,
            num_rows,
            SPLITS=plan.splits,
            BLOCK_N=block,
            HAS_BIAS=bias is not None,
            IS_GATED=is_gated,
            num_warps=4,
        )


def _grid(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, plan: GemmPlan, tile: GridTile, is_gated: bool
) -> None:
    rows, columns = out.shape
    block_n = tile.block_n // 2 if is_gated else tile.block_n
    described = _can_describe(weight, tile.has_descriptors) and _can_describe(x, True)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, block_n)
    _grid_kernel[(min(tiles, tile.num_programs) if tile.num_programs else tiles,)](
        out,
        TensorDescriptor.from_tensor(x, [tile.block_m, plan.block_k]) if described else x,
        TensorDescriptor.from_tensor(weight, [block_n, plan.block_k]) if described else weight,
        bias,
        rows,
        *weight.shape,
        SPLITS=plan.splits,
        BLOCK_M=tile.block_m,
        BLOCK_N=block_n,
        BLOCK_K=plan.block_k,
        GROUP_M=_GROUP_M,
        HAS_BIAS=bias is not None,
        IS_GATED=is_gated,
        IS_DESCRIBED=described,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _can_describe(matrix: Tensor, wanted: bool) -> bool:
    """Hardware descriptors need rows that begin at multiples of 16 bytes."""
    return wanted and matrix.shape[1] * matrix.element_size() % 16 == 0


def probe(weight: Tensor, plan: GemmPlan, *, is_gated: bool = False) -> bool:
    """Whether this hardware gives a row the same bits in both kernels and with every tile size.

    For gated weights it tests gate and up: two products with other tiles, in one kernel.
    """
    rows = max(plan.grid_from_rows, 2 * plan.stream.max_block_m) + 1
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    whole = linear(x, weight, None, plan, is_gated=is_gated)
    sizes = (1, 17, 33, plan.stream.max_block_m + 1)
    return all(torch.equal(linear(x[:size], weight, None, plan, is_gated=is_gated), whole[:size]) for size in sizes)
