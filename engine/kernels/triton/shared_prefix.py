"""Decode attention of sequences that begin with the same blocks: a shared prefix is read once for several rows.

The prefix pass fills the partial results of whole splits (queries of several rows in one tile, so that a byte of the
prefix serves all). The plain kernel computes the rest and combines both as it combines its own (Hydragen,
arXiv:2402.05099). Rows that share blocks are found in the block tables; the gain is predicted from bytes. Products of
taller tiles may round differently from the plain kernel's, so a row's bits can depend on its neighbours: off unless
requested. Grid: (splits, KV heads, tiles of rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.decode_attention import SharedPartials, decode_attention, max_splits
from engine.kernels.triton.language import dot, load_rows, narrow, online_softmax, page_offsets
from engine.kernels.triton.launch import kernel
from engine.kernels.triton.tuning import DecodeTile
from engine.staging import to_device

# Below this, the launch per layer costs more than the saved reads: about 4 us of memory traffic.
MIN_SAVED_BYTES = 16 << 20
# Memory traffic in the time in which the host queues one layer's kernels: about twelve launches of 10 us at 3.3 TB/s.
# An estimate, not measured. A recorded step has no such cost.
_QUEUEING_BYTES = 400 << 20
# Minimum predicted gain: larger than the likely error of the prediction.
_MIN_GAIN = 0.03


@dataclass(frozen=True, slots=True)
class Group:
    """Rows whose first ``num_splits`` splits are in the same blocks."""

    rows: tuple[int, ...]
    num_splits: int


@kernel(do_not_specialize=["stride_table", "num_splits"])
def _prefix_kernel(
    p_partial,  # [rows, H, num_splits, D] float32
    p_lse,  # [rows, H, num_splits] float32
    p_query,  # [rows, H, D], rows stride_query apart
    p_cache,  # [blocks, HKV, 2, BLOCK_TOKENS, D]
    p_tables,  # [sequences, stride_table] int32
    p_member,  # rows, group after group, int32
    p_tiles,  # [tiles, 4] int32: first member, members, sequence whose blocks are read, splits
    scale_log2,
    stride_query,
    stride_block,
    stride_table,
    num_splits,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_split, i_head = tl.program_id(0), tl.program_id(1)
    p_tile = p_tiles + tl.program_id(2) * 4
    if i_split < tl.load(p_tile + 3):
        first, count = tl.load(p_tile), tl.load(p_tile + 1)
        b_packed, b_column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        m_row = b_packed // GROUP < count
        b_row = tl.load(p_member + first + b_packed // GROUP, mask=m_row, other=0).to(tl.int64)
        b_head = i_head * GROUP + b_packed % GROUP
        b_query = load_rows(p_query, b_row * stride_query + b_head * D, m_row, D, BLOCK_D)
        p_table = p_tables + tl.load(p_tile + 2).to(tl.int64) * stride_table
        p_key = p_cache + i_head * (2 * BLOCK_TOKENS * D)
        p_value = p_key + BLOCK_TOKENS * D
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        m_token = tl.full([BLOCK_N], True, tl.int1)
        for n in range(i_split * SPLIT, (i_split + 1) * SPLIT, BLOCK_N):
            b_token = n + tl.arange(0, BLOCK_N)
            b_offset = page_offsets(p_table, n, b_token, m_token, stride_block, D, BLOCK_TOKENS, BLOCK_N)
            b_key = load_rows(p_key, b_offset, m_token, D, BLOCK_D)
            b_scores = dot(b_query, tl.trans(b_key), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            b_weight, b_rescale, b_max, b_sum = online_softmax(b_scores, b_max, b_sum, scale_log2)
            b_value = load_rows(p_value, b_offset, m_token, D, BLOCK_D)
            b_acc = dot(narrow(b_weight, b_value.dtype), b_value, b_acc * b_rescale[:, None])
        b_slot = (b_row * (HKV * GROUP) + b_head) * num_splits + i_split
        m_result = m_row[:, None] & (b_column < D)[None, :]
        tl.store(p_partial + b_slot[:, None] * D + b_column[None, :], b_acc / b_sum[:, None], mask=m_result)
        tl.store(p_lse + b_slot, b_max * scale_log2 + tl.log2(b_sum), mask=m_row)


def find_groups(
    tables: Sequence[Sequence[int]], lengths: Sequence[int], block_tokens: int, split_tokens: int, rows_per_tile: int
) -> list[Group]:
    """Groups that leave the fewest tokens to read; rows that share too little are in none.

    ``tables`` are the block ids of each row. A row keeps at least its own token for itself.
    """
    assert split_tokens % block_tokens == 0 or block_tokens % split_tokens == 0
    most = [max(0, length - 1) // split_tokens for length in lengths]
    everyone = [row for row in range(len(lengths)) if most[row] > 0]
    return _best(everyone, 0, tables, most, block_tokens, split_tokens, rows_per_tile)[1]


def _best(
    rows: list[int], depth: int, tables: Sequence[Sequence[int]], most: Sequence[int],
    block_tokens: int, split_tokens: int, rows_per_tile: int,
) -> tuple[int, list[Group]]:  # fmt: skip
    """(split-reads saved, groups) among rows that share their first ``depth`` splits."""
    if len(rows) < 2:
        return 0, []
    while True:
        deeper: dict[tuple[int, ...], list[int]] = {}
        first, end = depth * split_tokens // block_tokens, -(-(depth + 1) * split_tokens // block_tokens)
        for row in rows:
            if most[row] > depth:
                deeper.setdefault(tuple(tables[row][first:end]), []).append(row)
        if [rows] != list(deeper.values()):
            break
        # All of them continue alike, so no shorter prefix is better.
        depth += 1
    here = depth * (len(rows) - -(-len(rows) // rows_per_tile))
    parts = [
        _best(same, depth + 1, tables, most, block_tokens, split_tokens, rows_per_tile) for same in deeper.values()
    ]
    below = sum(saved for saved, _ in parts)
    if below > here:
        return below, [group for _, groups in parts for group in groups]
    return here, [Group(tuple(rows), depth)] if here else []


def saved_bytes(groups: Sequence[Group], token_bytes: int, split_tokens: int, rows_per_tile: int) -> int:
    """Bytes of one layer's keys and values (``token_bytes`` a token) that need not be read."""
    spared = sum(group.num_splits * (len(group.rows) - -(-len(group.rows) // rows_per_tile)) for group in groups)
    return spared * split_tokens * token_bytes


def is_worth_queueing(step_bytes: float, saved: float, num_layers: int, num_shared_layers: int) -> bool:
    """Whether a step that could be replayed is faster unrecorded, kernel by kernel, with its prefixes shared.

    ``step_bytes``: weights, keys and values that the plain step reads; ``saved``: of one of the ``num_shared_layers``.
    """
    device = step_bytes - num_shared_layers * (saved - MIN_SAVED_BYTES)
    return max(device, num_layers * _QUEUEING_BYTES) < step_bytes * (1 - _MIN_GAIN)


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """The inputs of a step's prefix pass, on the device; the same for every layer without a window."""

    members: Tensor  # [members] int32
    tiles: Tensor  # [tiles, 4] int32
    prefix_tokens: Tensor  # [rows] int32
    num_splits: int


def plan_prefixes(
    groups: Sequence[Group], table_rows: Sequence[int], split_tokens: int, tile_rows: int, device: torch.device
) -> SharedPlan:
    """``table_rows``: each row's line of the block table; ``tile_rows`` comes from ``rows_per_tile``."""
    members: list[int] = []
    tiles: list[tuple[int, int, int, int]] = []
    prefix = [0] * len(table_rows)
    for group in groups:
        for rows in _in_tiles(group.rows, tile_rows):
            tiles.append((len(members), len(rows), table_rows[rows[0]], group.num_splits))
            members += rows
        for row in group.rows:
            prefix[row] = group.num_splits * split_tokens
    return SharedPlan(
        to_device(torch.tensor(members, dtype=torch.int32), device),
        to_device(torch.tensor(tiles, dtype=torch.int32).view(-1, 4), device),
        to_device(torch.tensor(prefix, dtype=torch.int32), device),
        max((group.num_splits for group in groups), default=0),
    )


def rows_per_tile(group_size: int, tile: DecodeTile) -> int:
    """Number of rows whose queries of one KV head fit into a tile."""
    return max(1, tile.prefix_block_m // group_size)


def _in_tiles(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for at in range(0, len(rows), size):
        yield rows[at : at + size]


def shared_decode_attention(
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    table_rows: Tensor,
    lengths: Tensor,
    plan: SharedPlan,
    *,
    scale_log2: float,
    max_length: int,
    tile: DecodeTile,
    out: Tensor | None = None,
) -> Tensor:
    """As ``decode_attention``, with the prefixes of ``plan`` read once per tile of rows; for layers without a
    window."""
    heads, head_dim = query.shape[1:]
    num_kv_heads, block_tokens = cache.shape[1], cache.shape[3]
    num_splits = max_splits(max_length, None, tile.split_tokens)
    group_size = heads // num_kv_heads
    partials = SharedPartials.empty(query, num_splits, plan.prefix_tokens)
    if len(plan.tiles):
        _prefix_kernel[(plan.num_splits, num_kv_heads, len(plan.tiles))](
            partials.values,
            partials.lse,
            query,
            cache,
            tables,
            plan.members,
            plan.tiles,
            scale_log2,
            query.stride(0),
            cache.stride(0),
            tables.stride(0),
            num_splits,
            HKV=num_kv_heads,
            GROUP=group_size,
            D=head_dim,
            BLOCK_TOKENS=block_tokens,
            SPLIT=tile.split_tokens,
            BLOCK_M=triton.next_power_of_2(max(16, group_size * rows_per_tile(group_size, tile))),
            BLOCK_N=tile.block_n,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return decode_attention(
        query, cache, tables, table_rows, lengths,
        scale_log2=scale_log2, max_length=max_length, tile=tile, prefix=partials, out=out,
    )  # fmt: skip
