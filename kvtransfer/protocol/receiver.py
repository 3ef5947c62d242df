"""The receiving side of every transfer of a node: leases, their writers and their ends. Pure.

A lease ends in exactly one of two ways: its sequence *arrived*, or the lease was *released*. It is released only when
no writer can reach its blocks any more, which is known when all of these hold:

- nothing of ours is writing into them (``EpochQuiet``; a transport that writes in this process, like tcp), and
- the peer, if it writes by itself (one-sided, like shm), has said that it stopped (Commit, Abort, Revoked) or is gone
  (``WriterGone``). A time-out alone never frees such blocks.

A two-sided peer sends Begin, data and Commit without waiting for an answer. Its data may overtake Begin
(``DataCame`` then binds the lease) and may be overtaken by Commit (the lease is then filling until all of it is here).

    granted --Begin--> writing --Commit--> filling --quiet--> verifying --digest ok--> arriving --> ARRIVED
       |                 |  ^                 |                |    |                     |
       |                 |  '-----------------+-- Nack, layers ----'                      |
       '---- expiry, revoke, abort, loss, bad digest ---------'--> ending --quiet--> RELEASED
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from baton.clock import catch_up_s
from baton.errors import BatonError, InvalidRequest, TransferFailed
from baton.types import Failure, TokenChunk
from kvtransfer.protocol.liveness import Heart, Pulse
from kvtransfer.protocol.messages import (
    Abort,
    Ack,
    Begin,
    Begun,
    Commit,
    Heartbeat,
    Nack,
    ReceiverMessage,
    Revoke,
    Revoked,
    SenderMessage,
    WrittenRange,
)

# Arrived leases remembered so that a duplicate Commit is acknowledged again instead of refused.
_MAX_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class ReceiverConfig:
    # Commits of one transfer that may fail their digest before the failure is final.
    max_attempts: int = 3
    # How long a writer may take to answer Revoke, and what it has under way to end, before its channel is dropped.
    revoke_timeout_s: float = 2.0
    heartbeat_s: float = 1.0
    max_missed_heartbeats: int = 5


# --- events -----------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Tick:
    """``late_s`` after it was due: for so long this process may have read nothing."""

    late_s: float = 0.0


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


# --- actions ----------------------------------------------------------------------------------------------------------


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
LeaseNotice = Arrived | Quarantined | Released


@dataclass(frozen=True, slots=True)
class DropChannel:
    channel: int
    reason: str


ReceiverAction = Send | OpenEpoch | CloseEpoch | Digest | Verify | ForgetDigests | LeaseNotice | DropChannel


# --- machine ----------------------------------------------------------------------------------------------------------


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
class _Lease:
    sequence_id: str
    epoch: int
    block_ids: tuple[int, ...]
    min_blocks: int
    deadline_s: float
    state: LeaseState = LeaseState.GRANTED
    channel: int | None = None
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


@dataclass(slots=True)
class _Channel:
    peer: str
    is_one_sided: bool
    heart: Heart
    is_lost: bool = False
    is_writer_gone: bool = False
    epochs: set[int] = field(default_factory=set)


class LeaseMachine:
    """``handle(event, now) -> actions``; ``next_deadline_s`` says when Tick is due."""

    def __init__(self, config: ReceiverConfig) -> None:
        self._config = config
        self._leases: dict[int, _Lease] = {}
        self._epoch_of: dict[str, int] = {}
        self._channels: dict[int, _Channel] = {}
        # Epochs of leases that arrived, with the channel they came through, oldest first.
        self._arrived: OrderedDict[int, int | None] = OrderedDict()

    # Read-only views for drivers, ledgers and tests.

    def state(self, sequence_id: str) -> LeaseState | None:
        epoch = self._epoch_of.get(sequence_id)
        return None if epoch is None else self._leases[epoch].state

    @property
    def sequence_ids(self) -> tuple[str, ...]:
        return tuple(self._epoch_of)

    def sequence_of(self, epoch: int) -> str | None:
        """Whose lease this is, if it is live."""
        lease = self._leases.get(epoch)
        return None if lease is None else lease.sequence_id

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_channels(self) -> int:
        return len(self._channels)

    @property
    def next_deadline_s(self) -> float | None:
        deadlines = [c.heart.due_s for c in self._channels.values() if not c.is_lost]
        for lease in self._leases.values():
            if lease.state in _WAITS_FOR_PEER:
                deadlines.append(lease.deadline_s)
            elif lease.stop_deadline_s is not None:
                deadlines.append(lease.stop_deadline_s)
        return min(deadlines, default=None)

    def handle(self, event: ReceiverEvent, now: float) -> list[ReceiverAction]:  # noqa: C901 - one case per event
        match event:
            case Received():
                return self._received(event.channel, event.message, now)
            case Wrote():
                return self._wrote(event)
            case Malformed():
                return self._malformed(event, now)
            case DataCame():
                return self._data_came(event)
            case Granted():
                return self._granted(event, now)
            case RevokeAsked():
                epoch = self._epoch_of.get(event.sequence_id)
                return [] if epoch is None else self._end(self._leases[epoch], event.reason, now)
            case ChannelOpened():
                heart = Heart(self._config.heartbeat_s, self._config.max_missed_heartbeats, now)
                self._channels[event.channel] = _Channel(event.peer, event.is_one_sided, heart)
                return []
            case ChannelLost():
                return self._channel_lost(event, now)
            case WriterGone():
                return self._writer_gone(event.channel, now)
            case EpochQuiet():
                return self._epoch_quiet(event.epoch)
            case Verified():
                return self._verified(event, now)
            case VerifyFailed():
                return self._verify_failed(event, now)
            case TakenOver():
                return self._taken_over(event.epoch)
            case TakeOverRefused():
                return self._take_over_refused(event, now)
            case Tick():
                self._forgive(event.late_s, now)
                return self._tick(now)

    def check(self) -> None:
        """Internal invariants; called by tests after every event."""
        assert len(self._epoch_of) == len(self._leases)
        for epoch, lease in self._leases.items():
            assert lease.epoch == epoch == self._epoch_of[lease.sequence_id]
            if lease.state is LeaseState.GRANTED:
                assert (lease.channel, lease.is_writer_quiet) == (None, True)
            else:
                assert lease.channel is not None
            if lease.state in (LeaseState.FILLING, LeaseState.VERIFYING, LeaseState.ARRIVING):
                assert lease.is_writer_quiet
                assert lease.commit is not None
                assert lease.is_epoch_quiet == (lease.state is not LeaseState.FILLING)
            if lease.state is LeaseState.ENDING:
                assert not (lease.is_writer_quiet and lease.is_epoch_quiet), "a settled lease must be released"
            if lease.channel in self._channels:
                assert epoch in self._channels[lease.channel].epochs

    # Grants and ends.

    def _granted(self, event: Granted, now: float) -> list[ReceiverAction]:
        if event.sequence_id in self._epoch_of:
            raise InvalidRequest(f"{event.sequence_id} has a lease already; a new attempt needs a new sequence id")
        assert event.epoch not in self._leases, "epochs are given once"
        self._leases[event.epoch] = _Lease(
            event.sequence_id, event.epoch, event.block_ids, event.min_blocks, now + event.ttl_s
        )
        self._epoch_of[event.sequence_id] = event.epoch
        return []

    def _end(self, lease: _Lease, reason: str, now: float, *, tell: bool = True) -> list[ReceiverAction]:
        """Stop a lease that has not arrived; releases it at once if no writer is left, else quarantines it."""
        if lease.state in (LeaseState.ENDING, LeaseState.ARRIVING):
            # Ending already, or its owner is taking it over in this very moment and will cancel the sequence itself.
            return []
        actions: list[ReceiverAction] = []
        was = lease.state
        lease.state, lease.reason = LeaseState.ENDING, reason
        if was is LeaseState.WRITING and tell:
            actions += self._send(lease, Revoke(lease.sequence_id, lease.epoch, reason))
        elif was in (LeaseState.FILLING, LeaseState.VERIFYING) and tell:
            actions += self._nack(lease, TransferFailed(f"lease of {lease.sequence_id} is over: {reason}"))
        if was in (LeaseState.WRITING, LeaseState.FILLING):
            actions.append(self._close_epoch(lease))
        if not (lease.is_writer_quiet and lease.is_epoch_quiet):
            # Whatever the peer has said: half a frame of its may be all that ever comes.
            if self._is_live(lease.channel):
                lease.stop_deadline_s = now + self._config.revoke_timeout_s
            actions.append(Quarantined(lease.sequence_id, lease.epoch, reason, lease.is_given_back))
        return actions + self._settle(lease)

    def _settle(self, lease: _Lease) -> list[ReceiverAction]:
        if lease.state is not LeaseState.ENDING or not (lease.is_writer_quiet and lease.is_epoch_quiet):
            return []
        self._forget(lease)
        over = Released(lease.sequence_id, lease.epoch, lease.reason, lease.is_given_back)
        return [ForgetDigests(lease.epoch, None), over]

    def _forget(self, lease: _Lease) -> None:
        del self._leases[lease.epoch]
        del self._epoch_of[lease.sequence_id]
        if lease.channel in self._channels:
            self._channels[lease.channel].epochs.discard(lease.epoch)

    def _open_epoch(self, lease: _Lease) -> ReceiverAction:
        assert lease.channel is not None
        lease.is_epoch_quiet = False
        # A two-sided peer never writes: what reaches our memory is what this process puts there.
        lease.is_writer_quiet = not self._channels[lease.channel].is_one_sided
        return OpenEpoch(lease.channel, lease.epoch, lease.block_ids)

    def _close_epoch(self, lease: _Lease, *, after_bytes: int = 0) -> ReceiverAction:
        assert lease.channel is not None
        return CloseEpoch(lease.channel, lease.epoch, after_bytes)

    def _is_live(self, channel_id: int | None) -> bool:
        channel = None if channel_id is None else self._channels.get(channel_id)
        return channel is not None and not channel.is_lost

    def _send(self, lease: _Lease, message: ReceiverMessage) -> list[ReceiverAction]:
        if not self._is_live(lease.channel):
            return []
        assert lease.channel is not None
        return [Send(lease.channel, message)]

    def _nack(self, lease: _Lease, error: BatonError) -> list[ReceiverAction]:
        failure = Failure.of(error)
        return self._send(lease, Nack(lease.sequence_id, lease.epoch, lease.attempt, failure))

    # Channels.

    def _channel_lost(self, event: ChannelLost, now: float) -> list[ReceiverAction]:
        channel = self._channels.get(event.channel)
        if channel is None or channel.is_lost:
            return []
        channel.is_lost = True
        actions: list[ReceiverAction] = []
        for epoch in sorted(channel.epochs):
            lease = self._leases[epoch]
            # What is being verified is complete and its writer is quiet: it may still arrive.
            if lease.state is LeaseState.WRITING:
                actions += self._end(lease, f"channel to {channel.peer} lost: {event.reason}", now, tell=False)
            lease.stop_deadline_s = None
        if channel.is_writer_gone:
            del self._channels[event.channel]
        return actions

    def _writer_gone(self, channel_id: int, now: float) -> list[ReceiverAction]:
        channel = self._channels.get(channel_id)
        if channel is None:
            return []
        channel.is_writer_gone = True
        actions: list[ReceiverAction] = []
        for epoch in sorted(channel.epochs):
            lease = self._leases[epoch]
            lease.is_writer_quiet = True
            # What a one-sided writer has committed is here; of a two-sided one, the rest went with its connection.
            is_unfinished = lease.state is LeaseState.FILLING and not channel.is_one_sided
            if lease.state is LeaseState.WRITING or is_unfinished:
                actions += self._end(lease, f"writer {channel.peer} is gone", now)
            else:
                actions += self._settle(lease)
        if channel.is_lost:
            del self._channels[channel_id]
        return actions

    def _wrote(self, event: Wrote) -> list[ReceiverAction]:
        lease = self._leases.get(event.epoch)
        if lease is None or lease.channel != event.channel:
            return []
        is_current = lease.state is LeaseState.WRITING and event.attempt == lease.attempt
        return [Digest(lease.epoch, event.ranges)] if is_current else []

    def _malformed(self, event: Malformed, now: float) -> list[ReceiverAction]:
        """It costs the lease, if it is the peer's own; that its writer has stopped is known only when it says so."""
        channel = self._channels.get(event.channel)
        if channel is None or channel.is_lost:
            return []
        channel.heart.heard()
        lease = self._leases.get(event.epoch)
        if lease is None or lease.channel != event.channel or lease.sequence_id != event.sequence_id:
            return []
        return self._end(lease, f"{channel.peer}: {event.reason}", now)

    def _epoch_quiet(self, epoch: int) -> list[ReceiverAction]:
        lease = self._leases.get(epoch)
        if lease is None or lease.is_epoch_quiet or lease.state is LeaseState.WRITING:
            return []
        lease.is_epoch_quiet = True
        if lease.state is LeaseState.FILLING:
            assert lease.commit is not None
            lease.state = LeaseState.VERIFYING
            return [Verify(epoch, lease.commit)]
        return self._settle(lease)

    # Messages of the peer.

    def _received(self, channel_id: int, message: SenderMessage, now: float) -> list[ReceiverAction]:
        channel = self._channels.get(channel_id)
        if channel is None or channel.is_lost:
            return []
        channel.heart.heard()
        if isinstance(message, Heartbeat):
            return []
        lease = self._leases.get(message.epoch)
        if lease is not None and lease.sequence_id != message.sequence_id:
            lease = None
        if isinstance(message, Begin):
            return self._begin(channel_id, message, lease)
        if isinstance(message, Abort) and lease is not None and lease.state is LeaseState.GRANTED:
            # Given back by who was to write, before it began.
            lease.is_given_back = True
            return self._end(lease, f"aborted by {channel.peer}: {message.reason}", now)
        if lease is None or lease.channel != channel_id:
            return self._unknown(channel_id, message)
        return self._said(lease, message, channel.peer, now)

    def _said(self, lease: _Lease, message: Commit | Abort | Revoked, peer: str, now: float) -> list[ReceiverAction]:
        """The lease's own writer speaks."""
        match message:
            case Commit():
                return self._commit(lease, message, now)
            case Abort():
                lease.is_given_back = lease.state is not LeaseState.ENDING
                return self._stopped(lease, f"aborted by {peer}: {message.reason}", now)
            case Revoked():
                return self._stopped(lease, lease.reason or f"given back by {peer}", now)

    def _begin(self, channel_id: int, message: Begin, lease: _Lease | None) -> list[ReceiverAction]:
        if lease is not None and lease.channel == channel_id:
            return []  # A duplicate, or its data came first. Begun is said once: it can never start a second writer.
        if self._channels[channel_id].is_writer_gone:
            return []  # Its connection is broken, the channel will follow.
        if lease is None or lease.state is not LeaseState.GRANTED:
            what = "is not live here" if lease is None else "belongs to another channel"
            error = TransferFailed(f"lease {message.epoch} of {message.sequence_id} {what}; reserve again")
            failure = Failure.of(error)
            return [Send(channel_id, Nack(message.sequence_id, message.epoch, 0, failure))]
        opened = self._bind(lease, channel_id)
        if not self._channels[channel_id].is_one_sided:
            return [opened]  # Its sender does not wait: this process is the fence.
        return [opened, Send(channel_id, Begun(lease.sequence_id, lease.epoch))]

    def _bind(self, lease: _Lease, channel_id: int) -> ReceiverAction:
        lease.state, lease.channel = LeaseState.WRITING, channel_id
        self._channels[channel_id].epochs.add(lease.epoch)
        return self._open_epoch(lease)

    def _data_came(self, event: DataCame) -> list[ReceiverAction]:
        lease, channel = self._leases.get(event.epoch), self._channels.get(event.channel)
        if lease is None or lease.state is not LeaseState.GRANTED:
            return []
        if channel is None or channel.is_lost or channel.is_writer_gone or channel.is_one_sided:
            return []
        return [self._bind(lease, event.channel)]

    def _unknown(self, channel_id: int, message: SenderMessage) -> list[ReceiverAction]:
        """A message for a lease that is over, or not this peer's. Only a Commit waits for an answer."""
        if not isinstance(message, Commit):
            return []
        if self._arrived.get(message.epoch) == channel_id:
            return [Send(channel_id, Ack(message.sequence_id, message.epoch))]
        error = TransferFailed(f"lease {message.epoch} of {message.sequence_id} is over")
        failure = Failure.of(error)
        return [Send(channel_id, Nack(message.sequence_id, message.epoch, message.attempt, failure))]

    def _commit(self, lease: _Lease, commit: Commit, now: float) -> list[ReceiverAction]:
        if commit.attempt != lease.attempt or lease.state not in (LeaseState.WRITING, LeaseState.ENDING):
            return []  # Late or duplicate.
        lease.is_writer_quiet = True
        if lease.state is LeaseState.ENDING:
            # Crossed with Revoke, which the sender takes for the answer.
            return self._settle(lease)
        if not lease.min_blocks <= commit.num_blocks <= len(lease.block_ids):
            error = InvalidRequest(
                f"{commit.num_blocks} blocks committed, expected {lease.min_blocks} to {len(lease.block_ids)}"
            )
            return self._nack(lease, error) + self._end(lease, error.message, now, tell=False)
        lease.state, lease.commit = LeaseState.FILLING, commit
        return [self._close_epoch(lease, after_bytes=commit.num_sent_bytes)]

    def _stopped(self, lease: _Lease, reason: str, now: float) -> list[ReceiverAction]:
        """The peer has stopped writing and will not write again."""
        lease.is_writer_quiet = True
        if lease.state is LeaseState.ENDING:
            return self._settle(lease)
        return self._end(lease, reason, now, tell=False)

    # Outcomes of verification and take-over.

    def _verified(self, event: Verified, now: float) -> list[ReceiverAction]:
        lease = self._leases.get(event.epoch)
        if lease is None or lease.state is not LeaseState.VERIFYING or event.attempt != lease.attempt:
            return []
        assert lease.commit is not None
        assert lease.channel is not None
        if not event.damaged_layers:
            lease.state = LeaseState.ARRIVING
            return [Arrived(lease.sequence_id, lease.epoch, lease.commit.first_token)]
        what = f"digest of layers {list(event.damaged_layers)} differs in attempt {lease.attempt}"
        channel = self._channels.get(lease.channel)
        can_repeat = lease.attempt < self._config.max_attempts and now < lease.deadline_s
        if channel is None or channel.is_lost or channel.is_writer_gone or not can_repeat:
            error = TransferFailed(f"{lease.sequence_id}: {what}, giving up")
            return [*self._nack(lease, error), *self._end(lease, what, now, tell=False)]
        failure = Failure.of(TransferFailed(what))
        nack = Nack(lease.sequence_id, lease.epoch, lease.attempt, failure, event.damaged_layers)
        lease.attempt += 1
        lease.state, lease.commit = LeaseState.WRITING, None
        forget = ForgetDigests(lease.epoch, event.damaged_layers)
        return [forget, self._open_epoch(lease), Send(lease.channel, nack)]

    def _verify_failed(self, event: VerifyFailed, now: float) -> list[ReceiverAction]:
        lease = self._leases.get(event.epoch)
        if lease is None or lease.state is not LeaseState.VERIFYING or event.attempt != lease.attempt:
            return []
        nack = Nack(lease.sequence_id, lease.epoch, lease.attempt, event.failure)
        return self._send(lease, nack) + self._end(lease, event.failure.message, now, tell=False)

    def _taken_over(self, epoch: int) -> list[ReceiverAction]:
        lease = self._leases.get(epoch)
        if lease is None or lease.state is not LeaseState.ARRIVING:
            return []
        actions = self._send(lease, Ack(lease.sequence_id, epoch))
        self._forget(lease)
        self._arrived[epoch] = lease.channel
        if len(self._arrived) > _MAX_REMEMBERED:
            self._arrived.popitem(last=False)
        return [ForgetDigests(epoch, None), *actions]

    def _take_over_refused(self, event: TakeOverRefused, now: float) -> list[ReceiverAction]:
        lease = self._leases.get(event.epoch)
        if lease is None or lease.state is not LeaseState.ARRIVING:
            return []
        nack = Nack(lease.sequence_id, lease.epoch, lease.attempt, event.failure)
        lease.state = LeaseState.VERIFYING
        return self._send(lease, nack) + self._end(lease, event.failure.message, now, tell=False)

    # Time.

    def _forgive(self, late_s: float, now: float) -> None:
        """Move deadlines by the time in which this process was stalled and has unread messages."""
        if not (more_s := catch_up_s(late_s)):
            return
        for lease in self._leases.values():
            lease.deadline_s = max(lease.deadline_s + late_s, now + more_s)
            if lease.stop_deadline_s is not None:
                lease.stop_deadline_s = max(lease.stop_deadline_s + late_s, now + more_s)

    def _tick(self, now: float) -> list[ReceiverAction]:
        actions: list[ReceiverAction] = []
        for lease in list(self._leases.values()):
            if lease.state in _WAITS_FOR_PEER and now >= lease.deadline_s:
                actions += self._end(lease, "lease expired", now)
            elif lease.stop_deadline_s is not None and now >= lease.stop_deadline_s:
                lease.stop_deadline_s = None
                assert lease.channel is not None
                actions.append(DropChannel(lease.channel, f"a write into {lease.sequence_id} did not stop"))
        for channel_id, channel in self._channels.items():
            pulse = Pulse.QUIET if channel.is_lost else channel.heart.beat(now)
            if pulse is Pulse.BEAT:
                actions.append(Send(channel_id, Heartbeat()))
            elif pulse is Pulse.LOST:
                actions.append(DropChannel(channel_id, f"{channel.peer} was silent"))
        return actions
