"""The interface of transfers to a device whose memory the processor cannot address. Addresses are opaque integers.

All code above it is tested on ``FakeDevice``; only ``cuda.py`` calls a driver.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kvtransfer.hashing import ByteArray

HANDLE_BYTES = 64


class Event(Protocol):
    """A point in a stream."""

    def wait(self) -> None:
        """Block this thread, without the GIL, until the stream has come here. Raises InternalError if it failed."""


class Stream(Protocol):
    """Work done in order, beside the processor. Used by one thread at a time."""

    def wait_for(self, event: Event) -> None:
        """What is queued from now on begins after the event; does not block the caller."""

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Queue a copy between any two of: own memory, opened peer memory, pinned memory."""

    def record(self) -> Event: ...

    def close(self) -> None:
        """Nothing is queued any more."""


class Pinned(NamedTuple):
    """Processor memory that the device copies from and to by itself."""

    array: ByteArray
    address: int


class Device(Protocol):
    @property
    def memory_id(self) -> str:
        """Names this device's memory; equal ids in two processes mean that one may open the other's handles."""

    @property
    def reachable_ids(self) -> tuple[str, ...]:
        """The memories that streams of this device can write to, its own included."""

    def allocate(self, num_bytes: int) -> int:
        """Raises BadConfig if there is not so much."""

    def free(self, address: int) -> None: ...

    def pin(self, num_bytes: int) -> Pinned: ...

    def unpin(self, pinned: Pinned) -> None: ...

    def stream(self) -> Stream: ...

    def fence(self) -> Event:
        """After everything that the calling thread has had computed so far. Does not block."""

    def export(self, address: int) -> bytes:
        """A handle of ``HANDLE_BYTES`` that another process may ``open``. Raises TransferFailed if there is none."""

    def open(self, handle: bytes, num_bytes: int) -> int:
        """Where the peer's allocation appears here. Raises TransferFailed."""

    def close(self, address: int) -> None:
        """Let go of what ``open`` gave; nothing may be queued that touches it."""
