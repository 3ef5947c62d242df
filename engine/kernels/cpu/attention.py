"""Paged attention on CPUs; a token's result depends on that token and its context alone.

A task is a tile of queries (consecutive tokens of one sequence, all query heads of one KV head; a single token while
decoding). It processes the KV blocks in ascending order with a running maximum, sum and output of each row (online
softmax, Milakov and Gimelshein 2018). So the additions of a row depend neither on the other rows nor on how the prompt
was cut. A block that some token of the tile sees only in part is processed token by token, within exactly the visible
range: memory beyond it never enters the arithmetic.

Layout of K and V: pointwise.py. Bound: KV bytes while decoding, 4 * head_dim operations per (query, token) in prefill.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from torch import Tensor

from baton.types import KvLayout
from engine.batch import Batch, PieceRows
from engine.kernels.cpu.kernel import Kernel
from engine.kernels.cpu.llvm import Emitter, Int, Isa, Vec, itemsize, per_dot
from engine.kernels.cpu.once import once
from engine.kernels.cpu.program import Record, Tape
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    from engine.kernels.cpu.long_attention import LongAttention

# Query rows of a tile: their outputs and a KV block of one head fit into the first two caches.
_TILE_ROWS = 64
_NO_WINDOW = 1 << 40


class CpuAttention:
    """Attention over tiles that were listed once, used by every layer."""

    def __init__(
        self,
        isa: Isa,
        tape: Tape,
        config: ModelConfig,
        layout: KvLayout,
        tiles: Tensor,
        block_ids: Tensor,
        count: int,
        long: LongAttention | None = None,
    ) -> None:
        """tiles [at least count, 4] and block_ids as ``tiles_of`` gives them, int64; ``long``: those beside them."""
        self._tape = tape
        self._long = long
        self._tiles, self._block_ids = tiles, block_ids
        self._count = count
        self._kv_heads = layout.num_kv_heads
        self._kernel = _kernel(
            isa, layout.dtype, config.group_size, layout.head_dim, layout.block_tokens, layout.num_kv_heads
        )

    def __call__(self, queries: Tensor, cache: Tensor, window: int | None) -> Tensor:
        out = self._tape.empty(queries, queries.shape[1] * queries.shape[2])
        seen = window or _NO_WINDOW
        parameters = (self._tiles, self._block_ids, queries, cache, out, seen)
        records = [Record(self._kernel, parameters, self._count, units=self._kv_heads)]
        if self._long is not None:
            records += self._long.records(queries, cache, seen, out)
        self._tape.run(records)
        return out


def query_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim) times log2(e), since the softmax uses exp2."""
    return math.log2(math.e) / math.sqrt(head_dim)


# First row, its position, number of tokens, start of its block ids.
Tile = tuple[int, int, int, int]


def tables_of(pieces: tuple[PieceRows, ...]) -> tuple[list[int], list[int]]:
    """Block ids of all pieces, and where those of each piece begin."""
    block_ids: list[int] = []
    begins: list[int] = []
    for piece in pieces:
        begins.append(len(block_ids))
        block_ids += piece.block_ids
    return block_ids, begins


def tiles_of(pieces: tuple[PieceRows, ...], begins: list[int], group_size: int) -> list[Tile]:
    """The tiles, longest context first, so that threads finish at about the same time."""
    tiles = [
        tile
        for piece, begin in zip(pieces, begins, strict=True)
        for tile in _tiles(piece.row, piece.start, piece.num_tokens, begin, group_size)
    ]
    return sorted(tiles, key=lambda tile: -tile[1])


def tiles_of_runs(batch: Batch, begins: list[int], group_size: int) -> list[Tile]:
    """Of the rows whose logits are wanted, in rows numbered as ``Batch.logit_rows`` orders them."""
    tiles: list[Tile] = []
    row = 0
    for number, offset, num_rows in batch.runs:
        tiles += _tiles(row, batch.pieces[number].start + offset, num_rows, begins[number], group_size)
        row += num_rows
    return tiles


def _tiles(row: int, start: int, num_tokens: int, begin: int, group_size: int) -> list[Tile]:
    most = max(1, _TILE_ROWS // group_size)
    return [(row + at, start + at, min(most, num_tokens - at), begin) for at in range(0, num_tokens, most)]


@once
def _kernel(isa: Isa, dtype: str, group: int, head_dim: int, block_tokens: int, kv_heads: int) -> Kernel:
    item = itemsize(dtype)
    side = block_tokens * head_dim * item
    max_rows = max(_TILE_ROWS, group)

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        tiles, block_ids, queries, cache, out, window = parameters
        rows = Rows(e, dtype, head_dim, block_tokens, max_rows)
        kv_head = task % kv_heads
        row, start, num_tokens, table = (e.load_int(tiles + task // kv_heads * 32 + 8 * i) for i in range(4))
        end = start + num_tokens
        # Bytes from a token's queries of this KV head to the next token's, and the start of this tile's.
        stride = kv_heads * group * head_dim * item
        place = row * stride + kv_head * (group * head_dim * item)
        with e.loop(0, num_tokens) as token, e.loop(0, group) as head:
            rows.begin(
                token.index * group + head.index,
                queries + place + token.index * stride + head.index * (head_dim * item),
            )
        first = (start + 1 - window).max(0) // block_tokens
        with e.loop(first, (end - 1) // block_tokens + 1) as block:
            base = block.index * block_tokens
            keys, ahead = (
                cache + (e.load_int(block_ids + (table + index) * 8) * kv_heads + kv_head) * (2 * side)
                for index in (block.index, (block.index + 1).min((end - 1) // block_tokens))
            )
            seen_by_all = e.b.and_(base + (block_tokens - 1) <= start, end - window <= base)
            with e.b.if_else(seen_by_all) as (whole, in_part):
                with whole:
                    e.by_rows(
                        *(0, num_tokens * group, isa.tile_rows),
                        lambda row, count: rows.attend(row, count, keys, keys + side, ahead, None),
                        multiple=group,
                    )
                with in_part, e.loop(0, num_tokens) as token:
                    low = (start + token.index + 1 - window - base).max(0)
                    high = (start + token.index + 1 - base).min(block_tokens)
                    with e.b.if_then(low < high):
                        for at in range(0, group, isa.tile_rows):
                            count = min(isa.tile_rows, group - at)
                            rows.attend(token.index * group + at, count, keys, keys + side, ahead, (low, high))
        with e.loop(0, num_tokens) as token, e.loop(0, group) as head:
            rows.finish(
                token.index * group + head.index, out + place + token.index * stride + head.index * (head_dim * item)
            )

    return Kernel(f"attention_{dtype}", isa, 6, build)


class Rows:
    """Query rows of a tile with their running state, in the thread's scratch memory."""

    def __init__(self, e: Emitter, dtype: str, head_dim: int, block_tokens: int, max_rows: int) -> None:
        self._e = e
        self._dtype = dtype
        # Weights are in V's dtype where the dot product works on pairs, in float32 elsewhere.
        self._weight_dtype = dtype if per_dot(dtype) == 2 else "float32"
        self._head_dim = head_dim
        self._block_tokens = block_tokens
        self._item = itemsize(dtype)
        self.step = per_dot(dtype)
        self._token_width = e.isa.width(block_tokens)
        self._width = e.isa.width(head_dim)
        self._queries = e.scratch(max_rows * head_dim * self._item)
        self._outputs = e.scratch(max_rows * head_dim * 4)
        self._best = e.scratch(max_rows * 4)
        self._totals = e.scratch(max_rows * self._token_width * 4)
        self._weights = e.scratch(e.isa.tile_rows * block_tokens * 4)

    def begin(self, row: Int, source: Int) -> None:
        e = self._e
        for i in range(0, self._head_dim, self._width):
            query = e.load(self._dtype, source + i * self._item, self._width)
            e.store(self._dtype, query, self._queries + row * (self._head_dim * self._item) + i * self._item)
        self.reset(row)

    def reset(self, row: Int) -> None:
        """It has met no block."""
        e = self._e
        for i in range(0, self._head_dim, self._width):
            e.store("float32", e.constant(0.0, self._width), self._output(row, i))
        e.store("float32", e.constant(-math.inf, 1), self._best + row * 4)
        e.store("float32", e.constant(0.0, self._token_width), self._total(row))

    def finish(self, row: Int, target: Int, num_vectors: int | None = None) -> None:
        """The first vectors of the head, or all."""
        e = self._e
        total = e.lane_sum(e.load("float32", self._total(row), self._token_width))
        total = e.resize(total, self._width)
        for i in range(0, (num_vectors or self._head_dim // self._width) * self._width, self._width):
            e.store(self._dtype, e.load("float32", self._output(row, i), self._width) / total, target + i * self._item)

    def attend(self, row: Int, count: int, keys: Int, values: Int, ahead: Int, seen: tuple[Int, Int] | None) -> None:
        """``count`` rows process one block; they see its tokens [low, high), or all.

        While keys are read, values are prefetched; while values are read, the next keys, ``ahead``.
        """
        scores = self.scores(row, count, keys, values)
        decays = [self.weigh(row + i, i, scores[i], seen) for i in range(count)]
        self.gather(row, count, values, ahead, seen, decays, self._head_dim // self._width)

    def scores(self, row: Int, count: int, keys: Int, ahead: Int) -> list[list[Vec]]:
        """[rows][vectors of tokens]."""
        e, width, step, item = self._e, self._token_width, self.step, self._item
        scores: list[list[Vec]] = [[] for _ in range(count)]
        queries = self._queries + row * (self._head_dim * item)
        num_vectors = self._block_tokens // width
        for first in range(0, num_vectors, e.isa.tile_vectors):
            vectors = range(first, min(num_vectors, first + e.isa.tile_vectors))
            with e.loop(0, self._head_dim // step, values=[e.constant(0.0, width)] * (count * len(vectors))) as loop:
                at = keys + loop.index * (self._block_tokens * step * item)
                e.prefetch(ahead + loop.index * (self._block_tokens * step * item), self._block_tokens * step * item)
                loaded = [e.dot_load(self._dtype, at + v * width * step * item, width) for v in vectors]
                for i in range(count):
                    query = e.dot_spread(
                        self._dtype, queries + loop.index * (step * item) + i * self._head_dim * item, width
                    )
                    for v, key in enumerate(loaded):
                        loop.following.append(e.dot(self._dtype, loop.values[i * len(loaded) + v], key, query))
            for i in range(count):
                scores[i] += loop.values[i * len(vectors) : (i + 1) * len(vectors)]
        return scores

    def load_scores(self, address: Int) -> list[Vec]:
        """Of one row, as ``scores`` gave them."""
        width = self._token_width
        return [self._e.load("float32", address + at * 4, width) for at in range(0, self._block_tokens, width)]

    def weigh(self, row: Int, index: int, scores: list[Vec], seen: tuple[Int, Int] | None) -> Vec:
        """Writes the weights of the block's tokens to scratch and updates sum and maximum; returns the factor for
        earlier results."""
        e, width = self._e, self._token_width
        if seen is not None:
            masks = [e.lanes_between(v * width, width, *seen) for v in range(len(scores))]
            scores = [score.where(mask, -math.inf) for score, mask in zip(scores, masks, strict=True)]
        before = e.spread("float32", self._best + row * 4, width)
        best = before.max(e.lane_max(functools.reduce(Vec.max, scores)))
        e.store_lane(best, self._best + row * 4)
        decay = e.exp2(before - best)
        total = e.load("float32", self._total(row), width) * decay
        for v, score in enumerate(scores):
            weight = e.exp2(score - best)
            total = total + weight
            size = itemsize(self._weight_dtype)
            e.store(self._weight_dtype, weight, self._weights + index * self._block_tokens * size + v * width * size)
        e.store("float32", total, self._total(row))
        return e.resize(decay, self._width)

    def gather(
        self,
        row: Int,
        count: int,
        values: Int,
        ahead: Int,
        seen: tuple[Int, Int] | None,
        decays: list[Vec],
        num_vectors: int,
    ) -> None:
        """outputs = outputs * decay + weights . V, for the first vectors of the head, as many as registers hold at a
        time."""
        for first in range(0, num_vectors, self._e.isa.tile_vectors):
            vectors = range(first, min(num_vectors, first + self._e.isa.tile_vectors))
            self._gather(row, count, values, ahead, seen, decays, vectors)

    def _gather(
        self,
        row: Int,
        count: int,
        values: Int,
        ahead: Int,
        seen: tuple[Int, Int] | None,
        decays: list[Vec],
        vectors: range,
    ) -> None:
        e, step = self._e, self.step
        places = [self._output(row + i, v * self._width) for i in range(count) for v in vectors]
        decayed = [e.load("float32", place, self._width) * decays[n // len(vectors)] for n, place in enumerate(places)]

        def add(pair: Int, totals: list[Vec], keep: str = "both") -> list[Vec]:
            at = values + pair * (self._head_dim * step * self._item)
            e.prefetch(ahead + pair * (self._head_dim * step * self._item), self._head_dim * step * self._item)
            loaded = [
                e.dot_load(self._dtype, at + v * self._width * step * self._item, self._width, keep) for v in vectors
            ]
            size = itemsize(self._weight_dtype)
            weights = self._weights + pair * (step * size)
            added = []
            for i in range(count):
                weight = e.dot_spread(self._weight_dtype, weights + i * self._block_tokens * size, self._width)
                for v, value in enumerate(loaded):
                    added.append(e.dot(self._dtype, totals[i * len(loaded) + v], value, weight))
            return added

        low, high = (e.integer(0), e.integer(self._block_tokens)) if seen is None else seen
        if seen is not None and step == 2:
            decayed = e.when(low % 2, decayed, lambda totals: add(low // 2, totals, "high"))
        with e.loop((low + (step - 1)) // step, high // step, values=decayed) as loop:
            loop.following = add(loop.index, loop.values)
        totals = loop.values
        if seen is not None and step == 2:
            totals = e.when(high % 2, totals, lambda totals: add(high // 2, totals, "low"))
        for place, total in zip(places, totals, strict=True):
            e.store("float32", total, place)

    def _output(self, row: Int, element: int) -> Int:
        return self._outputs + row * (self._head_dim * 4) + element * 4

    def _total(self, row: Int) -> Int:
        return self._totals + row * (self._token_width * 4)
