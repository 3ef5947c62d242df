"""What the sending machine is told, and what it asks for."""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import BatonError
from baton.machine import Tick
from baton.types import TokenChunk
from kvtransfer.protocol.messages import ReceiverMessage, SenderMessage

# -- events


@dataclass(frozen=True, slots=True)
class PushBegun:
    """A push was asked for. ``push`` is a number that its owner never uses twice."""

    push: int
    sequence_id: str
    epoch: int
    incarnation: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class CommitAsked:
    push: int
    first_token: TokenChunk


@dataclass(frozen=True, slots=True)
class AbortAsked:
    push: int
    reason: str


@dataclass(frozen=True, slots=True)
class Connected:
    channel: int
    node_id: str
    incarnation: int
    # This process writes into the receiver's memory by itself.
    is_one_sided: bool


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    error: BatonError


@dataclass(frozen=True, slots=True)
class ChannelLost:
    channel: int
    reason: str


@dataclass(frozen=True, slots=True)
class Received:
    channel: int
    message: ReceiverMessage


@dataclass(frozen=True, slots=True)
class Drained:
    """Every byte of the attempt is where it belongs, or on its way there, and the source is not being read."""

    push: int
    attempt: int
    num_blocks: int
    layer_digests: tuple[bytes, ...]
    # On its way there: of this attempt, by a two-sided data connection.
    num_sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WriteFailed:
    push: int
    error: BatonError


@dataclass(frozen=True, slots=True)
class Stopped:
    """After StopWriting: no write is under way and none will follow."""

    push: int


SenderEvent = (
    PushBegun
    | CommitAsked
    | AbortAsked
    | Connected
    | ConnectFailed
    | ChannelLost
    | Received
    | Drained
    | WriteFailed
    | Stopped
    | Tick
)


# -- actions


@dataclass(frozen=True, slots=True)
class Connect:
    """Answer Connected or ConnectFailed."""


@dataclass(frozen=True, slots=True)
class Send:
    channel: int
    message: SenderMessage


@dataclass(frozen=True, slots=True)
class StartWriting:
    push: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Write what is left (the given layers once more, if any), answer Drained."""

    push: int
    attempt: int
    rewrite_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StopWriting:
    """Begin no further write; answer Stopped when none is under way."""

    push: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The push is over; without an error the receiver has taken the sequence over."""

    push: int
    error: BatonError | None


@dataclass(frozen=True, slots=True)
class DropChannel:
    """Close channel and data connection; answer ChannelLost."""

    channel: int
    reason: str


SenderAction = Connect | Send | StartWriting | Drain | StopWriting | Finish | DropChannel
