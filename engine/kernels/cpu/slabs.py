"""Memory for weights, on huge pages if the system has them (transparent_hugepage set to madvise or always).

Every 4 KiB page costs a walk of the page tables, in a virtual machine of two. One thread read 16 to 19 GB/s from small
pages and 27 to 30 GB/s from huge ones (Zen 4, virtual machine, interleaved).
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_SLAB_BYTES = 64 << 20
_ALIGNMENT_BYTES = 256


class Slabs:
    """Large mappings that are cut into tensors. A slab is freed when all its tensors are gone."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)

    def copy(self, values: Tensor) -> Tensor:
        """A contiguous tensor with the same shape and values."""
        num_bytes = values.numel() * values.element_size()
        if num_bytes > len(self._slab):
            self._slab = _mapped(max(num_bytes, _SLAB_BYTES))
        taken = self._slab[:num_bytes]
        self._slab = self._slab[-(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES :]
        return taken.view(values.dtype).view(values.shape).copy_(values)


def _mapped(num_bytes: int) -> Tensor:
    """[at least ``num_bytes``] uint8, aligned to huge pages at both ends."""
    whole = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    mapping = mmap.mmap(-1, whole + _HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without huge pages refuses the advice; small pages work as well, more slowly.
    with suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    every = torch.frombuffer(mapping, dtype=torch.uint8)
    first = -every.data_ptr() % _HUGE_PAGE_BYTES
    return every[first : first + whole]
