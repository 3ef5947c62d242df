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
from dataclasses import dataclass

from baton.clock import catch_up_s
from baton.errors import BatonError, InvalidRequest, TransferFailed
from baton.machine import Tick
from baton.types import Failure
from kvtransfer.protocol.lease import HeldLease, LeaseState, PeerChannel
from kvtransfer.protocol.liveness import Heart, Pulse
from kvtransfer.protocol.messages import Abort, Ack, Begin, Begun, Commit, Heartbeat, Nack, Revoked, SenderMessage
from kvtransfer.protocol.receiver_events import (
    Arrived,
    ChannelLost,
    ChannelOpened,
    DataCame,
    Digest,
    DropChannel,
    EpochQuiet,
    ForgetDigests,
    Granted,
    Malformed,
    Received,
    ReceiverAction,
    ReceiverEvent,
    RevokeAsked,
    Send,
    TakenOver,
    TakeOverRefused,
    Verified,
    Verify,
    VerifyFailed,
    WriterBegan,
    WriterGone,
    Wrote,
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


class LeaseMachine:
    """``handle(event, now) -> actions``; ``wake_at_s`` says when Tick is due."""

    def __init__(self, config: ReceiverConfig) -> None:
        self._config = config
        self._leases: dict[int, HeldLease] = {}
        self._epoch_of: dict[str, int] = {}
        self._channels: dict[int, PeerChannel] = {}
        # Epochs of leases that arrived, with the channel they came through, oldest first.
        self._arrived: OrderedDict[int, int] = OrderedDict()

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
    def wake_at_s(self) -> float | None:
        deadlines = [c.heart.due_s for c in self._channels.values() if not c.is_lost]
        deadlines += [due_s for lease in self._leases.values() if (due_s := lease.wake_at_s) is not None]
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
                self._channels[event.channel] = PeerChannel(event.channel, event.peer, event.is_one_sided, heart)
                return []
            case ChannelLost():
                return self._channel_lost(event, now)
            case WriterGone():
                return self._writer_gone(event.channel, now)
            case EpochQuiet():
                return self._epoch_quiet(event.epoch)
            case Verified():
                return self._verified(event, now)
            case VerifyFailed() | TakeOverRefused():
                return self._refused(event, now)
            case TakenOver():
                return self._taken_over(event.epoch)
            case Tick():
                self._forgive(event.late_s, now)
                return self._tick(now)

    def check(self) -> None:
        """Internal invariants; called by tests after every event."""
        assert len(self._epoch_of) == len(self._leases)
        for epoch, lease in self._leases.items():
            assert lease.epoch == epoch == self._epoch_of[lease.sequence_id]
            lease.check()
        for number, channel in self._channels.items():
            assert channel.number == number
            assert all(self._leases[epoch].channel is channel for epoch in channel.epochs)

    # Grants and ends.

    def _granted(self, event: Granted, now: float) -> list[ReceiverAction]:
        if event.sequence_id in self._epoch_of:
            raise InvalidRequest(f"{event.sequence_id} has a lease already; a new attempt needs a new sequence id")
        assert event.epoch not in self._leases, "epochs are given once"
        self._leases[event.epoch] = HeldLease(
            event.sequence_id, event.epoch, event.block_ids, event.min_blocks, now + event.ttl_s
        )
        self._epoch_of[event.sequence_id] = event.epoch
        return []

    def _end(self, lease: HeldLease, reason: str, now: float, *, tell: bool = True) -> list[ReceiverAction]:
        """Stop a lease that has not arrived; releases it at once if no writer is left, else quarantines it."""
        if lease.state in (LeaseState.ENDING, LeaseState.ARRIVING):
            # Ending already, or its owner is taking it over in this very moment and will cancel the sequence itself.
            return []
        return lease.end(reason, now + self._config.revoke_timeout_s, tell=tell) + self._settle(lease)

    def _settle(self, lease: HeldLease) -> list[ReceiverAction]:
        if lease.state is not LeaseState.ENDING or not lease.is_quiet:
            return []
        self._forget(lease)
        return [ForgetDigests(lease.epoch, None), lease.released()]

    def _forget(self, lease: HeldLease) -> None:
        del self._leases[lease.epoch]
        del self._epoch_of[lease.sequence_id]
        if lease.channel is not None:
            lease.channel.epochs.discard(lease.epoch)

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

    def _writer_gone(self, number: int, now: float) -> list[ReceiverAction]:
        channel = self._channels.get(number)
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
            del self._channels[number]
        return actions

    def _wrote(self, event: Wrote) -> list[ReceiverAction]:
        lease = self._leases.get(event.epoch)
        if lease is None or lease.channel is None or lease.channel.number != event.channel:
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
        if lease is None or lease.channel is not channel or lease.sequence_id != event.sequence_id:
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

    def _received(self, number: int, message: SenderMessage, now: float) -> list[ReceiverAction]:
        channel = self._channels.get(number)
        if channel is None or channel.is_lost:
            return []
        channel.heart.heard()
        if isinstance(message, Heartbeat):
            return []
        lease = self._leases.get(message.epoch)
        if lease is not None and lease.sequence_id != message.sequence_id:
            lease = None
        if isinstance(message, Begin):
            return self._begin(channel, message, lease)
        if isinstance(message, Abort) and lease is not None and lease.state is LeaseState.GRANTED:
            # Given back by who was to write, before it began.
            lease.is_given_back = True
            return self._end(lease, f"aborted by {channel.peer}: {message.reason}", now)
        if lease is None or lease.channel is not channel:
            return self._unknown(channel, message)
        return self._said(lease, message, channel.peer, now)

    def _said(self, lease: HeldLease, message: Commit | Abort | Revoked, peer: str, now: float) -> list[ReceiverAction]:
        """The lease's own writer speaks."""
        match message:
            case Commit():
                return self._commit(lease, message, now)
            case Abort():
                lease.is_given_back = lease.state is not LeaseState.ENDING
                return self._stopped(lease, f"aborted by {peer}: {message.reason}", now)
            case Revoked():
                return self._stopped(lease, lease.reason or f"given back by {peer}", now)

    def _begin(self, channel: PeerChannel, message: Begin, lease: HeldLease | None) -> list[ReceiverAction]:
        if lease is not None and lease.channel is channel:
            return []  # A duplicate, or its data came first. Begun is said once: it can never start a second writer.
        if channel.is_writer_gone:
            return []  # Its connection is broken, the channel will follow.
        if lease is None or lease.state is not LeaseState.GRANTED:
            what = "is not live here" if lease is None else "belongs to another channel"
            error = TransferFailed(f"lease {message.epoch} of {message.sequence_id} {what}; reserve again")
            return [_nack(channel, message, 0, error)]
        began = [lease.bind(channel), WriterBegan(lease.sequence_id, lease.epoch)]
        if not channel.is_one_sided:
            return began  # Its sender does not wait: this process is the fence.
        return [*began, Send(channel.number, Begun(lease.sequence_id, lease.epoch))]

    def _data_came(self, event: DataCame) -> list[ReceiverAction]:
        lease, channel = self._leases.get(event.epoch), self._channels.get(event.channel)
        if lease is None or lease.state is not LeaseState.GRANTED:
            return []
        if channel is None or channel.is_lost or channel.is_writer_gone or channel.is_one_sided:
            return []
        return [lease.bind(channel), WriterBegan(lease.sequence_id, lease.epoch)]

    def _unknown(self, channel: PeerChannel, message: Commit | Abort | Revoked) -> list[ReceiverAction]:
        """A message for a lease that is over, or not this peer's. Only a Commit waits for an answer."""
        if not isinstance(message, Commit):
            return []
        if self._arrived.get(message.epoch) == channel.number:
            return [Send(channel.number, Ack(message.sequence_id, message.epoch))]
        error = TransferFailed(f"lease {message.epoch} of {message.sequence_id} is over")
        return [_nack(channel, message, message.attempt, error)]

    def _commit(self, lease: HeldLease, commit: Commit, now: float) -> list[ReceiverAction]:
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
            return lease.nack(Failure.of(error)) + self._end(lease, error.message, now, tell=False)
        lease.state, lease.commit = LeaseState.FILLING, commit
        return [lease.close(after_bytes=commit.num_sent_bytes)]

    def _stopped(self, lease: HeldLease, reason: str, now: float) -> list[ReceiverAction]:
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
        can_repeat = lease.attempt < self._config.max_attempts and now < lease.deadline_s
        if lease.channel.is_lost or lease.channel.is_writer_gone or not can_repeat:
            error = TransferFailed(f"{lease.sequence_id}: {what}, giving up")
            return lease.nack(Failure.of(error)) + self._end(lease, what, now, tell=False)
        nack = lease.nack(Failure.of(TransferFailed(what)), event.damaged_layers)
        lease.attempt += 1
        lease.state, lease.commit = LeaseState.WRITING, None
        return [ForgetDigests(lease.epoch, event.damaged_layers), lease.open(), *nack]

    def _refused(self, event: VerifyFailed | TakeOverRefused, now: float) -> list[ReceiverAction]:
        """What came is complete, but cannot be verified, or is not taken over."""
        lease = self._leases.get(event.epoch)
        if lease is None:
            return []
        if isinstance(event, VerifyFailed):
            is_awaited = lease.state is LeaseState.VERIFYING and event.attempt == lease.attempt
        else:
            is_awaited = lease.state is LeaseState.ARRIVING
        if not is_awaited:
            return []
        lease.state = LeaseState.VERIFYING
        return lease.nack(event.failure) + self._end(lease, event.failure.message, now, tell=False)

    def _taken_over(self, epoch: int) -> list[ReceiverAction]:
        lease = self._leases.get(epoch)
        if lease is None or lease.state is not LeaseState.ARRIVING:
            return []
        assert lease.channel is not None
        self._forget(lease)
        self._arrived[epoch] = lease.channel.number
        if len(self._arrived) > _MAX_REMEMBERED:
            self._arrived.popitem(last=False)
        return [ForgetDigests(epoch, None), *lease.send(Ack(lease.sequence_id, epoch))]

    # Time.

    def _forgive(self, late_s: float, now: float) -> None:
        """Move deadlines by the time in which this process was stalled and has unread messages."""
        if more_s := catch_up_s(late_s):
            for lease in self._leases.values():
                lease.forgive(late_s, now + more_s)

    def _tick(self, now: float) -> list[ReceiverAction]:
        actions: list[ReceiverAction] = []
        for lease in list(self._leases.values()):
            if lease.waits_for_peer and now >= lease.deadline_s:
                actions += self._end(lease, "lease expired", now)
            elif lease.stop_deadline_s is not None and now >= lease.stop_deadline_s:
                lease.stop_deadline_s = None
                assert lease.channel is not None
                reason = f"a write into {lease.sequence_id} did not stop"
                actions.append(DropChannel(lease.channel.number, reason))
        for number, channel in self._channels.items():
            pulse = Pulse.QUIET if channel.is_lost else channel.heart.beat(now)
            if pulse is Pulse.BEAT:
                actions.append(Send(number, Heartbeat()))
            elif pulse is Pulse.LOST:
                actions.append(DropChannel(number, f"{channel.peer} was silent"))
        return actions


def _nack(channel: PeerChannel, message: Begin | Commit, attempt: int, error: BatonError) -> ReceiverAction:
    """To a message about a lease that is not the peer's."""
    return Send(channel.number, Nack(message.sequence_id, message.epoch, attempt, Failure.of(error)))
