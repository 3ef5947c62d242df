"""Copies blocks of the cache into contiguous staging memory and back, for several layers at once.

Bound by bytes: each is read once and written once. A (layer, block) is one run of bytes, copied as 16-byte vectors
whatever the dtype. Grid: (blocks, layers, pieces of a block).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import kernel

# 8-byte words that one program copies at a time, and the number of times.
_WORDS = 1024
_ROUNDS = 4


@kernel
def _copy_kernel(
    p_cache,  # [layers, blocks, words] int64 (words of 8 bytes), layers stride_layer and blocks stride_block apart
    p_staging,  # [layers, num_ids, words]
    p_ids,  # [num_ids] int32: blocks of the cache
    num_ids,
    words,
    stride_layer,
    stride_block,
    IS_GATHER: tl.constexpr,
    WORDS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    i_id, i_layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = tl.load(p_ids + i_id).to(tl.int64)
    p_page = p_cache + i_layer * stride_layer + block * stride_block
    p_stage = p_staging + (i_layer * num_ids + i_id) * words
    start = tl.program_id(2) * (WORDS * ROUNDS)
    for i in tl.static_range(ROUNDS):
        b_word = start + i * WORDS + tl.arange(0, WORDS)
        m_word = b_word < words
        if IS_GATHER:
            tl.store(p_stage + b_word, tl.load(p_page + b_word, mask=m_word), mask=m_word)
        else:
            tl.store(p_page + b_word, tl.load(p_stage + b_word, mask=m_word), mask=m_word)


def gather_blocks(cache: Tensor, block_ids: Tensor, staging: Tensor) -> None:
    """cache [layers, blocks, ...] -> staging [layers, len(block_ids), ...], both contiguous behind the blocks."""
    _copy(cache, block_ids, staging, is_gather=True)


def scatter_blocks(staging: Tensor, block_ids: Tensor, cache: Tensor) -> None:
    """The reverse of gather_blocks; ids must be distinct."""
    _copy(cache, block_ids, staging, is_gather=False)


def _copy(cache: Tensor, block_ids: Tensor, staging: Tensor, *, is_gather: bool) -> None:
    assert staging.is_contiguous()
    assert staging.shape == (cache.shape[0], len(block_ids), *cache.shape[2:])
    assert staging.dtype == cache.dtype
    pages, stage = _words(cache), _words(staging)
    layers, num_ids, words = stage.shape
    if not stage.numel():
        return
    _copy_kernel[(num_ids, layers, triton.cdiv(words, _WORDS * _ROUNDS))](
        pages,
        stage,
        block_ids,
        num_ids,
        words,
        pages.stride(0),
        pages.stride(1),
        IS_GATHER=is_gather,
        WORDS=_WORDS,
        ROUNDS=_ROUNDS,
        num_warps=4,
    )


def _words(blocks: Tensor) -> Tensor:
    """[layers, blocks, words of 8 bytes]; a block of at least 16 tokens and 16 values a head is a multiple of 8."""
    return blocks.flatten(2).view(torch.int64)
