"""A fake device for tests: its memory cannot be addressed, its streams run late and in threads of their own.

Memory is in memfds, so that another process opens it like a GPU's. Copies read their bytes when they are carried out,
after seeded delays, so a missing wait gives wrong bytes.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from baton.errors import InternalError, TransferFailed
from kvtransfer.devices.interface import HANDLE_BYTES, Event, Pinned
from kvtransfer.hashing import ByteArray

# pid, descriptor, number of bytes
_HANDLE = struct.Struct("=iiQ")
# No address of ours is one that the processor could follow.
_FIRST_ADDRESS = 1 << 56
_GAP_BYTES = 1 << 20


class _Region(NamedTuple):
    array: ByteArray
    # None: pinned, or a peer's.
    fd: int | None


class FakeEvent:
    """Set by its stream, or by a test that plays a computation which takes its time."""

    def __init__(self) -> None:
        self._is_set = threading.Event()
        self.error: Exception | None = None

    def set(self) -> None:
        self._is_set.set()

    @property
    def is_set(self) -> bool:
        return self._is_set.is_set()

    def wait(self) -> None:
        if not self._is_set.wait(30):
            raise InternalError("an event of the fake device did not come in 30 s")
        if self.error is not None:
            raise InternalError(f"fake device failed: {self.error}")


class FakeStream:
    """A queue and the thread that works it off."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._changed = threading.Condition()
        self._queue: deque[Callable[[], None]] = deque()
        self._waits_for: FakeEvent | None = None
        self._is_busy = False
        self._is_closing = False
        # A device that has failed fails everything after, as CUDA's do.
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="baton-fake-stream", daemon=True)
        self._thread.start()

    def _put(self, work: Callable[[], None]) -> None:
        with self._changed:
            assert not self._is_closing, "stream is closed"
            self._queue.append(work)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                while not self._queue and not self._is_closing:
                    self._changed.wait()
                if not self._queue:
                    return
                work = self._queue.popleft()
                self._is_busy = True
            try:
                work()
            except Exception as error:  # told by the next event, as a device would
                self._error = self._error or error

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, FakeEvent), "an event of another device"
        self._put(lambda: self._wait_for(event))

    def _wait_for(self, event: FakeEvent) -> None:
        self._waits_for = event
        try:
            event.wait()
        finally:
            self._waits_for = None

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        device = self._device
        delay_s = device.ask_copy()

        def work() -> None:
            time.sleep(delay_s)
            device.count_copy()
            np.copyto(device.bytes_at(target, num_bytes), device.bytes_at(source, num_bytes))

        self._put(work)

    def write(self, target: int, data: ByteArray) -> None:
        """What a kernel would do."""
        delay_s = self._device.next_delay_s()

        def work() -> None:
            time.sleep(delay_s)
            np.copyto(self._device.bytes_at(target, data.nbytes), data)

        self._put(work)

    def record(self) -> FakeEvent:
        event = FakeEvent()

        def work() -> None:
            event.error = self._error
            event.set()

        self._put(work)
        return event

    def settle(self) -> None:
        """Until it has nothing to do, or waits for an event that has not come."""

        def is_settled() -> bool:
            waits_for = self._waits_for
            is_stuck = waits_for is not None and not waits_for.is_set
            return is_stuck or (not self._queue and not self._is_busy)

        deadline_s = time.monotonic() + 30
        while True:
            with self._changed:
                if is_settled():
                    return
                # Starting to wait for an event needs no wake-up.
                self._changed.wait(0.001)
            assert time.monotonic() < deadline_s, "the fake device does not settle"

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(30)
        self._device.forget(self)


class FakeDevice:
    """``seed`` and ``max_delay_s`` say how late copies are; ``fail_at``: the copy with this number, counted from 1,
    breaks the stream it is in. ``compute`` is the stream that ``fence`` speaks of.
    """

    def __init__(
        self, *, memory_id: str = "fake", seed: int = 0, max_delay_s: float = 0.0, fail_at: int | None = None
    ) -> None:
        self.memory_id = memory_id
        self.reachable_ids: tuple[str, ...] = (memory_id,)
        self.fail_at = fail_at
        self._max_delay_s = max_delay_s
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._regions: dict[int, _Region] = {}
        self._next_address = _FIRST_ADDRESS
        self._num_copies = 0
        # Copies that were queued.
        self.num_asked = 0
        self._streams: list[FakeStream] = []
        self.compute = self.stream()

    # The interface.

    def allocate(self, num_bytes: int) -> int:
        fd = os.memfd_create("baton-fake-device", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return self._add(_mapped(fd, num_bytes), fd)

    def free(self, address: int) -> None:
        with self._lock:
            region = self._regions.pop(address)
        if region.fd is not None:
            os.close(region.fd)

    def pin(self, num_bytes: int) -> Pinned:
        array = np.zeros(num_bytes, dtype=np.uint8)
        return Pinned(array, self._add(array, None))

    def unpin(self, pinned: Pinned) -> None:
        self.free(pinned.address)

    def stream(self) -> FakeStream:
        stream = FakeStream(self)
        with self._lock:
            self._streams.append(stream)
        return stream

    def fence(self) -> FakeEvent:
        return self.compute.record()

    def export(self, address: int) -> bytes:
        with self._lock:
            region = self._regions[address]
        assert region.fd is not None, "only what was allocated is exported"
        return _HANDLE.pack(os.getpid(), region.fd, region.array.nbytes).ljust(HANDLE_BYTES, b"\0")

    def open(self, handle: bytes, num_bytes: int) -> int:
        pid, number, size = _HANDLE.unpack_from(handle)
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransferFailed(f"cannot open the peer's fake device memory: {error}") from error
        try:
            return self._add(_mapped(fd, min(num_bytes, size)), None)
        finally:
            os.close(fd)

    def close(self, address: int) -> None:
        self.free(address)

    # For streams and tests.

    def bytes_at(self, address: int, num_bytes: int) -> ByteArray:
        """Raises InternalError unless all of them lie in one allocation."""
        with self._lock:
            for base, region in self._regions.items():
                if base <= address and address + num_bytes <= base + region.array.nbytes:
                    return region.array[address - base : address - base + num_bytes]
        raise InternalError(f"{num_bytes} bytes at {address:#x} are in no allocation")

    def settle(self) -> None:
        """Until every stream has nothing to do, or waits for an event that has not come."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.settle()

    @property
    def num_regions(self) -> int:
        with self._lock:
            return len(self._regions)

    @property
    def num_copies(self) -> int:
        """Copies that were carried out."""
        with self._lock:
            return self._num_copies

    def next_delay_s(self) -> float:
        with self._lock:
            return self._random.random() * self._max_delay_s

    def ask_copy(self) -> float:
        with self._lock:
            self.num_asked += 1
        return self.next_delay_s()

    def count_copy(self) -> None:
        with self._lock:
            self._num_copies += 1
            is_broken = self._num_copies == self.fail_at
        if is_broken:
            raise TransferFailed(f"copy {self.fail_at} was to fail")

    def forget(self, stream: FakeStream) -> None:
        with self._lock:
            self._streams.remove(stream)

    def shut_down(self) -> None:
        """Raises AssertionError if memory or streams were left behind."""
        self.compute.close()
        assert not self._streams, f"{len(self._streams)} streams were not closed"
        assert not self._regions, f"{len(self._regions)} allocations were not freed"

    def _add(self, array: ByteArray, fd: int | None) -> int:
        with self._lock:
            address = self._next_address
            self._next_address += array.nbytes + _GAP_BYTES
            self._regions[address] = _Region(array, fd)
            return address


def _mapped(fd: int, num_bytes: int) -> ByteArray:
    return np.frombuffer(mmap.mmap(fd, num_bytes), dtype=np.uint8)
