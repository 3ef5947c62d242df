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
# (address, num_bytes) -> (low, high) halves of the hash.
_Hash = Callable[[int, int], tuple[int, int]]


class _Hash128(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


def _hash_through_buffer(address: int, num_bytes: int) -> tuple[int, int]:
    value = xxhash.xxh3_128_intdigest((ctypes.c_char * num_bytes).from_address(address))
    return value & (2**64 - 1), value >> 64


def _hash_without_gil() -> _Hash:
    """The hash function of the library that the xxhash module carries, called through ctypes.

    The module keeps the GIL for inputs below about 100 kB: with 64 kB blocks a digesting thread then stalled other
    threads for 25 ms at a time. A ctypes call always lets go of it. Falls back to the module if the symbol is absent.
    """
    try:
        function = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__).XXH3_128bits
    except (ImportError, OSError, AttributeError):
        return _hash_through_buffer
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    function.restype = _Hash128

    def hash_bytes(address: int, num_bytes: int) -> tuple[int, int]:
        found = function(address, num_bytes)
        return found.low, found.high

    sample = ctypes.create_string_buffer(b"baton" * 100)
    address = ctypes.addressof(sample)
    return hash_bytes if hash_bytes(address, 500) == _hash_through_buffer(address, 500) else _hash_through_buffer


class BlockDigests:
    """Hashes of the blocks of one transfer. Ranges may be filled in any order and by several threads, each once.

    Invariant: ``is_done(layer, i)`` means the hash in the table is of the bytes at the time of ``update``.
    """

    _hash = staticmethod(_hash_without_gil())

    def __init__(self, num_layers: int, num_blocks: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._table = np.zeros((num_layers, num_blocks, 2), dtype="<u8")
        self._done = np.zeros((num_layers, num_blocks), dtype=bool)

    def update(self, memory: ByteArray, offset: int, layer: int, first: int, num_blocks: int) -> None:
        """Hash ``num_blocks`` blocks that lie one after the other in ``memory`` from ``offset``."""
        assert 0 <= offset <= memory.size - num_blocks * self._block_bytes, "range outside the memory"
        address = memory.ctypes.data + offset
        size, hash_bytes = self._block_bytes, self._hash
        self._table[layer, first : first + num_blocks] = [
            hash_bytes(address + i * size, size) for i in range(num_blocks)
        ]
        self._done[layer, first : first + num_blocks] = True

    def forget(self, layer: int) -> None:
        """The layer is written again: what was hashed no longer counts."""
        self._done[layer] = False

    def missing(self, layer: int, first: int, num_blocks: int) -> list[tuple[int, int]]:
        """Runs (first, num_blocks) inside a range that were not hashed yet."""
        runs: list[tuple[int, int]] = []
        for i in range(first, first + num_blocks):
            if self._done[layer, i]:
                continue
            if runs and sum(runs[-1]) == i:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((i, 1))
        return runs

    def layer_digest(self, layer: int, num_blocks: int) -> bytes:
        assert self._done[layer, :num_blocks].all(), "every block must be hashed before its layer is"
        return xxhash.xxh3_128_digest(self._table[layer, :num_blocks].tobytes())
