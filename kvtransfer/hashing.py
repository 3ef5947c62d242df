"""Hashes of segments: xxh3_128 by the fastest way that this host has. Owns no memory and starts no thread."""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from kvtransfer.plan import ByteRange

if TYPE_CHECKING:
    from kvtransfer.onepass import OnePass

# One call hashes this much: it still fits a core's cache beside its copy, and the call (0.4 us) is lost in it.
_SEGMENT_BYTES = 512 << 10
# The compiled pass takes runs of bytes that are multiples of this, to places aligned so.
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


class _Hash(Protocol):
    def __call__(self, address: int, parts: Sequence[ByteRange]) -> Hash128:
        """The hash of bytes that lie in several places, as if they were one after the other."""


def _hash_through_module(address: int, parts: Sequence[ByteRange]) -> Hash128:
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

    def __call__(self, address: int, parts: Sequence[ByteRange]) -> Hash128:
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
    for parts in ([ByteRange(0, 1999)], [ByteRange(1000, 999), ByteRange(0, 1000)]):
        address = ctypes.addressof(sample)
        if bytes(found(address, parts)) != bytes(_hash_through_module(address, parts)):
            return _hash_through_module
    return found


hash_parts: _Hash = _best_hash()


@functools.cache
def compiled_pass() -> OnePass | None:
    """Takes 0.15 to 0.4 s the first time. None without llvmlite, or if what it made does not give the hashes of the
    library: hashing and copying then take two passes."""
    try:
        from kvtransfer.onepass import OnePass  # llvmlite may be missing
    except ImportError:
        return None
    found = OnePass()
    source, target = np.arange(8 << 10, dtype=np.uint16).view(np.uint8), np.zeros(16 << 10, np.uint8)
    address, skip = source.ctypes.data, -target.ctypes.data % 64
    parts = [ByteRange(0, 3 << 10), ByteRange(8 << 10, 1 << 10), ByteRange(9 << 10, 3 << 10)]
    wanted = [_hash_through_module(address, parts[:1] + parts[1:2]), _hash_through_module(address, parts[2:])]
    for is_copying in (False, True):
        rows = [(address + a, target.ctypes.data + skip + a if is_copying else 0, n) for a, n in parts]
        if [bytes(h) for h in hash_rows(found, rows, 4 << 10, is_copying=is_copying)] != [bytes(h) for h in wanted]:
            return None
    is_copied = all(np.array_equal(target[skip + a : skip + a + n], source[a : a + n]) for a, n in parts)
    return found if is_copied else None


def hash_rows(
    one_pass: OnePass, rows: Sequence[tuple[int, int, int]], segment_bytes: int, *, is_copying: bool
) -> Iterable[Hash128]:
    """Hashes of the segments of rows (source address, target address, number of bytes) that follow each other."""
    num_bytes = sum(row[2] for row in rows)
    hashes = (Hash128 * -(-num_bytes // segment_bytes))()
    table = (ctypes.c_uint64 * (3 * len(rows)))(*itertools.chain.from_iterable(rows))
    run = one_pass.copy_rows if is_copying else one_pass.hash_rows
    run(ctypes.addressof(table), num_bytes, segment_bytes, ctypes.addressof(hashes))
    return hashes
