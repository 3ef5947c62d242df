"""The digest of a layer: xxh3_128 over the xxh3_128 of each segment, a fixed number of blocks in lease order.

A segment's hash does not depend on where its blocks lie nor on how they were written, so both sides hash each one as
soon as it is there, in any order and in any thread. Owns no memory and starts no thread.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from baton.types import KvLayout
from kvtransfer.plan import Span, spans

DIGEST_NAME = "xxh3_128/512k"
DIGEST_BYTES = 16
# One call hashes this much: it still fits a core's cache beside its copy, and the call (0.4 us) is lost in it.
_SEGMENT_BYTES = 512 << 10

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


class LayerDigests:
    """Hashes of the segments of one transfer at one end. Any thread may hash any part at any time.

    Invariant: a segment with a count has in the table the hash of that many leading blocks, as they were when hashed.
    """

    _hash: _Hash = staticmethod(hash_parts)

    def __init__(self, memory: ByteArray | Hashed, layout: KvLayout, block_ids: Sequence[int]) -> None:
        self._memory = memory
        self._address = memory.ctypes.data if isinstance(memory, np.ndarray) else 0
        self._layout = layout
        self._block_ids = block_ids
        self._step = segment_blocks(layout.block_bytes)
        self._num_segments = -(-len(block_ids) // self._step)
        # Row by row: [num_layers, num_segments].
        self._table = (Hash128 * (layout.num_layers * self._num_segments))()
        self._counts = [0] * len(self._table)
        self._lock = threading.Lock()
        # Where a part of a segment lies in layer 0, by (first, num_blocks).
        self._parts: dict[tuple[int, int], list[Span]] = {}

    def update(self, layer: int, first: int, num_blocks: int) -> None:
        """Hash the segments that begin in a range of blocks and were not hashed as far as it reaches."""
        stop = first + num_blocks
        assert 0 <= first <= stop <= len(self._block_ids), "range outside the lease"
        for start in range(-(-first // self._step) * self._step, stop, self._step):
            count = min(self._step, stop - start)
            if self._counts[layer * self._num_segments + start // self._step] < count:
                self._update(layer, start, count)

    def _update(self, layer: int, start: int, count: int, *, shorter: bool = False) -> None:
        parts = self._parts.get((start, count))
        if parts is None:
            parts = self._parts[start, count] = spans(self._layout, 0, self._block_ids, start, count)
        base = self._layout.offset(layer, 0)
        if isinstance(self._memory, np.ndarray):
            found = self._hash(self._address + base, parts)
        else:
            found = self._memory.hash(base, parts)
        self._keep(layer, start, count, found, shorter=shorter)

    def _keep(self, layer: int, start: int, count: int, found: Hash128, *, shorter: bool) -> None:
        i = layer * self._num_segments + start // self._step
        with self._lock:
            # Another thread may have come further meanwhile.
            if shorter or count > self._counts[i]:
                self._table[i], self._counts[i] = found, count

    def update_from(self, copied: ByteArray, layer: int, start: int, count: int) -> None:
        """Hash a segment, which begins at ``start``, from a copy of its bytes that lie one after the other."""
        assert start % self._step == 0 and count <= self._step, "one segment"  # noqa: PT018
        found = self._hash(copied.ctypes.data, [Span(0, copied.nbytes)])
        self._keep(layer, start, count, found, shorter=False)

    def forget(self, layer: int) -> None:
        """The layer is written again: what was hashed no longer counts."""
        with self._lock:
            start = layer * self._num_segments
            self._counts[start : start + self._num_segments] = [0] * self._num_segments

    def missing(self, layer: int, num_blocks: int) -> list[tuple[int, int]]:
        """Segments (first, num_blocks) that the digest of the first ``num_blocks`` blocks needs and has not."""
        base = layer * self._num_segments
        wanted = [(start, min(self._step, num_blocks - start)) for start in range(0, num_blocks, self._step)]
        return [(start, count) for i, (start, count) in enumerate(wanted) if self._counts[base + i] != count]

    def layer_digest(self, layer: int, num_blocks: int) -> bytes:
        """Hashes what is missing, then the hashes."""
        for start, count in self.missing(layer, num_blocks):
            self._update(layer, start, count, shorter=True)
        start = layer * self._num_segments
        stop = start + -(-num_blocks // self._step)
        row = memoryview(self._table).cast("B")[start * DIGEST_BYTES : stop * DIGEST_BYTES]
        return xxhash.xxh3_128_digest(row)
