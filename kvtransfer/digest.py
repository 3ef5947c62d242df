"""The digest of a layer: xxh3_128 over the xxh3_128 of each block, in lease order.

Hashing block by block makes the digest independent of the order and the size of the writes, so both sides compute it
while bytes still move. Owns no memory: callers name bytes by an array and an offset.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import xxhash

DIGEST_NAME = "xxh3_128/block"
DIGEST_BYTES = 16

ByteArray = npt.NDArray[np.uint8]


class _Hash128(ctypes.Structure):
    """XXH128_hash_t, in the host's byte order: peers of another order could not read each other's KV either."""

    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


# (address, num_bytes) -> hash.
_Hash = Callable[[int, int], _Hash128]


def _hash_through_module(address: int, num_bytes: int) -> _Hash128:
    value = xxhash.xxh3_128_intdigest((ctypes.c_char * num_bytes).from_address(address))
    return _Hash128(value & (2**64 - 1), value >> 64)


def _hash_without_gil() -> _Hash:
    """The hash function of the library that the xxhash module carries, called through ctypes.

    The module keeps the GIL for inputs below about 100 kB: with 64 kB blocks a digesting thread then stalled other
    threads for 25 ms at a time. A ctypes call always lets go of it. Falls back to the module if the symbol is absent.
    """
    try:
        function = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__).XXH3_128bits
    except (ImportError, OSError, AttributeError):
        return _hash_through_module
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    function.restype = _Hash128
    sample = ctypes.create_string_buffer(b"baton" * 100)
    address = ctypes.addressof(sample)
    is_same = bytes(function(address, 500)) == bytes(_hash_through_module(address, 500))
    return function if is_same else _hash_through_module


class BlockDigests:
    """Hashes of the blocks of one transfer. Ranges may be filled in any order and by several threads.

    Invariant: a block that is done has in the table the hash of its bytes at the time of ``update``.
    """

    _hash = staticmethod(_hash_without_gil())

    def __init__(self, num_layers: int, num_blocks: int, block_bytes: int) -> None:
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes
        # Row by row: [num_layers, num_blocks].
        self._table = (_Hash128 * (num_layers * num_blocks))()
        self._done = bytearray(num_layers * num_blocks)

    def update(self, memory: ByteArray, offset: int, layer: int, first: int, num_blocks: int) -> None:
        """Hash ``num_blocks`` blocks that lie one after the other in ``memory`` from ``offset``."""
        size, table, hash_bytes = self._block_bytes, self._table, self._hash
        assert 0 <= offset <= memory.size - num_blocks * size, "range outside the memory"
        address = memory.ctypes.data + offset
        start = layer * self._num_blocks + first
        for i in range(start, start + num_blocks):
            table[i] = hash_bytes(address, size)
            address += size
        self._done[start : start + num_blocks] = b"\1" * num_blocks

    def forget(self, layer: int) -> None:
        """The layer is written again: what was hashed no longer counts."""
        start = layer * self._num_blocks
        self._done[start : start + self._num_blocks] = bytes(self._num_blocks)

    def missing(self, layer: int, first: int, num_blocks: int) -> list[tuple[int, int]]:
        """Runs (first, num_blocks) inside a range that were not hashed yet."""
        base = layer * self._num_blocks
        runs: list[tuple[int, int]] = []
        position, stop = base + first, base + first + num_blocks
        while (start := self._done.find(0, position, stop)) >= 0:
            end = self._done.find(1, start, stop)
            position = stop if end < 0 else end
            runs.append((start - base, position - start))
        return runs

    def layer_digest(self, layer: int, num_blocks: int) -> bytes:
        start = layer * self._num_blocks
        assert self._done.find(0, start, start + num_blocks) < 0, "every block must be hashed before its layer is"
        row = memoryview(self._table).cast("B")[start * DIGEST_BYTES : (start + num_blocks) * DIGEST_BYTES]
        return xxhash.xxh3_128_digest(row)
