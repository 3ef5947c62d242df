"""A device's memory: pinned staging between it and sockets or hashes, a segment ahead. Knows no socket."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

from kvtransfer.devices.interface import Device, Event, Pinned
from kvtransfer.hashing import ByteArray, Hash128, cut, hash_parts, segment_blocks
from kvtransfer.memory import OnRead, OnWritten, Receive, Send
from kvtransfer.plan import Area, BlockList, ByteRange

_MIN_STAGING_BYTES = 512 << 10


class Staging:
    """A stream and two pinned buffers: one is copied by the device while the other is read or filled by its thread.

    Invariant: a buffer whose copy is under way is not touched before ``wait`` of it.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.stream = device.stream()
        self._device = device
        self._buffers: tuple[Pinned, Pinned] = (device.pin(num_bytes), device.pin(num_bytes))
        self._under_way: list[Event | None] = [None, None]

    def view(self, i: int, num_bytes: int) -> ByteArray:
        assert self._under_way[i] is None, "the device is at this buffer"
        return self._buffers[i].array[:num_bytes]

    def gather(self, i: int, runs: Sequence[tuple[int, int]]) -> None:
        """Begin to copy (address, size) runs of the device one after the other into buffer i."""
        self._copy(i, runs, to_device=False)

    def scatter(self, i: int, runs: Sequence[tuple[int, int]]) -> None:
        """The way back."""
        self._copy(i, runs, to_device=True)

    def _copy(self, i: int, runs: Sequence[tuple[int, int]], *, to_device: bool) -> None:
        assert self._under_way[i] is None, "the device is at this buffer"
        here = self._buffers[i].address
        assert sum(size for _, size in runs) <= self.num_bytes, "runs exceed the buffer"
        try:
            for there, size in runs:
                self.stream.copy(*((there, here) if to_device else (here, there)), size)
                here += size
        finally:  # Also of a copy that failed half way the first runs are under way.
            self._under_way[i] = self.stream.record()

    def wait(self, i: int) -> None:
        event, self._under_way[i] = self._under_way[i], None
        if event is not None:
            event.wait()

    def settle(self) -> None:
        """Nothing of ours is under way on the device when this returns or raises."""
        self._under_way = [None, None]
        self.stream.record().wait()

    def close(self) -> None:
        self.stream.close()
        for pinned in self._buffers:
            self._device.unpin(pinned)


class _Segment(NamedTuple):
    layer: int
    first: int
    num_blocks: int


def _segments(area: Area, step_blocks: int) -> list[_Segment]:
    pieces = list(cut(area.first, area.num_blocks, step_blocks))
    return [_Segment(layer, *piece) for layer in area.layers for piece in pieces]


class DeviceMemory:
    """One allocation on a device; engines wrap it by ``__cuda_array_interface__``. From any thread."""

    def __init__(self, device: Device, address: int, num_bytes: int) -> None:
        self.device = device
        self.address = address
        self.num_bytes = num_bytes
        self._lock = threading.Lock()
        # Not in use; as many as threads were at it at once, which their pools bound.
        self._idle: list[Staging] = []
        self._is_closed = False

    @classmethod
    def create(cls, num_bytes: int, device: Device) -> Self:
        """Contents are arbitrary. Raises BadConfig if the device has not so much memory."""
        return cls(device, device.allocate(num_bytes), num_bytes)

    @property
    def __cuda_array_interface__(self) -> Mapping[str, object]:
        """Version 3: bytes, writable, no stream to wait for."""
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }

    def fence(self) -> Event:
        return self.device.fence()

    def prefault_in_background(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing: a device's memory is there once it is allocated."""

    def reserve(self, num_threads: int, num_bytes: int) -> None:
        """Pinning takes milliseconds, and allocating while a graph is recorded in another thread breaks the
        recording."""
        made = [Staging(self.device, max(num_bytes, _MIN_STAGING_BYTES)) for _ in range(num_threads)]
        with self._lock:
            self._idle += made

    @contextlib.contextmanager
    def staging(self, num_bytes: int = 0) -> Iterator[Staging]:
        """Borrow buffers of at least ``num_bytes`` each. Given back with nothing under way, whatever happens."""
        with self._lock:
            found = next((i for i, s in enumerate(self._idle) if s.num_bytes >= num_bytes), None)
            staging = None if found is None else self._idle.pop(found)
        if staging is None:
            staging = Staging(self.device, max(num_bytes, _MIN_STAGING_BYTES))
        try:
            try:
                yield staging
            finally:
                staging.settle()
        finally:
            with self._lock:
                is_closed = self._is_closed
                if not is_closed:
                    self._idle.append(staging)
            if is_closed:
                staging.close()

    def runs(self, parts: Sequence[ByteRange], base: int = 0) -> list[tuple[int, int]]:
        """Where the device finds byte ranges of the cache."""
        assert all(0 <= base + offset <= self.num_bytes - size for offset, size in parts), "outside the cache"
        return [(self.address + base + offset, size) for offset, size in parts]

    def hash(self, base: int, pieces: Sequence[Sequence[ByteRange]]) -> Iterable[Hash128]:
        """Of what the device's memory holds now, read back: the same hash as over host memory."""
        return [self._hash(self.runs(piece, base)) for piece in pieces]

    def _hash(self, runs: Sequence[tuple[int, int]]) -> Hash128:
        num_bytes = sum(size for _, size in runs)
        with self.staging(num_bytes) as staging:
            staging.gather(0, runs)
            staging.wait(0)
            return hash_parts(staging.view(0, num_bytes).ctypes.data, [ByteRange(0, num_bytes)])

    def gather(
        self, blocks: BlockList, area: Area, send: Send, on_read: OnRead, fence_of: Callable[[int], Event | None]
    ) -> None:
        """While one segment is hashed and sent, the next one is on its way."""
        step = segment_blocks(blocks.layout.block_bytes)
        todo = _segments(area, step)

        def begin(staging: Staging, i: int) -> None:
            fence = fence_of(todo[i].layer)
            if fence is not None:
                staging.stream.wait_for(fence)
            staging.gather(i % 2, self.runs(blocks.ranges(*todo[i])))

        with self.staging(step * blocks.layout.block_bytes) as staging:
            begin(staging, 0)
            for i, segment in enumerate(todo):
                if i + 1 < len(todo):
                    begin(staging, i + 1)
                staging.wait(i % 2)
                copied = staging.view(i % 2, segment.num_blocks * blocks.layout.block_bytes)
                on_read(*segment, copied)
                send([copied.data])

    def scatter(self, blocks: BlockList, area: Area, receive: Receive, on_written: OnWritten | None) -> bool:
        """While one segment is received, the one before it is on its way to the device."""
        step = segment_blocks(blocks.layout.block_bytes)
        todo = _segments(area, step)

        def end(staging: Staging, i: int) -> None:
            staging.wait(i % 2)
            if on_written is not None:
                on_written(*todo[i])

        with self.staging(step * blocks.layout.block_bytes) as staging:
            for i, segment in enumerate(todo):
                if not receive([staging.view(i % 2, segment.num_blocks * blocks.layout.block_bytes).data]):
                    return False
                staging.scatter(i % 2, self.runs(blocks.ranges(*segment)))
                if i > 0:
                    end(staging, i - 1)
            if todo:
                end(staging, len(todo) - 1)
        return True

    def close(self) -> None:
        """Nothing may use views over it any more."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            idle, self._idle = self._idle, []
        for staging in idle:
            staging.close()
        self.device.free(self.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
