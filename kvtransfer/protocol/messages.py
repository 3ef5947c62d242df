"""The messages of the control channel of a (sender, receiver) pair; proto/baton/v1/transfer.proto defines their
meaning."""

from __future__ import annotations

from dataclasses import dataclass

from baton.types import Failure, TokenChunk


@dataclass(frozen=True, slots=True)
class Begin:
    sequence_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Begun:
    sequence_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class WrittenRange:
    """Positions [first_block, first_block + num_blocks) of the lease in one layer."""

    layer: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Commit:
    sequence_id: str
    epoch: int
    attempt: int
    num_blocks: int
    # Empty if the pair agreed on no digest, else one per layer.
    layer_digests: tuple[bytes, ...]
    first_token: TokenChunk
    # Put on the data connection in this attempt; 0 if the sender writes into the receiver's memory by itself.
    num_sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ack:
    sequence_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Nack:
    sequence_id: str
    epoch: int
    # The commit this answers, 0 if it answers Begin.
    attempt: int
    failure: Failure
    # Empty: final.
    retransmit_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Abort:
    sequence_id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Revoke:
    sequence_id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Revoked:
    sequence_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    pass


SenderMessage = Begin | Commit | Abort | Revoked | Heartbeat
ReceiverMessage = Begun | Ack | Nack | Revoke | Heartbeat
