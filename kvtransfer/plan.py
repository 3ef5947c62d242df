"""Plans the copies of a transfer: block lists of two caches become merged byte ranges. Pure."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from baton.errors import InvalidRequest
from baton.types import KvLayout


class Copy(NamedTuple):
    """One run of bytes, contiguous in both caches."""

    src_offset: int
    dst_offset: int
    num_bytes: int


class ByteRange(NamedTuple):
    """One run of bytes in one cache."""

    offset: int
    num_bytes: int


class _Run(NamedTuple):
    # Positions [first, first + num_blocks) of the lease lie at consecutive block ids from src and dst.
    first: int
    src: int
    dst: int
    num_blocks: int


def _merge(src: Sequence[int], dst: Sequence[int]) -> Iterator[_Run]:
    start = 0
    for i in range(1, len(src) + 1):
        if i == len(src) or src[i] != src[i - 1] + 1 or dst[i] != dst[i - 1] + 1:
            yield _Run(start, src[start], dst[start], i - start)
            start = i


def check_block_ids(layout: KvLayout, block_ids: Sequence[int], what: str) -> None:
    """Raise InvalidRequest unless every id exists in the layout and none appears twice."""
    for block_id in block_ids:
        if not 0 <= block_id < layout.num_blocks:
            raise InvalidRequest(f"{what} block {block_id} is outside the cache of {layout.num_blocks} blocks")
    if len(set(block_ids)) != len(block_ids):
        raise InvalidRequest(f"{what} blocks {list(block_ids)} name a block twice")


class Area(NamedTuple):
    """Positions [first, first + num_blocks) of a lease in ``num_layers`` layers."""

    layer: int
    num_layers: int
    first: int
    num_blocks: int

    @property
    def layers(self) -> range:
        return range(self.layer, self.layer + self.num_layers)


@dataclass(frozen=True, slots=True)
class BlockList:
    """A sequence's blocks in one cache, in lease order."""

    layout: KvLayout
    ids: Sequence[int]

    def ranges(self, layer: int, first: int, num_blocks: int) -> list[ByteRange]:
        """The bytes of positions [first, first + num_blocks) in one layer, neighbours merged."""
        size = self.layout.block_bytes
        ids = self.ids[first : first + num_blocks]
        return [ByteRange(self.layout.offset(layer, run.src), run.num_blocks * size) for run in _merge(ids, ids)]


class Shard(NamedTuple):
    """A part of a model's KV: layers [layer, layer + num_layers) by KV heads [head, head + num_heads)."""

    layer: int
    num_layers: int
    head: int
    num_heads: int

    @classmethod
    def whole(cls, layout: KvLayout) -> Shard:
        return cls(0, layout.num_layers, 0, layout.num_kv_heads)

    def overlap(self, other: Shard) -> Shard | None:
        """What both hold; None if nothing."""
        layer, head = max(self.layer, other.layer), max(self.head, other.head)
        num_layers = min(self.layer + self.num_layers, other.layer + other.num_layers) - layer
        num_heads = min(self.head + self.num_heads, other.head + other.num_heads) - head
        return Shard(layer, num_layers, head, num_heads) if num_layers > 0 and num_heads > 0 else None


class _Place(NamedTuple):
    # Where block 0 of the first layer begins, and from there to the next layer and the next block.
    base: int
    layer_bytes: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class End:
    """A cache that holds one shard, and the blocks in it. ``layout`` has the shard's layers and heads."""

    layout: KvLayout
    shard: Shard
    block_ids: tuple[int, ...]

    @classmethod
    def of(cls, layout: KvLayout, block_ids: Sequence[int], what: str, shard: Shard | None = None) -> End:
        """Raises InvalidRequest for blocks that are not in the cache; without ``shard`` it holds the whole model."""
        check_block_ids(layout, block_ids, what)
        found = shard or Shard.whole(layout)
        assert (found.num_layers, found.num_heads) == (layout.num_layers, layout.num_kv_heads), "the layout is its own"
        return cls(layout, found, tuple(block_ids))

    def offset(self, layer: int, head: int, block: int) -> int:
        """Where a head of the model begins in a block."""
        within = (head - self.shard.head) * self.head_bytes
        return self.layout.offset(layer - self.shard.layer, block) + within

    def place(self, shard: Shard) -> _Place:
        """Of a part of the shard that it holds."""
        base = self.offset(shard.layer, shard.head, 0)
        return _Place(base, self.layout.num_blocks * self.layout.block_bytes, self.layout.block_bytes)

    @property
    def head_bytes(self) -> int:
        return self.layout.block_bytes // self.layout.num_kv_heads


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """Maps position i of a lease from block i of ``src`` to block i of ``dst``, as far as both hold it: ``shard``, in
    whose layers all is said.

    The layouts may differ in ``num_blocks``, layers and heads; anything else was refused at the handshake.
    """

    src: End
    dst: End
    shard: Shard
    # Of one block in one layer, which lie one after the other.
    run_bytes: int
    _places: tuple[_Place, _Place]
    _runs: tuple[_Run, ...]

    @classmethod
    def of(cls, src: End, dst: End) -> TransferPlan:
        """Raises InvalidRequest if the two do not fit each other."""
        if len(src.block_ids) != len(dst.block_ids):
            raise InvalidRequest(f"{len(src.block_ids)} source blocks for {len(dst.block_ids)} target blocks")
        shard = src.shard.overlap(dst.shard)
        if shard is None:
            raise InvalidRequest(f"source {src.shard} and target {dst.shard} have no layer and head in common")
        assert src.head_bytes == dst.head_bytes, "refused at the handshake"
        places = src.place(shard), dst.place(shard)
        runs = tuple(_merge(src.block_ids, dst.block_ids))
        return cls(src, dst, shard, shard.num_heads * src.head_bytes, places, runs)

    @property
    def num_blocks(self) -> int:
        return len(self.src.block_ids)

    def bytes_of(self, num_blocks: int) -> int:
        """Of so many blocks, over all layers."""
        return num_blocks * self.run_bytes * self.shard.num_layers

    def copies(self, layer: int, first: int, num_blocks: int) -> list[Copy]:
        """Positions [first, first + num_blocks) of one layer of the shard, contiguous bytes merged into one copy."""
        assert 0 <= first <= first + num_blocks <= self.num_blocks, "range outside the lease"
        size, stop, (src, dst) = self.run_bytes, first + num_blocks, self._places
        src_at, dst_at = src.base + layer * src.layer_bytes, dst.base + layer * dst.layer_bytes
        # Blocks that move whole move together with their neighbours.
        is_whole = src.block_bytes == dst.block_bytes == size
        found = []
        start = max(0, bisect_right(self._runs, first, key=lambda run: run.first) - 1)
        for run in itertools.islice(self._runs, start, None):
            if run.first >= stop:
                break
            low, high = max(first, run.first), min(stop, run.first + run.num_blocks)
            step = max(1, high - low) if is_whole else 1
            for position in range(low, high, step):
                i = position - run.first
                there, here = src_at + (run.src + i) * src.block_bytes, dst_at + (run.dst + i) * dst.block_bytes
                found.append(Copy(there, here, step * size))
        return found
