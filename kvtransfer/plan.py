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


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """Maps position i of a lease from source block ``src_block_ids[i]`` to target block ``dst_block_ids[i]``.

    The layouts may differ in ``num_blocks`` only; anything else was refused at the handshake.
    """

    src_layout: KvLayout
    dst_layout: KvLayout
    src_block_ids: tuple[int, ...]
    dst_block_ids: tuple[int, ...]
    _runs: tuple[_Run, ...]

    @classmethod
    def of(
        cls, src_layout: KvLayout, dst_layout: KvLayout, src_block_ids: Sequence[int], dst_block_ids: Sequence[int]
    ) -> TransferPlan:
        assert src_layout.mismatch(dst_layout) is None, "refused at the handshake"
        if len(src_block_ids) != len(dst_block_ids):
            raise InvalidRequest(f"{len(src_block_ids)} source blocks for {len(dst_block_ids)} target blocks")
        check_block_ids(src_layout, src_block_ids, "source")
        check_block_ids(dst_layout, dst_block_ids, "target")
        runs = tuple(_merge(src_block_ids, dst_block_ids))
        return cls(src_layout, dst_layout, tuple(src_block_ids), tuple(dst_block_ids), runs)

    @property
    def num_blocks(self) -> int:
        return len(self.src_block_ids)

    @property
    def num_bytes(self) -> int:
        """Over all layers."""
        return self.num_blocks * self.src_layout.block_bytes * self.src_layout.num_layers

    def copies(self, layer: int, first: int, num_blocks: int) -> list[Copy]:
        """Positions [first, first + num_blocks) of one layer, contiguous blocks merged into one copy."""
        assert 0 <= first <= first + num_blocks <= self.num_blocks, "range outside the lease"
        size, stop = self.src_layout.block_bytes, first + num_blocks
        found = []
        start = max(0, bisect_right(self._runs, first, key=lambda run: run.first) - 1)
        for run in itertools.islice(self._runs, start, None):
            if run.first >= stop:
                break
            low, high = max(first, run.first), min(stop, run.first + run.num_blocks)
            if low < high:
                skip = low - run.first
                src = self.src_layout.offset(layer, run.src + skip)
                dst = self.dst_layout.offset(layer, run.dst + skip)
                found.append(Copy(src, dst, (high - low) * size))
        return found
