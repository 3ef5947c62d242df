"""The digest of a layer: xxh3_128 over the xxh3_128 of each segment, a fixed number of blocks in lease order.

A segment's hash depends neither on the addresses of its blocks nor on how they were written, so both sides hash each
one as soon as it is complete, in any order and in any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import xxhash

from baton.types import KvLayout
from kvtransfer.hashing import ByteArray, Hash128, cut, hash_parts, segment_blocks
from kvtransfer.memory import HostMemory, Memory
from kvtransfer.plan import BlockList, ByteRange, Copy

DIGEST_NAME = "xxh3_128/512k"
DIGEST_BYTES = 16


def block_digest(memory: Memory, layout: KvLayout, block_id: int) -> bytes:
    """Of a block's bytes in all layers."""
    parts = [ByteRange(layout.offset(layer, block_id), layout.block_bytes) for layer in range(layout.num_layers)]
    (value,) = memory.hash(0, [parts])
    return bytes(value)


class LayerDigests:
    """Hashes of the segments of one transfer at one end. Any thread may hash any part at any time.

    Invariant: a segment with a count has in the table the hash of that many leading blocks, as they were when hashed.
    """

    def __init__(self, memory: Memory, layout: KvLayout, block_ids: Sequence[int]) -> None:
        self._memory = memory
        self._blocks = BlockList(layout, block_ids)
        self._layout = layout
        self._block_ids = block_ids
        self._step = segment_blocks(layout.block_bytes)
        self._num_segments = -(-len(block_ids) // self._step)
        # Row by row: [num_layers, num_segments].
        self._table = (Hash128 * (layout.num_layers * self._num_segments))()
        self._counts = [0] * len(self._table)
        self._lock = threading.Lock()
        # Where a range of blocks lies in layer 0, by (first, num_blocks).
        self._parts: dict[tuple[int, int], list[ByteRange]] = {}

    def update(self, layer: int, first: int, num_blocks: int) -> None:
        """Hash the segments that begin in a range of blocks and were not hashed as far as it reaches."""
        stop = first + num_blocks
        assert 0 <= first <= stop <= len(self._block_ids), "range outside the lease"
        begin, base = -(-first // self._step) * self._step, layer * self._num_segments
        for start in range(begin, stop, self._step):
            if self._counts[base + start // self._step] < min(self._step, stop - start):
                self._update(layer, start, stop - start)
                return

    def copy(
        self, source: HostMemory, layer: int, first: int, num_blocks: int, copies: Sequence[Copy], target: ByteArray
    ) -> bool:
        """Copy a range, beginning with a segment, and hash it in the same pass; False if this has to be done in two."""
        if first % self._step:
            return False
        hashes = source.copy_hashed(copies, target, self._step * self._layout.block_bytes)
        if hashes is not None:
            self._keep(layer, first, num_blocks, hashes)
        return hashes is not None

    def _update(self, layer: int, start: int, num_blocks: int, *, shorter: bool = False) -> None:
        """Hash blocks from the beginning of a segment on."""
        pieces = [self._ranges(*piece) for piece in cut(start, num_blocks, self._step)]
        found = self._memory.hash(self._layout.offset(layer, 0), pieces)
        self._keep(layer, start, num_blocks, found, shorter=shorter)

    def _ranges(self, first: int, num_blocks: int) -> list[ByteRange]:
        found = self._parts.get((first, num_blocks))
        if found is None:
            found = self._parts[first, num_blocks] = self._blocks.ranges(0, first, num_blocks)
        return found

    def _keep(
        self, layer: int, start: int, num_blocks: int, hashes: Iterable[Hash128], *, shorter: bool = False
    ) -> None:
        base = layer * self._num_segments
        with self._lock:
            for (first, count), found in zip(cut(start, num_blocks, self._step), hashes, strict=True):
                i = base + first // self._step
                # Another thread may have come further meanwhile.
                if shorter or count > self._counts[i]:
                    self._table[i], self._counts[i] = found, count

    def update_from(self, copied: ByteArray, layer: int, start: int, count: int) -> None:
        """Hash a segment, which begins at ``start``, from a copy of its bytes that lie one after the other."""
        assert start % self._step == 0 and count <= self._step, "one segment"  # noqa: PT018
        self._keep(layer, start, count, [hash_parts(copied.ctypes.data, [ByteRange(0, copied.nbytes)])])

    def forget(self, layer: int) -> None:
        """The layer is written again: what was hashed no longer counts."""
        with self._lock:
            start = layer * self._num_segments
            self._counts[start : start + self._num_segments] = [0] * self._num_segments

    def missing(self, layer: int, num_blocks: int) -> list[tuple[int, int]]:
        """Segments (first, num_blocks) that the digest of the first ``num_blocks`` blocks needs and has not."""
        base = layer * self._num_segments
        wanted = cut(0, num_blocks, self._step)
        return [(start, count) for i, (start, count) in enumerate(wanted) if self._counts[base + i] != count]

    def layer_digest(self, layer: int, num_blocks: int) -> bytes:
        """Hashes what is missing, then the hashes."""
        for start, count in self.missing(layer, num_blocks):
            self._update(layer, start, count, shorter=True)
        start = layer * self._num_segments
        stop = start + -(-num_blocks // self._step)
        if start == stop:  # Of no block: an empty table has no view.
            return xxhash.xxh3_128_digest(b"")
        row = memoryview(self._table).cast("B")[start * DIGEST_BYTES : stop * DIGEST_BYTES]
        return xxhash.xxh3_128_digest(row)
