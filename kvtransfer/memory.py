"""The KV cache in a device's memory, as transfers see it: fences, pinned staging, digests. Knows no protocol."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import numpy as np

from kvtransfer.arena import Arena
from kvtransfer.devices.interface import Device, Event, Pinned
from kvtransfer.digest import ByteArray, Hash128, hash_parts
from kvtransfer.plan import Span

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


class DeviceMemory:
    """One allocation on a device. From any thread."""

    def __init__(self, device: Device, address: int, num_bytes: int) -> None:
        self.device = device
        self.address = address
        self.num_bytes = num_bytes
        self._lock = threading.Lock()
        # Not in use; as many as threads were at it at once, which their pools bound.
        self._idle: list[Staging] = []
        self._is_closed = False

    def reserve(self, num_stagings: int, num_bytes: int) -> None:
        """Make staging that will be wanted, with buffers of ``num_bytes``: pinning takes milliseconds, and allocating
        while a graph is recorded in another thread breaks the recording."""
        made = [Staging(self.device, max(num_bytes, _MIN_STAGING_BYTES)) for _ in range(num_stagings)]
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

    def runs(self, parts: Sequence[Span], base: int = 0) -> list[tuple[int, int]]:
        return [(self.address + base + offset, size) for offset, size in parts]

    def hash(self, base: int, parts: Sequence[Span]) -> Hash128:
        """What the device's memory holds now, read back: the same hash as over host memory."""
        num_bytes = sum(size for _, size in parts)
        with self.staging(num_bytes) as staging:
            staging.gather(0, self.runs(parts, base))
            staging.wait(0)
            return hash_parts(staging.view(0, num_bytes).ctypes.data, [Span(0, num_bytes)])

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for staging in idle:
            staging.close()


CacheMemory = ByteArray | DeviceMemory


class DeviceArena:
    """The device's counterpart of ``Arena``: owns the allocation; engines wrap it by ``__cuda_array_interface__``."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._is_closed = False

    @classmethod
    def create(cls, num_bytes: int, device: Device) -> DeviceArena:
        """Contents are arbitrary. Raises BadConfig if the device has not so much memory."""
        return cls(DeviceMemory(device, device.allocate(num_bytes), num_bytes))

    @property
    def num_bytes(self) -> int:
        return self.memory.num_bytes

    @property
    def __cuda_array_interface__(self) -> Mapping[str, object]:
        """Version 3: bytes, writable, no stream to wait for."""
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.memory.address, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }

    def close(self) -> None:
        """No transfer may be under way, and nobody may use views over it any more."""
        if self._is_closed:
            return
        self._is_closed = True
        self.memory.close()
        self.memory.device.free(self.memory.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


AnyArena = Arena | DeviceArena


def memory_of(arena: AnyArena) -> CacheMemory:
    return arena.memory if isinstance(arena, DeviceArena) else np.frombuffer(arena.buffer, dtype=np.uint8)


def device_of(memory: CacheMemory) -> Device | None:
    return memory.device if isinstance(memory, DeviceMemory) else None
