"""Which bytes a sampled digest reads: one line of 64 bytes in every KiB of a layer. Pure but for reading memory.

The line depends on the layer and on the KiB's position in the lease, through a mix of all their bits, so that damage at
any fixed stride meets the pattern like damage anywhere. Both ends and both implementations (here and in onepass.py)
have to take the same lines: the constants are part of the digest's name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

KIB_BYTES = 1024
LINE_BYTES = 64
LINES = KIB_BYTES // LINE_BYTES
# Odd numbers with bits all over: Fibonacci hashing's, and one of MurmurHash3's finalizer.
MIX_1, MIX_2 = 0x9E3779B1, 0x85EBCA6B
MIX_SHIFT = 15
# Keeps the counts of layers apart; a layer's share of a lease has fewer KiB (64 GiB).
_LAYER_STEP = (1 << 26) + 1


def kib_number(layer: int, first_block: int, block_bytes: int) -> int:
    """What the pattern depends on, for the first KiB of a block; modulo 2**32."""
    return (layer * _LAYER_STEP + first_block * (block_bytes // KIB_BYTES)) % 2**32


def line_numbers(first_kib: int, num_kib: int) -> npt.NDArray[np.uint32]:
    """The line, 0 to 15, that is read in each of the KiB from ``first_kib`` on."""
    mixed = (first_kib + np.arange(num_kib, dtype=np.uint64)).astype(np.uint32)
    mixed *= np.uint32(MIX_1)
    mixed ^= mixed >> np.uint32(MIX_SHIFT)
    mixed *= np.uint32(MIX_2)
    return mixed >> np.uint32(28)


def gather(rows: Sequence[tuple[int, int, int]], first_kib: int) -> npt.NDArray[np.uint8]:
    """The lines of rows (address, unused, number of bytes) that follow each other: [num_kib, LINE_BYTES]."""
    found = []
    for address, _, num_bytes in rows:
        num_kib = num_bytes // KIB_BYTES
        row = np.frombuffer(memoryview((ctypes.c_char * num_bytes).from_address(address)), np.uint8)
        lines = line_numbers(first_kib, num_kib)
        found.append(row.reshape(num_kib, LINES, LINE_BYTES)[np.arange(num_kib), lines])
        first_kib += num_kib
    return np.concatenate(found)
