"""What the receiving machine is told, and what it asks for. ``LeaseNotice`` is what the owner of the pool hears."""

from __future__ import annotations

from dataclasses import dataclass

from baton.machine import Tick
from baton.types import Failure, TokenChunk
from kvtransfer.protocol.messages import Commit, ReceiverMessage, SenderMessage, WrittenRange

# -- events


@dataclass(frozen=True, slots=True)
class Granted:
    """The owner of the pool leases blocks. ``epoch`` is new in this incarnation."""

    sequence_id: str
    epoch: int
    block_ids: tuple[int, ...]
    ttl_s: float
    # A commit of fewer blocks is refused.
    min_blocks: int = 1


@dataclass(frozen=True, slots=True)
class RevokeAsked:
    sequence_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ChannelOpened:
    channel: int
    peer: str
    # The peer writes into our memory by itself.
    is_one_sided: bool


@dataclass(frozen=True, slots=True)
class ChannelLost:
    channel: int
    reason: str


@dataclass(frozen=True, slots=True)
class WriterGone:
    """Nothing that was opened for this channel can write any more."""

    channel: int


@dataclass(frozen=True, slots=True)
class Received:
    channel: int
    message: SenderMessage


@dataclass(frozen=True, slots=True)
class Malformed:
    """The peer said something about a lease that cannot be read."""

    channel: int
    sequence_id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Wrote:
    """A hint of a one-sided writer, which may be lost: these blocks hold what the attempt's commit will cover."""

    channel: int
    epoch: int
    attempt: int
    ranges: tuple[WrittenRange, ...]


@dataclass(frozen=True, slots=True)
class DataCame:
    """Data of a two-sided peer for an epoch that is not open: it may have overtaken its Begin."""

    channel: int
    epoch: int


@dataclass(frozen=True, slots=True)
class EpochQuiet:
    """After CloseEpoch: no write of this process into the epoch's blocks is under way, and none will follow."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Verified:
    epoch: int
    attempt: int
    damaged_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VerifyFailed:
    epoch: int
    attempt: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class TakenOver:
    """The owner of the pool has accepted the sequence: the blocks are its own now."""

    epoch: int


@dataclass(frozen=True, slots=True)
class TakeOverRefused:
    epoch: int
    failure: Failure


ReceiverEvent = (
    Granted
    | RevokeAsked
    | ChannelOpened
    | ChannelLost
    | WriterGone
    | Received
    | Malformed
    | Wrote
    | DataCame
    | EpochQuiet
    | Verified
    | VerifyFailed
    | TakenOver
    | TakeOverRefused
    | Tick
)


# -- actions


@dataclass(frozen=True, slots=True)
class Send:
    channel: int
    message: ReceiverMessage


@dataclass(frozen=True, slots=True)
class OpenEpoch:
    """From now on data for this epoch may be written into these blocks, if it comes from this channel."""

    channel: int
    epoch: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CloseEpoch:
    """Refuse data beyond the first ``after_bytes`` since OpenEpoch; answer EpochQuiet once those are written and no
    other is being written. A second CloseEpoch replaces the first."""

    channel: int
    epoch: int
    after_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Digest:
    """Start hashing these blocks, they hold their final bytes."""

    epoch: int
    ranges: tuple[WrittenRange, ...]


@dataclass(frozen=True, slots=True)
class Verify:
    """Compare the blocks with the commit's digests; answer Verified or VerifyFailed."""

    epoch: int
    commit: Commit


@dataclass(frozen=True, slots=True)
class ForgetDigests:
    """These layers are written again; all layers if None, and the epoch is over."""

    epoch: int
    layers: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class WriterBegan:
    """The writer of a lease has begun: what it computes is on its way. Once for a lease at most."""

    sequence_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """The sequence's KV is here and verified; the owner of the pool takes its blocks over, or raises.

    Answer TakenOver, or TakeOverRefused: the sender is then told so and Released follows.
    """

    sequence_id: str
    epoch: int
    first_token: TokenChunk


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The lease is over, but a writer may still reach its blocks: keep them until Released."""

    sequence_id: str
    epoch: int
    reason: str
    # By its writer, who tells the router itself why.
    is_given_back: bool = False


@dataclass(frozen=True, slots=True)
class Released:
    """The lease is over without arrival and no writer can reach its blocks any more."""

    sequence_id: str
    epoch: int
    reason: str
    # By its writer, who tells the router itself why.
    is_given_back: bool = False


# What the owner of the pool hears of its leases, from the machine to the owner's own.
LeaseNotice = WriterBegan | Arrived | Quarantined | Released


@dataclass(frozen=True, slots=True)
class DropChannel:
    channel: int
    reason: str


ReceiverAction = Send | OpenEpoch | CloseEpoch | Digest | Verify | ForgetDigests | LeaseNotice | DropChannel
