"""Prefixes read once: the same results as the plain kernel, and groups that save the most."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.cases import TOLERANCE, PagedSequences, Shape, relative_error
from engine.kernels.triton.decode_attention import decode_attention
from engine.kernels.triton.shared_prefix import (
    Group,
    find_groups,
    is_worth_queueing,
    plan_prefixes,
    rows_per_tile,
    saved_bytes,
    shared_decode_attention,
)
from engine.kernels.triton.tuning import DecodeTile
from tests.support.kernel_device import DEVICE

TILE = DecodeTile(split_tokens=32, block_n=16, num_warps=4, num_stages=2, prefix_block_m=16)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*zip((Shape(2, 2, 16), Shape(8, 2, 24), Shape(12, 1, 16)), TOLERANCE, strict=True)],
    ids=str,
)
def test_shared_prefixes_give_the_plain_result(shape: Shape, dtype: torch.dtype) -> None:
    lengths = [70, 100, 33, 97, 5, 66]
    sequences = PagedSequences(shape, lengths, 16, dtype, DEVICE.type)
    # Rows 1 and 3 share 96 positions with one another, 0 the first 64 of them; 4 and 5 nothing.
    sequences.tables[3, :6] = sequences.tables[1, :6]
    sequences.tables[0, :4] = sequences.tables[1, :4]
    tables = [row[: -(-length // 16)] for row, length in zip(sequences.tables.tolist(), lengths, strict=True)]
    tile_rows = rows_per_tile(shape.heads // shape.kv_heads, TILE)
    groups = [Group((0, 1, 3), 2)]
    plan = plan_prefixes(groups, range(6), 32, tile_rows, DEVICE)
    query = sequences.query(6)
    rows, counts = torch.arange(6, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    plain = decode_attention(
        query, sequences.cache, sequences.tables, rows, counts,
        scale_log2=shape.scale_log2, max_length=100, tile=TILE,
    )  # fmt: skip
    for chosen in (plan, plan_prefixes([], range(6), 32, tile_rows, DEVICE)):
        found = shared_decode_attention(
            query, sequences.cache, sequences.tables, rows, counts, chosen,
            scale_log2=shape.scale_log2, max_length=100, tile=TILE,
        )  # fmt: skip
        assert relative_error(found, plain) < TOLERANCE[dtype]
        assert torch.equal(found[[2, 4, 5]], plain[[2, 4, 5]])
    assert find_groups(tables, lengths, 16, 32, tile_rows) in (groups, [])


def table(*blocks: int, own: int) -> list[int]:
    return [*blocks, *range(own, own + 4)]


def test_groups_leave_the_fewest_tokens_to_read() -> None:
    tables = [
        table(1, 2, 3, 4, own=100),
        table(1, 2, 3, 4, own=200),
        table(1, 2, 9, 8, own=300),
        table(7, 7, 7, 7, own=400),
    ]
    lengths = [16 * 7] * 4
    # Three rows share 1 split of two blocks: 2 reads saved; two share 2: 2 saved as well.
    assert find_groups(tables, lengths, 16, 32, 16) == [Group((0, 1, 2), 1)]
    assert find_groups(tables[:2], lengths[:2], 16, 32, 16) == [Group((0, 1), 2)]
    # With tiles of one row nothing is ever saved.
    assert find_groups(tables, lengths, 16, 32, 1) == []


def test_a_row_keeps_its_own_token_and_blocks_may_be_larger_than_splits() -> None:
    assert find_groups([[1], [1]], [64, 64], 64, 32, 16) == [Group((0, 1), 1)]
    assert find_groups([[1], [1]], [32, 33], 64, 32, 16) == []
    assert find_groups([], [], 64, 32, 16) == []


def test_a_prefix_of_many_splits_is_followed_to_its_end() -> None:
    """As deep as the longest context: further than calls can nest."""
    blocks = [*range(3000)]
    tables = [[*blocks, 7001], [*blocks, 7002], [*blocks[:1500], *range(8000, 9501)]]
    groups = find_groups(tables, [3001 * 32] * 3, 32, 32, 16)
    assert groups == [Group((0, 1, 2), 1500)]
    assert find_groups(tables[:2], [3001 * 32] * 2, 32, 32, 16) == [Group((0, 1), 3000)]


def test_a_step_is_queued_by_hand_where_that_saves_more_than_it_costs() -> None:
    """Llama-3-8B in bfloat16: 14 GiB of weights, 4 KiB of a layer's keys and values a token."""
    weights, layers = 14 << 30, 32
    # 64 rows of 8192 tokens behind a prefix of 8000, then of 256.
    kv = 64 * 8192 * 4096
    assert is_worth_queueing(weights + layers * kv, 63 * 8000 * 4096, layers, layers)
    assert not is_worth_queueing(weights + layers * kv, 8 * 256 * 4096, layers, layers)
    # Few rows: what is saved is little beside the weights. A small model: the host could not keep up.
    assert not is_worth_queueing(weights + layers * 2 * 6000 * 4096, 6000 * 4096, layers, layers)
    assert not is_worth_queueing((1 << 30) + 16 * (32 << 20), 31 << 20, 16, 16)
    # Layers with a window share nothing.
    assert not is_worth_queueing(weights + layers * kv, 63 * 8000 * 4096, layers, 0)


def test_predicted_bytes() -> None:
    assert saved_bytes([Group(tuple(range(20)), 3)], 1024, 256, 16) == 3 * 18 * 256 * 1024
