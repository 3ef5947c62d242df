"""The digest of a layer: xxh3_128 over the xxh3_128 of each segment, a fixed number of blocks in lease order.

A segment's hash does not depend on where its blocks lie nor on how they were written, so both sides hash each one as
soon as it is there, in any order and in any thread. Owns no memory and starts no thread.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from baton.types import KvLayout
from kvtransfer.plan import Copy, Span, spans

if TYPE_CHECKING:
    from kvtransfer.onepass import OnePass

DIGEST_NAME = "xxh3_128/512k"
DIGEST_BYTES = 16
# One call hashes this much: it still fits a core's cache beside its copy, and the call (0.4 us) is lost in it.
_SEGMENT_BYTES = 512 << 10
# The compiled pass takes blocks that are multiples of this, to places aligned so.
ROW_UNIT_BYTES = 1024
ALIGNMENT_BYTES = 64

ByteArray = npt.NDArray[np.uint8]


def segment_blocks(block_bytes: int) -> int:
    return max(1, _SEGMENT_BYTES // block_bytes)


def cut(first: int, num_blocks: int, step_blocks: int) -> Iterator[tuple[int, int]]:
    """A range of blocks, cut where segments are."""
    stop = first + num_blocks
    for start in range(first - first % step_blocks, stop, step_blocks):
        begin = max(first, start)
        yield begin, min(start + step_blocks, stop) - begin


class Hash128(ctypes.Structure):
    """XXH128_hash_t, in the host's byte order: peers of another order could not read each other's KV either."""

    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


class Hashed(Protocol):
    """Memory that the processor does not address and that gives hashes of itself."""

    def hash(self, base: int, parts: Sequence[Span]) -> Hash128:
        """The hash of the bytes at ``base`` plus each part's offset, as if they were one after the other."""


class _Hash(Protocol):
    def __call__(self, address: int, parts: Sequence[Span]) -> Hash128:
        """The hash of bytes that lie in several places, as if they were one after the other."""


def _hash_through_module(address: int, parts: Sequence[Span]) -> Hash128:
    state = xxhash.xxh3_128()
    for offset, num_bytes in parts:
        state.update((ctypes.c_char * num_bytes).from_address(address + offset))
    value = state.intdigest()
    return Hash128(value & (2**64 - 1), value >> 64)


class _HashThroughLibrary:
    """The functions of the library that the xxhash module carries, called through ctypes.

    Two reasons: the module keeps the GIL for inputs below about 100 kB, so that a digesting thread stalled others for
    25 ms at a time (a ctypes call always lets go of it), and on x86 it calls the SSE2 code (29 GB/s out of the cache)
    where ``_dispatch`` takes AVX2 or AVX-512 (60 GB/s). Raises OSError or AttributeError if there is no such library.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__)
        suffix = "_dispatch" if hasattr(library, "XXH3_128bits_dispatch") else ""
        self._once = library[f"XXH3_128bits{suffix}"]
        self._once.argtypes, self._once.restype = (ctypes.c_void_p, ctypes.c_size_t), Hash128
        self._update = library[f"XXH3_128bits_update{suffix}"]
        self._update.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self._create = library.XXH3_createState
        self._create.argtypes, self._create.restype = (), ctypes.c_void_p
        self._reset, self._free = library.XXH3_128bits_reset, library.XXH3_freeState
        self._reset.argtypes = self._free.argtypes = (ctypes.c_void_p,)
        self._digest = library.XXH3_128bits_digest
        self._digest.argtypes, self._digest.restype = (ctypes.c_void_p,), Hash128

    def __call__(self, address: int, parts: Sequence[Span]) -> Hash128:
        if len(parts) == 1:
            offset, num_bytes = parts[0]
            return self._once(address + offset, num_bytes)  # type: ignore[no-any-return]
        state = self._create()
        if not state:
            raise MemoryError("no memory for a hash state")
        try:
            self._reset(state)
            for offset, num_bytes in parts:
                self._update(state, address + offset, num_bytes)
            return self._digest(state)  # type: ignore[no-any-return]
        finally:
            self._free(state)


def _best_hash() -> _Hash:
    try:
        found = _HashThroughLibrary()
    except (ImportError, OSError, AttributeError):
        return _hash_through_module
    sample = ctypes.create_string_buffer(b"baton" * 400)
    for parts in ([Span(0, 1999)], [Span(1000, 999), Span(0, 1000)]):
        address = ctypes.addressof(sample)
        if bytes(found(address, parts)) != bytes(_hash_through_module(address, parts)):
            return _hash_through_module
    return found


hash_parts: _Hash = _best_hash()


def _compiled_pass() -> OnePass | None:
    """None without llvmlite, or if what it made does not give the hashes of the library."""
    try:
        from kvtransfer.onepass import OnePass  # llvmlite may be missing
    except ImportError:
        return None
    found = OnePass()
    source, target = np.arange(8 << 10, dtype=np.uint16).view(np.uint8), np.zeros(16 << 10, np.uint8)
    address, skip = source.ctypes.data, -target.ctypes.data % 64
    parts = [Span(0, 3 << 10), Span(8 << 10, 1 << 10), Span(9 << 10, 3 << 10)]
    wanted = [_hash_through_module(address, parts[:1] + parts[1:2]), _hash_through_module(address, parts[2:])]
    for is_copying in (False, True):
        rows = [(address + a, target.ctypes.data + skip + a if is_copying else 0, n) for a, n in parts]
        if [bytes(h) for h in _run(found, rows, 4 << 10, is_copying=is_copying)] != [bytes(h) for h in wanted]:
            return None
    is_copied = all(np.array_equal(target[skip + a : skip + a + n], source[a : a + n]) for a, n in parts)
    return found if is_copied else None


def _run(
    one_pass: OnePass, rows: Sequence[tuple[int, int, int]], segment_bytes: int, *, is_copying: bool
) -> Iterable[Hash128]:
    """Hashes of the segments of rows (source address, target address, number of bytes) that follow each other."""
    num_bytes = sum(row[2] for row in rows)
    hashes = (Hash128 * -(-num_bytes // segment_bytes))()
    table = (ctypes.c_uint64 * (3 * len(rows)))(*itertools.chain.from_iterable(rows))
    run = one_pass.copy_rows if is_copying else one_pass.hash_rows
    run(ctypes.addressof(table), num_bytes, segment_bytes, ctypes.addressof(hashes))
    return hashes


class LayerDigests:
    """Hashes of the segments of one transfer at one end. Any thread may hash any part at any time.

    Invariant: a segment with a count has in the table the hash of that many leading blocks, as they were when hashed.
    """

    _hash: _Hash = staticmethod(hash_parts)
    _compiled = _compiled_pass()

    def __init__(self, memory: ByteArray | Hashed, layout: KvLayout, block_ids: Sequence[int]) -> None:
        self._memory = memory
        is_host = isinstance(memory, np.ndarray)
        self._address = memory.ctypes.data if isinstance(memory, np.ndarray) else 0
        self._layout = layout
        self._block_ids = block_ids
        self._step = segment_blocks(layout.block_bytes)
        self._num_segments = -(-len(block_ids) // self._step)
        self._one_pass = self._compiled if is_host and layout.block_bytes % ROW_UNIT_BYTES == 0 else None
        # Row by row: [num_layers, num_segments].
        self._table = (Hash128 * (layout.num_layers * self._num_segments))()
        self._counts = [0] * len(self._table)
        self._lock = threading.Lock()
        # Where a range of blocks lies in layer 0, by (first, num_blocks).
        self._parts: dict[tuple[int, int], list[Span]] = {}

    def update(self, layer: int, first: int, num_blocks: int) -> None:
        """Hash the segments that begin in a range of blocks and were not hashed as far as it reaches."""
        stop = first + num_blocks
        assert 0 <= first <= stop <= len(self._block_ids), "range outside the lease"
        begin, base = -(-first // self._step) * self._step, layer * self._num_segments
        for start in range(begin, stop, self._step):
            if self._counts[base + start // self._step] < min(self._step, stop - start):
                self._update(layer, start, stop - start)
                return

    def copy(self, layer: int, first: int, num_blocks: int, copies: Sequence[Copy], target: ByteArray) -> bool:
        """Copy a range, beginning with a segment, and hash it in the same pass; False if this has to be done in two."""
        address = target.ctypes.data
        if self._one_pass is None or first % self._step or address % ALIGNMENT_BYTES:
            return False
        rows = [(self._address + c.src_offset, address + c.dst_offset, c.num_bytes) for c in copies]
        hashes = _run(self._one_pass, rows, self._step * self._layout.block_bytes, is_copying=True)
        self._keep(layer, first, num_blocks, hashes)
        return True

    def _update(self, layer: int, start: int, num_blocks: int, *, shorter: bool = False) -> None:
        """Hash blocks from the beginning of a segment on."""
        base, size = self._address + self._layout.offset(layer, 0), self._layout.block_bytes
        if self._one_pass is not None:
            rows = [(base + offset, 0, num_bytes) for offset, num_bytes in self._spans(start, num_blocks)]
            found = _run(self._one_pass, rows, self._step * size, is_copying=False)
        else:
            hash_of = self._hash if isinstance(self._memory, np.ndarray) else self._memory.hash
            found = [hash_of(base, self._spans(*piece)) for piece in cut(start, num_blocks, self._step)]
        self._keep(layer, start, num_blocks, found, shorter=shorter)

    def _spans(self, first: int, num_blocks: int) -> list[Span]:
        found = self._parts.get((first, num_blocks))
        if found is None:
            found = self._parts[first, num_blocks] = spans(self._layout, 0, self._block_ids, first, num_blocks)
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
        self._keep(layer, start, count, [self._hash(copied.ctypes.data, [Span(0, copied.nbytes)])])

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
        row = memoryview(self._table).cast("B")[start * DIGEST_BYTES : stop * DIGEST_BYTES]
        return xxhash.xxh3_128_digest(row)
