"""Paged attention on CPUs whose result for a token is a function of that token and its context alone.

A tile of queries (tokens of one sequence that share a KV block, or one token while decoding) meets every KV block it
sees in an own small product; the maximum over all blocks is exact in any order, and the partial sums of the blocks are
added by folding the upper half onto the lower, which zeros appended for shorter neighbours leave unchanged. So chunks,
phases and neighbours cannot be told apart in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.types import KvLayout
from engine.batch import Span
from engine.config import ModelConfig
from engine.kv_cache import TORCH_DTYPES

# Score elements in flight at once; above it, tiles shrink and groups are cut.
_MAX_SCORES = 1 << 22
_MAX_TILE_TOKENS = 64
# Score elements that stay in cache with what is computed from them; above it, KV heads take turns.
_MAX_CACHED_SCORES = 1 << 20
# Elements of keys or values gathered at a time.
_MAX_GATHERED = 1 << 19
# Rows per product up to which K q^T beats q K^T: torch copies a transposed bfloat16 operand, here all keys.
_MAX_TURNED_ROWS = 16
# Elements per thread that torch's elementwise loops treat alike: two AVX-512 vectors of float32, four AVX2 ones.
_VECTOR = 64
_GRAIN = 32768


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries at rows [row, row + num_tokens) and positions [start, start + num_tokens), within one KV block."""

    row: int
    start: int
    num_tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Tiles of one padded size, computed together. Leading dimensions are [blocks, tiles]: block j of every tile."""

    num_blocks: int
    num_tiles: int
    tile_tokens: int
    # [num_tiles * tile_tokens] rows of queries; rows of padding repeat the tile's last token.
    rows: Tensor
    # Rows of `rows` that are not padding, and the batch rows they are written to.
    real: Tensor | None
    targets: Tensor
    # [num_blocks, num_tiles, num_kv_heads] int64: (block * heads + head) * 2, the keys' item in the cache.
    key_items: Tensor
    # Blocks [first_masked, num_blocks) hold hidden positions; -inf there, 0 elsewhere:
    # [blocks, tiles, 1, tile_tokens, 1, block_tokens].
    first_masked: int
    bias: Tensor
    # Of the same blocks, [blocks, tiles, 1, block_tokens, head_dim]: all bits set at positions that some query sees.
    # Spelled out in full: filling under a broadcast mask is not vectorized and took 7 % of a decode step.
    seen_bits: Tensor


class CpuAttention:
    """One step's attention: tiles and masks are laid out once, then used by every layer.

    Queries come multiplied by ``query_scale``. ``turns``: whether K q^T may stand in for q K^T (see ``can_turn``).
    """

    def __init__(
        self, config: ModelConfig, layout: KvLayout, spans: tuple[Span, ...], space: Workspace, *, turns: bool
    ) -> None:
        self._space = space
        self._turns = turns
        self._config = config
        self._layout = layout
        self._spans = spans
        self._groups: dict[int | None, list[_Group]] = {}

    def __call__(self, queries: Tensor, cache: Tensor, window: int | None) -> Tensor:
        c = self._config
        groups = self._groups.get(window)
        if groups is None:
            groups = self._groups[window] = list(self._lay_out(window))
        grouped = queries.view(-1, c.num_kv_heads, c.group_size, c.head_dim)
        out = torch.zeros_like(grouped)
        for group in groups:
            per_head = group.num_blocks * group.num_tiles * group.tile_tokens * c.group_size * self._layout.block_tokens
            step = max(1, _MAX_CACHED_SCORES // per_head)
            for head in range(0, c.num_kv_heads, step):
                heads = slice(head, min(head + step, c.num_kv_heads))
                result = self._attend(group, heads, grouped[:, heads], cache)
                out[group.targets, heads] = result if group.real is None else result[group.real]
        return out.flatten(1)

    def _attend(self, group: _Group, heads: slice, queries: Tensor, cache: Tensor) -> Tensor:
        """Some KV heads of a group, [num_tiles * tile_tokens, heads, group_size, head_dim]."""
        c, block_tokens = self._config, self._layout.block_tokens
        blocks, tiles, tokens, dtype = group.num_blocks, group.num_tiles, group.tile_tokens, queries.dtype
        shape = (blocks, tiles, queries.shape[1], tokens, c.group_size)
        items = group.key_items[:, :, heads].reshape(-1)
        raw = self._scores(group, items, queries, cache)
        if group.first_masked < blocks:
            raw[group.first_masked :].add_(group.bias)
        # The maximum over blocks and then positions: exact, so the order is free, and this one is the fastest.
        best = raw.amax(0).amax(-1, keepdim=True)
        size = loop_length(raw.numel(), torch.get_num_threads())
        weights = self._space.take("weights", torch.float32, size)
        scores = weights[: raw.numel()].view(*shape, block_tokens)
        scores.copy_(raw).sub_(best)
        weights.exp2_()
        total = _fold(scores.sum(-1))
        raw.copy_(scores)
        parts = self._space.take("parts", dtype, *shape, c.head_dim)
        for part, values in self._gathered(group, cache, items + 1):
            flat = raw[part].view(len(values), -1, block_tokens)
            torch.bmm(flat, values, out=parts[part].view(len(values), -1, c.head_dim))
        seen = _fold(self._space.take("sums", torch.float32, *parts.shape).copy_(parts))
        seen.div_(total.unsqueeze(-1))
        return seen.to(dtype).transpose(1, 2).reshape(tiles * tokens, -1, c.group_size, c.head_dim)

    def _scores(self, group: _Group, items: Tensor, queries: Tensor, cache: Tensor) -> Tensor:
        """Products of queries and keys, [blocks, tiles, kv_heads, tile_tokens, group_size, block_tokens]."""
        c, heads, block_tokens = self._config, queries.shape[1], self._layout.block_tokens
        tiles, tokens, dtype = group.num_tiles, group.tile_tokens, queries.dtype
        shape = (group.num_blocks, tiles, heads, tokens, c.group_size)
        per_tile = tokens * c.group_size
        raw = self._space.take("raw", dtype, *shape, block_tokens)
        chosen = queries[group.rows].view(tiles, tokens, heads, c.group_size, c.head_dim)
        if self._turns and per_tile <= _MAX_TURNED_ROWS:
            q = self._space.take("queries", dtype, group.num_blocks, tiles, heads, c.head_dim, per_tile)
            q.copy_(chosen.permute(0, 2, 4, 1, 3).reshape(tiles, heads, c.head_dim, per_tile))
            turned = self._space.take("turned", dtype, group.num_blocks * tiles * heads, block_tokens, per_tile)
            for part, keys in self._gathered(group, cache, items):
                out = turned[part.start * tiles * heads : part.stop * tiles * heads]
                torch.bmm(keys, q[part].view(len(keys), c.head_dim, per_tile), out=out)
            raw.view(-1, per_tile, block_tokens).copy_(turned.transpose(1, 2))
            return raw
        straight = self._space.take("queries", dtype, *shape, c.head_dim)
        straight.copy_(chosen.transpose(1, 2))
        for part, keys in self._gathered(group, cache, items):
            flat = straight[part].view(len(keys), per_tile, c.head_dim)
            torch.bmm(flat, keys.transpose(1, 2), out=raw[part].view(len(keys), per_tile, block_tokens))
        return raw

    def _gathered(self, group: _Group, cache: Tensor, items: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Keys or values, [items, block_tokens, head_dim], as many levels at a time as stay in cache: products read
        them there, and oneDNN would copy strided operands anyway, more slowly."""
        block_tokens, head_dim = self._layout.block_tokens, self._config.head_dim
        per_level = len(items) // group.num_blocks
        step = max(1, _MAX_GATHERED // (per_level * block_tokens * head_dim))
        arena = cache.view(-1, block_tokens * head_dim)
        for at in range(0, group.num_blocks, step):
            stop = min(group.num_blocks, at + step)
            chosen = items[at * per_level : stop * per_level]
            out = self._space.take("gathered", cache.dtype, len(chosen), block_tokens * head_dim)
            torch.index_select(arena, 0, chosen, out=out)
            self._hide(group, slice(at, stop), out.view(-1, block_tokens, head_dim))
            yield slice(at, stop), out.view(-1, block_tokens, head_dim)

    def _hide(self, group: _Group, part: slice, gathered: Tensor) -> None:
        """Zero what no query sees: whatever lies there, NaN included, must not meet a weight of 0."""
        first = max(part.start, group.first_masked)
        if first >= part.stop:
            return
        by_level = gathered.view(part.stop - part.start, group.num_tiles, -1, *gathered.shape[1:])
        seen = group.seen_bits[first - group.first_masked : part.stop - group.first_masked]
        by_level[first - part.start :].view(seen.dtype).bitwise_and_(seen)

    def _lay_out(self, window: int | None) -> Iterator[_Group]:
        by_size: dict[tuple[int, int], list[_Tile]] = {}
        for tile in self._tiles():
            first = 0 if window is None else max(0, tile.start + 1 - window) // self._layout.block_tokens
            num_blocks = len(tile.block_ids) - first
            by_size.setdefault((self._padded_tokens(tile.num_tokens), _bucket(num_blocks)), []).append(tile)
        for (tokens, num_blocks), tiles in by_size.items():
            most = max(1, _MAX_SCORES // (num_blocks * tokens * self._config.num_heads * self._layout.block_tokens))
            for at in range(0, len(tiles), most):
                yield self._group(tiles[at : at + most], tokens, window)

    def _tiles(self) -> Iterator[_Tile]:
        """Cut spans at block boundaries, and finer where the context is so long that scores would not fit."""
        block_tokens = self._layout.block_tokens
        for span in self._spans:
            position, end = span.start, span.start + span.num_tokens
            while position < end:
                block = position // block_tokens
                limit = _MAX_SCORES // ((block + 1) * block_tokens * self._config.num_heads)
                most = min(_MAX_TILE_TOKENS, max(8, 1 << (limit.bit_length() - 1)) if limit else 8)
                stop = min(end, (block + 1) * block_tokens, position + most)
                row = span.row + position - span.start
                yield _Tile(row, position, stop - position, span.block_ids[: block + 1])
                position = stop

    def _padded_tokens(self, num_tokens: int) -> int:
        """A power of two for few distinct shapes; rows per product a multiple of 4, as float32 products need."""
        least = 4 // math.gcd(4, self._config.group_size)
        return max(least, 1 << (num_tokens - 1).bit_length())

    def _group(self, tiles: list[_Tile], tokens: int, window: int | None) -> _Group:
        block_tokens, heads = self._layout.block_tokens, self._config.num_kv_heads
        starts = torch.tensor([tile.start for tile in tiles])
        counts = torch.tensor([tile.num_tokens for tile in tiles])
        firsts = torch.zeros_like(starts) if window is None else (starts + 1 - window).clamp(min=0) // block_tokens
        sizes = torch.tensor([len(tile.block_ids) for tile in tiles]) - firsts
        num_blocks = int(sizes.max())
        # [blocks, tiles]; what a shorter tile lacks is its first block again, hidden by the mask.
        block_ids = torch.tensor(
            [
                tile.block_ids[first:] + (tile.block_ids[first],) * (num_blocks - len(tile.block_ids) + first)
                for tile, first in zip(tiles, firsts.tolist(), strict=True)
            ]
        ).T
        level = torch.arange(num_blocks)[:, None]
        key_starts = torch.where(level < sizes, (level + firsts) * block_tokens, 1 << 40)
        keys = key_starts[..., None] + torch.arange(block_tokens)  # [blocks, tiles, block_tokens]
        token = torch.minimum(torch.arange(tokens), counts[:, None] - 1)  # [tiles, tokens]
        positions = starts[:, None] + token
        mask = keys[:, :, None] > positions[..., None]
        if window is not None:
            mask |= keys[:, :, None] <= positions[..., None] - window
        masked_levels = mask.flatten(1).any(1).nonzero()
        first_masked = int(masked_levels[0]) if len(masked_levels) else num_blocks
        rows = (torch.tensor([tile.row for tile in tiles])[:, None] + token).view(-1)
        is_real = (torch.arange(tokens) < counts[:, None]).view(-1)
        items = block_ids[..., None] * heads + torch.arange(heads)
        return _Group(
            num_blocks=num_blocks,
            num_tiles=len(tiles),
            tile_tokens=tokens,
            rows=rows,
            real=None if bool(is_real.all()) else is_real.nonzero()[:, 0],
            targets=rows[is_real],
            key_items=items * 2,
            first_masked=first_masked,
            bias=torch.zeros(mask[first_masked:].shape, dtype=TORCH_DTYPES[self._layout.dtype]).masked_fill_(
                mask[first_masked:], -math.inf
            )[:, :, None, :, None, :],
            seen_bits=self._seen_bits(mask[first_masked:]),
        )

    def _seen_bits(self, mask: Tensor) -> Tensor:
        dtype = torch.int32 if self._layout.dtype == "float32" else torch.int16
        seen = (~mask.all(2)).to(dtype).neg_()[:, :, None, :, None]
        return seen.expand(*seen.shape[:-1], self._layout.head_dim).contiguous()


def _bucket(num_blocks: int) -> int:
    """Tiles of similar context are computed together: powers of two."""
    return 1 << (num_blocks - 1).bit_length()


def _fold(parts: Tensor) -> Tensor:
    """Sum over the first dimension, upper half onto lower: zeros appended change nothing. Overwrites ``parts``."""
    size = len(parts)
    while size > 1:
        half = 1 << ((size - 1).bit_length() - 1)
        parts[: size - half].add_(parts[half:size])
        size = half
    return parts[0]


def query_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim), in the logarithm of base 2 that exp2 undoes."""
    return math.log2(math.e) / math.sqrt(head_dim)


def can_turn(head_dim: int, block_tokens: int, dtype: torch.dtype) -> bool:
    """Whether K q^T has the very bits of q K^T here. float32 gains nothing by it and does not."""
    if dtype == torch.float32:
        return False
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 4, 7, 8, _MAX_TURNED_ROWS):
        queries = torch.randn(24, rows, head_dim, generator=generator).to(dtype)
        keys = torch.randn(24, block_tokens, head_dim, generator=generator).to(dtype)
        straight = torch.bmm(queries, keys.transpose(1, 2))
        if not torch.equal(straight, torch.bmm(keys, queries.transpose(1, 2).contiguous()).transpose(1, 2)):
            return False
    return True


class Workspace:
    """Memory kept from step to step, by purpose: fresh pages for megabytes of scores cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, purpose: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialized, contiguous; valid until the purpose is taken again."""
        size = math.prod(shape)
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.dtype != dtype or len(buffer) < size:
            buffer = self._buffers[purpose] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


def loop_length(num_elements: int, threads: int) -> int:
    """At least as many, such that elementwise loops split them between threads at whole vectors: what exp2 gives for
    an element of a scalar remainder differs in the last bit."""
    size = num_elements
    while True:
        used = min(threads, -(-size // _GRAIN))
        rounded = -(-size // (_VECTOR * used)) * _VECTOR * used
        if rounded == size:
            return size
        size = rounded
