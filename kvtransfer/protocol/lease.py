"""One lease and the channel that it is bound to, as the receiving machine keeps them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.errors import TransferFailed
from baton.types import Failure
from kvtransfer.protocol.liveness import Heart
from kvtransfer.protocol.messages import Commit, Nack, ReceiverMessage, Revoke
from kvtransfer.protocol.receiver_events import CloseEpoch, OpenEpoch, Quarantined, ReceiverAction, Released, Send


class LeaseState(Enum):
    GRANTED = "granted"
    WRITING = "writing"
    FILLING = "filling"
    VERIFYING = "verifying"
    ARRIVING = "arriving"
    ENDING = "ending"


# What the peer has to bring about, before the lease's deadline.
_WAITS_FOR_PEER = frozenset({LeaseState.GRANTED, LeaseState.WRITING, LeaseState.FILLING})


@dataclass(slots=True)
class PeerChannel:
    number: int
    peer: str
    # The peer writes into our memory by itself.
    is_one_sided: bool
    heart: Heart
    is_lost: bool = False
    is_writer_gone: bool = False
    # Leases that are bound to it and not over.
    epochs: set[int] = field(default_factory=set)


@dataclass(slots=True)
class HeldLease:
    sequence_id: str
    epoch: int
    block_ids: tuple[int, ...]
    min_blocks: int
    deadline_s: float
    state: LeaseState = LeaseState.GRANTED
    channel: PeerChannel | None = None
    # The commit that is expected next, or being verified.
    attempt: int = 1
    commit: Commit | None = None
    # The peer does not write now and will not unless we ask it to.
    is_writer_quiet: bool = True
    # No write of this process into the blocks is under way.
    is_epoch_quiet: bool = True
    # Why it is over, and whether its writer said so.
    reason: str = ""
    is_given_back: bool = False
    # When a write that has not ended costs the peer its channel.
    stop_deadline_s: float | None = None

    @property
    def is_quiet(self) -> bool:
        """No writer can reach the blocks."""
        return self.is_writer_quiet and self.is_epoch_quiet

    @property
    def waits_for_peer(self) -> bool:
        return self.state in _WAITS_FOR_PEER

    @property
    def wake_at_s(self) -> float | None:
        return self.deadline_s if self.waits_for_peer else self.stop_deadline_s

    def bind(self, channel: PeerChannel) -> ReceiverAction:
        self.state, self.channel = LeaseState.WRITING, channel
        channel.epochs.add(self.epoch)
        return self.open()

    def open(self) -> ReceiverAction:
        assert self.channel is not None
        self.is_epoch_quiet = False
        # A two-sided peer never writes: what reaches our memory is what this process puts there.
        self.is_writer_quiet = not self.channel.is_one_sided
        return OpenEpoch(self.channel.number, self.epoch, self.block_ids)

    def close(self, *, after_bytes: int = 0) -> ReceiverAction:
        assert self.channel is not None
        return CloseEpoch(self.channel.number, self.epoch, after_bytes)

    def send(self, message: ReceiverMessage) -> list[ReceiverAction]:
        if self.channel is None or self.channel.is_lost:
            return []
        return [Send(self.channel.number, message)]

    def nack(self, failure: Failure, retransmit_layers: tuple[int, ...] = ()) -> list[ReceiverAction]:
        return self.send(Nack(self.sequence_id, self.epoch, self.attempt, failure, retransmit_layers))

    def end(self, reason: str, stop_deadline_s: float, *, tell: bool) -> list[ReceiverAction]:
        """Stop its writers; it is over once ``is_quiet``. ``tell``: the peer does not know."""
        assert self.state not in (LeaseState.ARRIVING, LeaseState.ENDING), "it is over already, or never will be"
        actions: list[ReceiverAction] = []
        was = self.state
        self.state, self.reason = LeaseState.ENDING, reason
        if was is LeaseState.WRITING and tell:
            actions += self.send(Revoke(self.sequence_id, self.epoch, reason))
        elif was in (LeaseState.FILLING, LeaseState.VERIFYING) and tell:
            error = TransferFailed(f"lease of {self.sequence_id} is over: {reason}")
            actions += self.nack(Failure.of(error))
        if was in (LeaseState.WRITING, LeaseState.FILLING):
            actions.append(self.close())
        if not self.is_quiet:
            # Whatever the peer has said: half a frame of its may be all that ever comes.
            if self.channel is not None and not self.channel.is_lost:
                self.stop_deadline_s = stop_deadline_s
            actions.append(Quarantined(self.sequence_id, self.epoch, reason, self.is_given_back))
        return actions

    def released(self) -> Released:
        return Released(self.sequence_id, self.epoch, self.reason, self.is_given_back)

    def forgive(self, late_s: float, until_s: float) -> None:
        """Move deadlines by the time in which this process was stalled, at least to ``until_s``."""
        self.deadline_s = max(self.deadline_s + late_s, until_s)
        if self.stop_deadline_s is not None:
            self.stop_deadline_s = max(self.stop_deadline_s + late_s, until_s)

    def check(self) -> None:
        """Internal invariants."""
        if self.state is LeaseState.GRANTED:
            assert (self.channel, self.is_writer_quiet) == (None, True)
        else:
            assert self.channel is not None
            assert self.epoch in self.channel.epochs
        if self.state in (LeaseState.FILLING, LeaseState.VERIFYING, LeaseState.ARRIVING):
            assert self.is_writer_quiet
            assert self.commit is not None
            assert self.is_epoch_quiet == (self.state is not LeaseState.FILLING)
        if self.state is LeaseState.ENDING:
            assert not self.is_quiet, "a settled lease must be released"
