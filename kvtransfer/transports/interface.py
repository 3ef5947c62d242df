"""What a transport is: the ways in which the bytes of one cache get into another. Knows no protocol message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from baton.access import OPEN, AccessConfig
from baton.types import KvLayout, NodeDescription
from kvtransfer.protocol.messages import WrittenRange

if TYPE_CHECKING:  # Settings, which know transports by name, load no numpy.
    from kvtransfer.memory import Memory
    from kvtransfer.writing import Lanes, Wire


@dataclass(frozen=True, slots=True)
class Dial:
    """What a sender has in hand to open a wire: the receiver's answer, its own memory and its threads."""

    endpoint: str
    token: bytes
    num_target_bytes: int
    memory: Memory
    # Shared by all wires of a sender that copy by themselves, with so many threads.
    lanes: Lanes | None
    num_lanes: int
    num_streams: int
    on_lost: Callable[[str], None]
    # Bytes that leave the host are encrypted as it says.
    access: AccessConfig = OPEN


@dataclass(frozen=True, slots=True)
class PlaneEvents:
    """What a receiving end tells its owner. On the event loop, except ``landed``."""

    # channel: nothing that was opened for it can write any more.
    writer_gone: Callable[[int], None]
    # channel, epoch, attempt, ranges: a one-sided writer's hint, not checked.
    wrote: Callable[[int, int, int, Sequence[WrittenRange]], None]
    # epoch: closed, and nothing is being written into it.
    quiet: Callable[[int], None]
    # channel, epoch: data came for an epoch that is not open; it is taken if it is open when this returns.
    data_came: Callable[[int, int], None]
    # channel, epoch: data reached outside of its lease.
    strayed: Callable[[int, int], None]
    # epoch, layer, first, num_blocks: these are in the cache. In the thread that wrote them; None: of no interest.
    landed: Callable[[int, int, int, int], None] | None


@dataclass(frozen=True, slots=True)
class PlaneSite:
    """Where a receiving end works."""

    memory: Memory
    layout: KvLayout
    advertised_host: str
    # Empty: the advertised one.
    listen_host: str
    events: PlaneEvents
    access: AccessConfig = OPEN


class DataPlane(Protocol):
    """The receiving end of one transport. All methods on the event loop."""

    @property
    def endpoint(self) -> str:
        """Where senders connect. After ``start``."""

    async def start(self) -> None: ...

    def offer(self, channel: int, token: bytes) -> None:
        """Let in who presents this token."""

    def open_epoch(self, channel: int, epoch: int, block_ids: Sequence[int]) -> None: ...

    def close_epoch(self, channel: int, epoch: int, after_bytes: int) -> bool:
        """Take no data beyond the first ``after_bytes`` since the epoch was opened. True if those are written and
        nothing is being written into the epoch's blocks; else ``quiet`` is told later."""

    def drop(self, channel: int) -> None:
        """Leads to one ``writer_gone(channel)``."""

    async def close(self) -> None: ...


class Transport(Protocol):
    """Both ends of one way to move bytes. Adding one: a file with such an object, and its line in ``table.py``."""

    @property
    def name(self) -> str: ...

    @property
    def is_one_sided(self) -> bool:
        """The sender writes into the receiver's memory by itself; else a thread of the receiver does."""

    @property
    def layerwise_from_bytes(self) -> int:
        """Transfers of at least so many bytes go layer by layer, smaller ones in one go at commit."""

    def takes(self, *, on_device: bool) -> bool:
        """Whether a cache in a device's memory, or in the processor's, can be an end of it."""

    def reaches(self, mine: NodeDescription, theirs: NodeDescription, *, can_reach_memory: bool) -> bool:
        """Whether the sender ``theirs`` gets to the receiver ``mine``; ``can_reach_memory``: its device writes to the
        memory of mine."""

    async def connect(self, dial: Dial) -> Wire:
        """Raises TransferFailed."""

    def plane(self, site: PlaneSite) -> DataPlane: ...
