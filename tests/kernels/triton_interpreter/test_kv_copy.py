"""Blocks out of the cache and into another one, byte for byte."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels.cases import TOLERANCE
from engine.kernels.triton.kv_copy import gather_blocks, scatter_blocks


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kv_heads", "block_tokens", "head_dim"), [(1, 16, 80), (3, 16, 64), (2, 63, 96)])
def test_blocks_arrive_and_nothing_else_changes(
    kv_heads: int, block_tokens: int, head_dim: int, dtype: torch.dtype
) -> None:
    shape = (2, 9, kv_heads, 2, block_tokens, head_dim)
    source = torch.randn(shape).to(dtype)
    ids = torch.tensor([7, 0, 4], dtype=torch.int32)
    staging = torch.full((2, 3, *shape[2:]), math.nan, dtype=dtype)
    gather_blocks(source, ids, staging)
    assert torch.equal(staging, source[:, ids.long()])
    target = torch.zeros(shape, dtype=dtype)
    there = torch.tensor([1, 8, 2], dtype=torch.int32)
    scatter_blocks(staging, there, target)
    assert torch.equal(target[:, there.long()], source[:, ids.long()])
    rest = [i for i in range(9) if i not in there.tolist()]
    assert not target[:, rest].any()


def test_a_range_of_layers_and_no_blocks() -> None:
    source = torch.randn(4, 3, 1, 2, 16, 16)
    staging = torch.empty(2, 1, 1, 2, 16, 16)
    gather_blocks(source[1:3], torch.tensor([2], dtype=torch.int32), staging)
    assert torch.equal(staging, source[1:3, 2:3])
    gather_blocks(source, torch.empty(0, dtype=torch.int32), source[:, :0].contiguous())
