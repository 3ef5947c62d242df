"""The memory of a KV cache, as transfers see it: one interface, and the processor's memory behind it.

Owns bytes, not blocks. Knows no protocol and no transport.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol, Self

import numpy as np

from baton.errors import BadConfig
from kvtransfer import hashing
from kvtransfer.devices.interface import Device, Event
from kvtransfer.hashing import ALIGNMENT_BYTES, ROW_UNIT_BYTES, ByteArray, Hash128
from kvtransfer.plan import Area, BlockList, ByteRange, Copy

_MADV_POPULATE_WRITE = 23
# How long closing waits: fresh pages came at 0.4 to 1.8 GB/s.
_PREFAULT_STEP_BYTES = 16 << 20

# Sends views of memory, in order; they may be overwritten when it returns.
Send = Callable[[list[memoryview]], None]
# Fills views of memory, in order; False if there is no more to fill them with.
Receive = Callable[[list[memoryview]], bool]
# layer, first, num_blocks; and a copy of these blocks' bytes if there is one.
OnRead = Callable[[int, int, int, ByteArray | None], None]
# layer, first, num_blocks
OnWritten = Callable[[int, int, int], None]


class Memory(Protocol):
    """One allocation that holds a KV cache. From any thread. When ``gather`` or ``scatter`` has returned or raised,
    nothing of it is under way."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def device(self) -> Device | None:
        """Whose memory it is; None: the processor's."""

    def fence(self) -> Event | None:
        """After everything that the calling thread has had computed so far; None: that is done. Does not block."""

    def hash(self, base: int, pieces: Sequence[Sequence[ByteRange]]) -> Iterable[Hash128]:
        """Per piece, the hash of its bytes at ``base`` plus offset, as if they lay one after the other. All pieces but
        the last are of one size."""

    def gather(
        self, blocks: BlockList, area: Area, send: Send, on_read: OnRead, fence_of: Callable[[int], Event | None]
    ) -> None:
        """Give an area's bytes to ``send``, in order, each layer's after ``fence_of(layer)`` has come."""

    def scatter(self, blocks: BlockList, area: Area, receive: Receive, on_written: OnWritten | None) -> bool:
        """Fill an area with what ``receive`` puts into buffers; False if it had no more. ``on_written`` follows what is
        in the cache."""

    def reserve(self, num_threads: int, num_bytes: int) -> None:
        """Make what that many threads will need at once to gather or scatter pieces of ``num_bytes``."""

    def prefault_in_background(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Back byte ranges (start, stop) with memory before their first write, where that makes a difference."""

    def close(self) -> None:
        """No transfer may be under way."""


def prefault(mapping: mmap.mmap, start: int, stop: int) -> bool:
    """Back [start, stop), page-aligned, with pages now instead of on first write; False if this kernel cannot (before
    Linux 5.14). Through ctypes, because ``mmap.madvise`` keeps the GIL while the kernel zeroes pages.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    view = ctypes.c_char.from_buffer(mapping, start)  # The mapping cannot be closed meanwhile.
    return bool(madvise(ctypes.addressof(view), stop - start, _MADV_POPULATE_WRITE) == 0)


class HostMemory:
    """The processor's: a sealed memfd, which same-host peers can map, and its writable mapping. ``buffer`` may be
    wrapped by numpy or torch; the memory stays valid as long as such a view lives, also after ``close``.
    """

    device = None

    def __init__(self, buffer: memoryview, fd: int | None = None, mapping: mmap.mmap | None = None) -> None:
        """Without ``fd`` and ``mapping``: memory of someone else's, which no peer can map."""
        self._fd = fd
        self._mapping = mapping
        self._is_closed = False
        self._closing = threading.Event()
        self._prefaulting: threading.Thread | None = None
        self.buffer = buffer
        self.num_bytes = buffer.nbytes
        self.address = np.frombuffer(buffer, dtype=np.uint8).ctypes.data

    @classmethod
    def create(cls, num_bytes: int, *, prefault_pages: bool = False) -> Self:
        """Reserve ``num_bytes``, zeroed. Pages are taken on first touch, or now with ``prefault_pages``.

        Raises BadConfig if the system refuses the size.
        """
        if num_bytes <= 0:
            raise BadConfig(f"KV arena of {num_bytes} bytes asked for, expected a positive size")
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            # A peer that maps the file must never get SIGBUS because the file was shrunk.
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
        return cls(memoryview(mapping), fd, mapping)

    def prefault_in_background(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Take the pages of byte ranges (start, stop) now, in a thread, instead of on first write."""
        mapping = self._mapping
        assert mapping is not None and self._prefaulting is None, "once, and memory of our own"  # noqa: PT018

        def run() -> None:
            for first, last in ranges:
                for start in range(first - first % mmap.PAGESIZE, last, _PREFAULT_STEP_BYTES):
                    is_over = self._closing.is_set()
                    if is_over or not prefault(mapping, start, min(start + _PREFAULT_STEP_BYTES, last)):
                        return

        self._prefaulting = threading.Thread(target=run, name="baton-kv-prefault", daemon=True)
        self._prefaulting.start()

    @property
    def fd(self) -> int:
        assert self._fd is not None and not self._is_closed, "closed, or memory of someone else's"  # noqa: PT018
        return self._fd

    def view(self, offset: int, num_bytes: int) -> memoryview:
        return self.buffer[offset : offset + num_bytes]

    def fence(self) -> None:
        return None

    def hash(self, base: int, pieces: Sequence[Sequence[ByteRange]]) -> Iterable[Hash128]:
        one_pass = hashing.compiled_pass()
        address = self.address + base
        rows = [(address + offset, 0, size) for piece in pieces for offset, size in piece]
        if one_pass is None or any(size % ROW_UNIT_BYTES for _, _, size in rows):
            return [hashing.hash_parts(address, piece) for piece in pieces]
        return hashing.hash_rows(one_pass, rows, sum(size for _, size in pieces[0]), is_copying=False)

    def copy_hashed(self, copies: Sequence[Copy], target: ByteArray, segment_bytes: int) -> Iterable[Hash128] | None:
        """Copy to ``target`` and hash segments of that many bytes in the same pass; None if this has to be done in two
        and nothing was copied."""
        one_pass, address = hashing.compiled_pass(), target.ctypes.data
        if one_pass is None or address % ALIGNMENT_BYTES or any(c.num_bytes % ROW_UNIT_BYTES for c in copies):
            return None
        rows = [(self.address + c.src_offset, address + c.dst_offset, c.num_bytes) for c in copies]
        return hashing.hash_rows(one_pass, rows, segment_bytes, is_copying=True)

    def copy(self, copies: Sequence[Copy], target: ByteArray) -> None:
        for src, dst, size in copies:
            np.copyto(target[dst : dst + size], np.frombuffer(self.view(src, size), dtype=np.uint8))

    def gather(
        self, blocks: BlockList, area: Area, send: Send, on_read: OnRead, fence_of: Callable[[int], Event | None]
    ) -> None:
        del fence_of  # Computed before it was called ready.
        send(self._views(blocks, area))
        for layer in area.layers:
            # After the kernel has read them, which it does faster than a hash reads what is in no cache.
            on_read(layer, area.first, area.num_blocks, None)

    def scatter(self, blocks: BlockList, area: Area, receive: Receive, on_written: OnWritten | None) -> bool:
        if not receive(self._views(blocks, area)):
            return False
        if on_written is not None:
            for layer in area.layers:
                on_written(layer, area.first, area.num_blocks)
        return True

    def _views(self, blocks: BlockList, area: Area) -> list[memoryview]:
        return [self.view(*part) for i in area.layers for part in blocks.ranges(i, area.first, area.num_blocks)]

    def reserve(self, num_threads: int, num_bytes: int) -> None:
        """Bytes are sent and received in place; what hashes them is compiled."""
        hashing.compiled_pass()

    def close(self) -> None:
        """Close the descriptor and unmap, or leave the unmapping to the last view that is still exported."""
        if self._is_closed:
            return
        self._is_closed = True
        self._closing.set()
        if self._prefaulting is not None:
            self._prefaulting.join()
        if self._fd is not None:
            os.close(self._fd)
        try:
            self.buffer.release()
            if self._mapping is not None:
                self._mapping.close()
        except BufferError:
            # Views are alive (torch tensors over the cache): dropping our references lets the last one unmap.
            del self.buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
