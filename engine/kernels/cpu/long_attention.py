"""Decode attention of a long context as many tasks, for more threads than there are KV heads: the bits of attention.py.

First the scores of stretches of the context, each by itself, into memory; then, for each part of the head's columns,
the weights, by every part anew, and the sums of its columns. A score and the sum of a column are chains of additions
of their own in attention.py as well, so it does not matter who computes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from baton.types import KvLayout
from engine.kernels.cpu.attention import Rows, Tile
from engine.kernels.cpu.kernel import Kernel
from engine.kernels.cpu.llvm import Emitter, Int, Isa, itemsize
from engine.kernels.cpu.once import once
from engine.kernels.cpu.program import Count, Record

# Shorter contexts stay whole: two steps of all threads more cost more than they bring.
_LEAST_TOKENS = 1024
# Fewer threads than this for each task do not divide it: the work grows by a sixth, and a thread that waits for a core
# delays the others. On two threads of a busy machine nothing was gained.
_LEAST_THREADS_PER_TASK = 4
# Positions of a task: tens of microseconds.
_PIECE_TOKENS = 512
# Parts of a head's columns.
_MOST_PARTS = 4
# Row, position, where block ids begin, where scores begin; number of the tile, first block.
_LONG_WORDS, _PIECE_WORDS = 4, 2


class Split(NamedTuple):
    """Tiles that stay whole, long ones, and pieces of these, in the words above."""

    whole: list[Tile]
    long: list[tuple[int, ...]]
    pieces: list[tuple[int, ...]]
    # Of all long tiles, in whole blocks.
    num_positions: int


def split(tiles: list[Tile], layout: KvLayout, *, num_heads: int, num_threads: int, most_positions: int) -> Split:
    """Long tiles of one token where threads would be idle, together of at most ``most_positions``."""
    if len(tiles) * layout.num_kv_heads * _LEAST_THREADS_PER_TASK > num_threads:
        return Split(tiles, [], [], 0)
    whole: list[Tile] = []
    long: list[tuple[int, ...]] = []
    pieces: list[tuple[int, ...]] = []
    positions = 0
    for row, position, num_tokens, begin in tiles:
        num_blocks = position // layout.block_tokens + 1
        length = num_blocks * layout.block_tokens
        if num_tokens > 1 or length < _LEAST_TOKENS or positions + length > most_positions:
            whole.append((row, position, num_tokens, begin))
            continue
        pieces += [(len(long), first) for first in range(0, num_blocks, _PIECE_TOKENS // layout.block_tokens)]
        long.append((row, position, begin, positions * num_heads))
        positions += length
    return Split(whole, long, pieces, positions)


def long_tables(num_positions: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the tables of long tiles and of their pieces."""
    most = num_positions // _LEAST_TOKENS
    return (most, _LONG_WORDS), (num_positions // _PIECE_TOKENS + most, _PIECE_WORDS)


class LongAttention:
    """Records of the long tiles of a recorded step."""

    def __init__(
        self, isa: Isa, layout: KvLayout, group_size: int, tiles: Tensor, pieces: Tensor, block_ids: Tensor, room: int
    ) -> None:
        """``room``: positions of all long tiles together."""
        shape = isa, layout.dtype, group_size, layout.head_dim, layout.block_tokens, layout.num_kv_heads
        self._tables = tiles, block_ids
        self._pieces = pieces
        self._scores = tiles.new_empty(room * layout.num_kv_heads * group_size, dtype=torch.float32)
        self._kv_heads = layout.num_kv_heads
        self._num_parts = _num_parts(isa, layout.head_dim)
        self._score, self._value = _score_kernel(*shape), _value_kernel(*shape)

    @property
    def num_bytes(self) -> int:
        return self._scores.nbytes

    def records(self, queries: Tensor, cache: Tensor, window: int, out: Tensor) -> Iterator[Record]:
        given = (*self._tables, self._scores, cache, window)
        yield Record(self._score, (*given, queries, self._pieces), Count.LONG_PIECES, units=self._kv_heads)
        yield Record(self._value, (*given, out), Count.LONG_TILES, units=self._kv_heads * self._num_parts)


def _num_parts(isa: Isa, head_dim: int) -> int:
    return math.gcd(_MOST_PARTS, head_dim // isa.width(head_dim))


class _Tile:
    """One long tile and KV head, as both kernels address it."""

    def __init__(
        self, e: Emitter, shape: tuple[str, int, int, int, int], tile: Int, kv_head: Int, parameters: list[Int]
    ) -> None:
        self.dtype, self.group, self.head_dim, self.block_tokens, self.kv_heads = shape
        tiles, self._block_ids, scores, self._cache, window = parameters
        row, start, self._table, begin = (e.load_int(tiles + tile * (8 * _LONG_WORDS) + 8 * i) for i in range(4))
        self._e, self._kv_head = e, kv_head
        self.end = start + 1
        self.low = (self.end - window).max(0)
        self.num_blocks = start // self.block_tokens + 1
        item = itemsize(self.dtype)
        self.side = self.block_tokens * self.head_dim * item
        # Where its queries or results begin.
        self.place = row * (self.kv_heads * self.group * self.head_dim * item)
        self.place = self.place + kv_head * (self.group * self.head_dim * item)
        self._row_bytes = self.num_blocks * (self.block_tokens * 4)
        self._scores = scores + begin * 4 + kv_head * self.group * self._row_bytes

    def keys(self, block: Int) -> Int:
        """Of a block, or of the last one; values are ``side`` behind."""
        at = self._table + block.min(self.num_blocks - 1)
        return self._cache + (self._e.load_int(self._block_ids + at * 8) * self.kv_heads + self._kv_head) * (
            2 * self.side
        )

    def scores(self, head: int, block: Int) -> Int:
        return self._scores + self._row_bytes * head + block * (self.block_tokens * 4)

    def rows(self) -> Rows:
        return Rows(self._e, self.dtype, self.head_dim, self.block_tokens, self.group)


@once
def _score_kernel(isa: Isa, dtype: str, group: int, head_dim: int, block_tokens: int, kv_heads: int) -> Kernel:
    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        *given, queries, pieces = parameters
        piece = pieces + task // kv_heads * (8 * _PIECE_WORDS)
        tile = _Tile(e, (dtype, group, head_dim, block_tokens, kv_heads), e.load_int(piece), task % kv_heads, given)
        rows = tile.rows()
        for head in range(group):
            rows.begin(e.integer(head), queries + tile.place + head * (head_dim * itemsize(dtype)))
        first = e.load_int(piece + 8)
        last = (first + _PIECE_TOKENS // block_tokens).min(tile.num_blocks)
        with e.loop(first.max(tile.low // block_tokens), last) as block:
            for at in range(0, group, isa.tile_rows):
                count = min(isa.tile_rows, group - at)
                found = rows.scores(e.integer(at), count, tile.keys(block.index), tile.keys(block.index + 1))
                for i in range(count):
                    for v, score in enumerate(found[i]):
                        e.store("float32", score, tile.scores(at + i, block.index) + v * score.width * 4)

    return Kernel(f"long_scores_{dtype}", isa, 7, build)


@once
def _value_kernel(isa: Isa, dtype: str, group: int, head_dim: int, block_tokens: int, kv_heads: int) -> Kernel:
    num_parts, width, item = _num_parts(isa, head_dim), isa.width(head_dim), itemsize(dtype)
    num_vectors = head_dim // width // num_parts

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        *given, out = parameters
        part, kv_head = task % num_parts, task // num_parts % kv_heads
        tile = _Tile(
            e, (dtype, group, head_dim, block_tokens, kv_heads), task // (num_parts * kv_heads), kv_head, given
        )
        rows = tile.rows()
        for head in range(group):
            rows.reset(e.integer(head))
        column = part * (num_vectors * width)
        with e.loop(tile.low // block_tokens, tile.num_blocks) as block:
            base = block.index * block_tokens
            # A step of the values holds pairs of tokens where keys are multiplied in pairs.
            values, ahead = (
                tile.keys(at) + tile.side + column * (rows.step * item) for at in (block.index, block.index + 1)
            )

            def meet(seen: tuple[Int, Int] | None) -> None:
                for at in range(0, group, isa.tile_rows):
                    count = min(isa.tile_rows, group - at)
                    heads = range(at, at + count)
                    loaded = [rows.load_scores(tile.scores(head, block.index)) for head in heads]
                    decays = [rows.weigh(e.integer(at + i), i, loaded[i], seen) for i in range(count)]
                    rows.gather(e.integer(at), count, values, ahead, seen, decays, num_vectors)

            low, high = (tile.low - base).max(0), (tile.end - base).min(block_tokens)
            with e.b.if_else(block_tokens + low <= high) as (whole, in_part):
                with whole:
                    meet(None)
                with in_part:
                    meet((low, high))
        for head in range(group):
            rows.finish(e.integer(head), out + tile.place + column * item + head * (head_dim * item), num_vectors)

    return Kernel(f"long_values_{dtype}", isa, 6, build)
