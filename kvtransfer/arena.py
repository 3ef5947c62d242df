"""The memory a worker's KV cache lives in: an anonymous file that same-host peers can map. Owns bytes, not blocks."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from baton.errors import BadConfig

_MADV_POPULATE_WRITE = 23
# How long closing waits: fresh pages came at 0.4 to 1.8 GB/s.
_PREFAULT_STEP_BYTES = 16 << 20


def prefault(mapping: mmap.mmap, start: int, stop: int) -> bool:
    """Back [start, stop), page-aligned, with pages now instead of on first write; False if this kernel cannot (before
    Linux 5.14). Through ctypes, because ``mmap.madvise`` keeps the GIL while the kernel zeroes pages.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    view = ctypes.c_char.from_buffer(mapping, start)  # The mapping cannot be closed meanwhile.
    return bool(madvise(ctypes.addressof(view), stop - start, _MADV_POPULATE_WRITE) == 0)


class Arena:
    """A sealed memfd and its writable mapping. ``buffer`` may be wrapped by numpy or torch; the memory stays valid as
    long as such a view lives, also after ``close``.
    """

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self._fd = fd
        self._mapping = mapping
        self._is_closed = False
        self._closing = threading.Event()
        self._prefaulting: threading.Thread | None = None
        self.buffer = memoryview(mapping)

    @classmethod
    def create(cls, num_bytes: int, *, prefault_pages: bool = False) -> Arena:
        """Reserve ``num_bytes``, zeroed. Pages are taken on first touch, or now with ``prefault_pages``.

        Raises BadConfig if the system refuses the size.
        """
        if num_bytes <= 0:
            raise BadConfig(f"KV arena of {num_bytes} bytes asked for, expected a positive size")
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            # A peer that maps the file must never meet SIGBUS because somebody shrank it.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            mapping = mmap.mmap(fd, num_bytes)
        except (OSError, ValueError, OverflowError) as error:
            os.close(fd)
            raise BadConfig(
                f"cannot map a KV arena of {num_bytes} bytes: {error}; lower the number of blocks"
            ) from error
        # Attention reads huge pages faster. Refused, or without effect, where the system has none for shared memory.
        with suppress(AttributeError, OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        if prefault_pages:
            prefault(mapping, 0, num_bytes)
        return cls(fd, mapping)

    def prefault_in_background(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Take the pages of byte ranges (start, stop) now, in a thread, instead of on first write."""
        assert self._prefaulting is None, "once"

        def run() -> None:
            for first, last in ranges:
                for start in range(first - first % mmap.PAGESIZE, last, _PREFAULT_STEP_BYTES):
                    is_over = self._closing.is_set()
                    if is_over or not prefault(self._mapping, start, min(start + _PREFAULT_STEP_BYTES, last)):
                        return

        self._prefaulting = threading.Thread(target=run, name="baton-kv-prefault", daemon=True)
        self._prefaulting.start()

    @property
    def fd(self) -> int:
        assert not self._is_closed, "arena is closed"
        return self._fd

    @property
    def num_bytes(self) -> int:
        return len(self._mapping)

    def close(self) -> None:
        """Close the descriptor and unmap, or leave the unmapping to the last view that is still exported."""
        if self._is_closed:
            return
        self._is_closed = True
        self._closing.set()
        if self._prefaulting is not None:
            self._prefaulting.join()
        os.close(self._fd)
        try:
            self.buffer.release()
            self._mapping.close()
        except BufferError:
            # Views are alive (torch tensors over the cache): dropping our references lets the last one unmap.
            del self.buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
