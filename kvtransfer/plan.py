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
        return cls(src, dst, shard, tuple(_merge(src.block_ids, dst.block_ids)))

    @property
    def num_blocks(self) -> int:
        return len(self.src.block_ids)

    @property
    def num_bytes(self) -> int:
        """Over all layers."""
        return self.num_blocks * self._run_bytes * self.shard.num_layers

    @property
    def _run_bytes(self) -> int:
        """Of one block in one layer, which lie one after the other."""
        return self.shard.num_heads * self.src.head_bytes

    @property
    def _is_whole(self) -> bool:
        """Blocks move whole, so that neighbours can move together."""
        return self._run_bytes == self.src.layout.block_bytes == self.dst.layout.block_bytes

    def copies(self, layer: int, first: int, num_blocks: int) -> list[Copy]:
        """Positions [first, first + num_blocks) of one layer of the shard, contiguous bytes merged into one copy."""
        assert 0 <= first <= first + num_blocks <= self.num_blocks, "range outside the lease"
        size, stop, layer = self._run_bytes, first + num_blocks, self.shard.layer + layer
        found = []
        start = max(0, bisect_right(self._runs, first, key=lambda run: run.first) - 1)
        for run in itertools.islice(self._runs, start, None):
            if run.first >= stop:
                break
            low, high = max(first, run.first), min(stop, run.first + run.num_blocks)
            step = high - low if self._is_whole else 1
            for position in range(low, high, max(1, step)):
                skip = position - run.first
                src = self.src.offset(layer, self.shard.head, run.src + skip)
                dst = self.dst.offset(layer, self.shard.head, run.dst + skip)
                found.append(Copy(src, dst, step * size))
        return found
