"""Prefill and decode attention against float64, and the bits of a row whatever its neighbours."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.kernels.cases import TOLERANCE, PagedSequences, Shape, relative_error
from engine.kernels.triton.decode_attention import decode_attention, max_splits
from engine.kernels.triton.prefill_attention import (
    Chunk,
    contiguous_prefill_attention,
    list_tiles,
    paged_prefill_attention,
    tiles_on,
)
from engine.kernels.triton.tuning import DecodeTile, PrefillTile
from tests.support.kernel_device import DEVICE

DECODE = DecodeTile(split_tokens=64, block_n=32, num_warps=4, num_stages=2)
PREFILL = PrefillTile(block_m=32, block_n=32, num_warps=4, num_stages=2)

# Every way to group heads, and every head_dim, not their product.
SHAPES = [
    Shape(1, 1, 64),
    Shape(2, 1, 80),
    Shape(3, 1, 96),
    Shape(8, 2, 128),
    Shape(7, 1, 64),
    Shape(8, 1, 32),
    Shape(16, 1, 256),
    Shape(32, 1, 16),
]


def decode(
    sequences: PagedSequences, query: torch.Tensor, rows: list[int], lengths: list[int], window: int | None = None
) -> torch.Tensor:
    return decode_attention(
        query, sequences.cache, sequences.tables, torch.tensor(rows, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32), scale_log2=sequences.shape.scale_log2,
        max_length=max([1, *lengths]), tile=DECODE, window=window,
    )  # fmt: skip


def check_decode(shape: Shape, lengths: list[int], block_tokens: int, dtype: torch.dtype, window: int | None) -> None:
    sequences = PagedSequences(shape, lengths, block_tokens, dtype, DEVICE.type)
    query = sequences.query(len(lengths))
    found = decode(sequences, query, list(range(len(lengths))), lengths, window)
    for i, length in enumerate(lengths):
        expected = sequences.expected(query[i : i + 1], i, length - 1, window)
        assert relative_error(found[i : i + 1], expected) < TOLERANCE[dtype], (length, window)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention_of_every_shape(shape: Shape, dtype: torch.dtype) -> None:
    check_decode(shape, [1, 63, 64, 65], 16, dtype, None)


@pytest.mark.parametrize("window", [None, 1, 40, 64, 100])
@pytest.mark.parametrize("block_tokens", [16, 24, 64, 128])
def test_decode_attention_of_every_block_and_window(block_tokens: int, window: int | None) -> None:
    check_decode(Shape(2, 1, 16), [1, 17, 129, 200], block_tokens, torch.float32, window)


def test_many_splits_are_combined_in_chunks() -> None:
    check_decode(Shape(2, 1, 16), [64 * 18 + 5], 64, torch.float32, None)


def test_padding_gives_zeros_and_reads_nothing() -> None:
    sequences = PagedSequences(Shape(2, 1, 16), [20, 100], 16, torch.float32, DEVICE.type)
    query = sequences.query(3)
    found = decode(sequences, query, [0, 1, 1], [0, 100, 0])
    assert not found[[0, 2]].any()
    assert relative_error(found[1:2], sequences.expected(query[1:2], 1, 99, None)) < TOLERANCE[torch.float32]
    assert decode(sequences, query[:0], [], []).shape == (0, 2, 16)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_decode_row_alone_has_the_bits_it_has_in_a_batch(dtype: torch.dtype) -> None:
    lengths = [1, 64, 65, 130, 200]
    sequences = PagedSequences(Shape(4, 1, 32), lengths, 16, dtype, DEVICE.type)
    query = sequences.query(len(lengths))
    whole = decode(sequences, query, list(range(5)), lengths)
    for i, length in enumerate(lengths):
        assert torch.equal(decode(sequences, query[i : i + 1], [i], [length]), whole[i : i + 1])
    turned = [4, 2, 0, 3, 1]
    assert torch.equal(decode(sequences, query[turned], turned, [lengths[i] for i in turned]), whole[turned])


@pytest.mark.parametrize(("length", "window", "splits"), [(1, None, 1), (64, None, 1), (65, None, 2), (900, 64, 2)])
def test_number_of_splits(length: int, window: int | None, splits: int) -> None:
    assert max_splits(length, window, 64) == splits


def prefill(
    sequences: PagedSequences,
    query: torch.Tensor,
    chunks: list[Chunk],
    window: int | None = None,
    tile: PrefillTile = PREFILL,
) -> torch.Tensor:
    tiles = list_tiles(chunks, sequences.shape.heads // sequences.shape.kv_heads, tile.block_m)
    return paged_prefill_attention(
        query, sequences.cache, sequences.tables, tiles_on(DEVICE, tiles), scale_log2=sequences.shape.scale_log2,
        tile=tile, window=window,
    )  # fmt: skip


def check_prefill(
    shape: Shape, pieces: list[tuple[int, int]], block_tokens: int, dtype: torch.dtype, window: int | None
) -> None:
    sequences = PagedSequences(shape, [start + count for start, count in pieces], block_tokens, dtype, DEVICE.type)
    chunks, row = [], 0
    for i, (start, count) in enumerate(pieces):
        chunks.append(Chunk(row, start, count, i))
        row += count
    query = sequences.query(row)
    found = prefill(sequences, query, chunks, window)
    for chunk in chunks:
        part = slice(chunk.row, chunk.row + chunk.num_tokens)
        expected = sequences.expected(query[part], chunk.sequence, chunk.start, window)
        assert relative_error(found[part], expected) < TOLERANCE[dtype], (chunk, window)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_attention_of_every_shape(shape: Shape, dtype: torch.dtype) -> None:
    check_prefill(shape, [(0, 1), (31, 5)], 16, dtype, None)


@pytest.mark.parametrize("window", [None, 1, 40, 64, 100])
@pytest.mark.parametrize("block_tokens", [16, 24, 64])
def test_prefill_attention_of_chunks_and_windows(block_tokens: int, window: int | None) -> None:
    check_prefill(Shape(4, 1, 16), [(0, 33), (70, 17), (63, 1), (130, 9)], block_tokens, torch.float32, window)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_prompt_has_the_same_bits_in_any_chunks_and_batch(dtype: torch.dtype, window: int | None) -> None:
    sequences = PagedSequences(Shape(4, 2, 32), [97, 20], 16, dtype, DEVICE.type)
    query = sequences.query(97)
    whole = prefill(sequences, query, [Chunk(0, 0, 97, 0)], window)
    for cuts in ([0, 1, 50, 97], [0, 33, 64, 96, 97]):
        for start, stop in itertools.pairwise(cuts):
            both = torch.cat((sequences.query(20, seed=2), query[start:stop]))
            chunks = [Chunk(0, 0, 20, 1), Chunk(20, start, stop - start, 0)]
            assert torch.equal(prefill(sequences, both, chunks, window)[20:], whole[start:stop])


def test_contiguous_keys_give_the_bits_of_paged_ones() -> None:
    lengths = [40, 7]
    sequences = PagedSequences(Shape(4, 2, 24), lengths, 16, torch.float32, DEVICE.type)
    query = sequences.query(47)
    chunks = [Chunk(0, 0, 40, 0), Chunk(40, 0, 7, 1)]
    tiles = tiles_on(DEVICE, list_tiles(chunks, 2, PREFILL.block_m))
    found = contiguous_prefill_attention(
        query, torch.cat(sequences.keys), torch.cat(sequences.values), torch.tensor([[0], [40]], dtype=torch.int32),
        tiles, scale_log2=sequences.shape.scale_log2, tile=PREFILL,
    )  # fmt: skip
    assert torch.equal(found, prefill(sequences, query, chunks))


def test_programs_that_loop_give_the_bits_of_one_program_per_tile() -> None:
    sequences = PagedSequences(Shape(4, 2, 16), [80], 16, torch.float32, DEVICE.type)
    query = sequences.query(80)
    looping = PrefillTile(32, 32, 4, 2, num_programs=3)
    chunks = [Chunk(0, 0, 80, 0)]
    assert torch.equal(prefill(sequences, query, chunks, tile=looping), prefill(sequences, query, chunks))


def test_tiles_with_the_longest_context_come_first_and_cover_every_token_once() -> None:
    tiles = list_tiles([Chunk(0, 0, 33, 0), Chunk(33, 100, 9, 1)], 3, 32)
    ends = (tiles[:, 1] + tiles[:, 2]).tolist()
    assert ends == sorted(ends, reverse=True)
    rows = [row + i for row, _, count, _ in tiles.tolist() for i in range(count)]
    assert sorted(rows) == list(range(42))
    assert list_tiles([], 3, 32).shape == (0, 4)


def test_queries_may_be_strided() -> None:
    sequences = PagedSequences(Shape(2, 1, 16), [40], 16, torch.float32, DEVICE.type)
    wide = torch.cat((sequences.query(40), sequences.query(40, seed=5)), dim=1)
    chunks = [Chunk(0, 0, 40, 0)]
    assert torch.equal(prefill(sequences, wide[:, :2], chunks), prefill(sequences, wide[:, :2].contiguous(), chunks))
    assert torch.equal(
        decode(sequences, wide[:1, :2], [0], [40]), decode(sequences, wide[:1, :2].contiguous(), [0], [40])
    )
