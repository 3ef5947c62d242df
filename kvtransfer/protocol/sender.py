"""The sending side towards one receiver: its channel and every push over it. Pure.

A push may write only between Begun and the moment its end is announced (Commit, Abort, Revoked). Its end is
announced, and its owner told, only after ``Stopped`` or ``Drained``: no write of it is under way then, so its source
blocks and the target blocks are both free to be used again.

On a two-sided channel the receiver writes, and refuses what it has not leased: such a push does not wait for Begun, and
Begin, data and Commit are in flight together.

    waiting --channel--> beginning --Begun--> writing --commit--> draining --Drained--> committed --Ack--> DONE
       |        '----two-sided channel----------^|                  |  ^----Nack, layers---'  |
       '------ abort, Revoke, loss, deadline ----'----> stopping <--'                         |
                                                            '--Stopped--> FAILED <------------'
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum

from baton.clock import catch_up_s
from baton.errors import BatonError, Cancelled, Incompatible, NodeLost, TransferFailed, from_code
from baton.machine import Tick
from baton.types import TokenChunk
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
)
from kvtransfer.protocol.redial import Redial
from kvtransfer.protocol.sender_events import (
    AbortAsked,
    ChannelLost,
    CommitAsked,
    Connect,
    Connected,
    ConnectFailed,
    Drain,
    Drained,
    DropChannel,
    Finish,
    PushBegun,
    Received,
    Send,
    SenderAction,
    SenderEvent,
    StartWriting,
    Stopped,
    StopWriting,
    WriteFailed,
)

# Epochs used on a channel that are remembered: a lease starts one push, ever.
_MAX_REMEMBERED = 65536
# Leases to be given back that are remembered without a channel; what is forgotten expires.
_MAX_OWED = 1024


@dataclass(frozen=True, slots=True)
class SenderConfig:
    # From begin() to Begun, connecting included.
    begin_timeout_s: float = 5.0
    # From commit() to the acknowledgement.
    commit_timeout_s: float = 30.0
    # A lease that its receiver must have revoked is given up this long after its lifetime.
    lease_grace_s: float = 5.0
    # For writes under way to end; then the connection is broken under them.
    stop_timeout_s: float = 2.0
    min_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    # For so long after its last push a receiver's lost connection is opened again before a push asks for it.
    keep_warm_s: float = 60.0
    heartbeat_s: float = 1.0
    max_missed_heartbeats: int = 5


class PushState(Enum):
    WAITING = "waiting"
    BEGINNING = "beginning"
    WRITING = "writing"
    DRAINING = "draining"
    COMMITTED = "committed"
    STOPPING = "stopping"


@dataclass(slots=True)
class _Push:
    number: int
    sequence_id: str
    epoch: int
    incarnation: int
    ttl_s: float
    deadline_s: float
    state: PushState = PushState.WAITING
    # The channel on which it began.
    channel: int | None = None
    attempt: int = 1
    first_token: TokenChunk | None = None
    # Why it is stopping, and what the receiver is told then.
    error: BatonError | None = None
    farewell: Abort | Revoked | None = None


@dataclass(frozen=True, slots=True)
class _GivenBack:
    """A lease that its writer gives back."""

    # Of its receiver.
    incarnation: int
    abort: Abort
    # Over by then, whether the receiver hears of this or not.
    until_s: float


@dataclass(slots=True)
class _Channel:
    number: int
    node_id: str
    incarnation: int
    is_one_sided: bool
    heart: Heart
    used_epochs: OrderedDict[int, None] = field(default_factory=OrderedDict)
    # Said on it. If it breaks, some may not have reached the receiver.
    given_back: deque[_GivenBack] = field(default_factory=lambda: deque(maxlen=_MAX_OWED))
    is_dropping: bool = False

    def use(self, epoch: int) -> bool:
        """False if the lease was used on this channel before."""
        if epoch in self.used_epochs:
            return False
        self.used_epochs[epoch] = None
        if len(self.used_epochs) > _MAX_REMEMBERED:
            self.used_epochs.popitem(last=False)
        return True


class PushMachine:
    """``handle(event, now) -> actions``; ``wake_at_s`` says when Tick is due."""

    def __init__(self, peer: str, config: SenderConfig) -> None:
        self._peer = peer
        self._config = config
        self._pushes: dict[int, _Push] = {}
        self._channel: _Channel | None = None
        self._is_connecting = False
        self._redial = Redial(config.min_backoff_s, config.max_backoff_s, config.keep_warm_s)
        # Said as soon as there is a channel: of pushes whose Begin was not sent, or whose Begin or abort went into a
        # channel that broke and may not have reached the receiver.
        self._owed: deque[_GivenBack] = deque(maxlen=_MAX_OWED)

    # Read-only views for drivers and tests.

    def state(self, push: int) -> PushState | None:
        found = self._pushes.get(push)
        return None if found is None else found.state

    def attempt(self, push: int) -> int:
        return self._pushes[push].attempt

    @property
    def num_pushes(self) -> int:
        return len(self._pushes)

    @property
    def wake_at_s(self) -> float | None:
        deadlines = [p.deadline_s for p in self._pushes.values()]
        if self._channel is not None and not self._channel.is_dropping:
            deadlines.append(self._channel.heart.due_s)
        if self._channel is None and not self._is_connecting:
            due_s = self._redial.due_s(is_waited_for=self._is_waited_for)
            deadlines += [] if due_s is None else [due_s]
        return min(deadlines, default=None)

    def handle(self, event: SenderEvent, now: float) -> list[SenderAction]:  # noqa: C901 - one case per event
        match event:
            case Received():
                return self._received(event.channel, event.message, now)
            case PushBegun():
                return self._push_begun(event, now)
            case CommitAsked():
                return self._commit_asked(event, now)
            case AbortAsked():
                return self._abort_asked(event, now)
            case Drained():
                return self._drained(event)
            case WriteFailed():
                return self._on(event.push, event.error, now, say_abort=True)
            case Stopped():
                return self._stopped(event.push, now)
            case Connected():
                return self._connected(event, now)
            case ConnectFailed():
                return self._connect_failed(event.error, now)
            case ChannelLost():
                return self._channel_lost(event, now)
            case Tick():
                self._forgive(event.late_s, now)
                return self._tick(now)

    def check(self) -> None:
        """Internal invariants; called by tests after every event."""
        for number, push in self._pushes.items():
            assert push.number == number
            if push.state is PushState.STOPPING:
                assert push.error is not None
            if push.state in (PushState.DRAINING, PushState.COMMITTED):
                assert push.first_token is not None
            if self._channel is None:
                assert push.state in (PushState.WAITING, PushState.STOPPING)
        assert not (self._is_connecting and self._channel is not None)

    # Channel.

    @property
    def _is_waited_for(self) -> bool:
        return bool(self._owed) or any(p.state is PushState.WAITING for p in self._pushes.values())

    def _connect(self, now: float) -> list[SenderAction]:
        if self._channel is not None or self._is_connecting:
            return []
        if not self._redial.is_due(now, is_waited_for=self._is_waited_for):
            return []
        self._is_connecting = True
        return [Connect()]

    def _connected(self, event: Connected, now: float) -> list[SenderAction]:
        assert self._channel is None, "one connection at a time"
        self._is_connecting = False
        self._redial.connected()
        heart = Heart(self._config.heartbeat_s, self._config.max_missed_heartbeats, now)
        self._channel = _Channel(event.channel, event.node_id, event.incarnation, event.is_one_sided, heart)
        actions = self._give_back()
        for push in list(self._pushes.values()):
            if push.state is PushState.WAITING:
                actions += self._begin(push, now)
        return actions

    def _connect_failed(self, error: BatonError, now: float) -> list[SenderAction]:
        """All waiting pushes fail at once instead of waiting for the next attempt: the router must know."""
        self._is_connecting = False
        self._owed.clear()
        self._redial.failed(now, can_repeat=error.retryable)
        waiting = [p for p in self._pushes.values() if p.state is PushState.WAITING]
        return [self._finish(p, error) for p in waiting]

    def _channel_lost(self, event: ChannelLost, now: float) -> list[SenderAction]:
        channel = self._channel
        if channel is None or channel.number != event.channel:
            return []
        self._channel = None
        self._redial.lost(now)
        self._owed += [lease for lease in channel.given_back if lease.until_s > now]
        actions: list[SenderAction] = []
        error = NodeLost(f"{self._peer}: transfer channel lost: {event.reason}")
        for push in list(self._pushes.values()):
            if push.channel == channel.number:
                # Where Begun was heard, the receiver ends the lease with the channel.
                is_heard = channel.is_one_sided and push.state is not PushState.BEGINNING
                push.farewell = None if is_heard else Abort(push.sequence_id, push.epoch, error.message)
                actions += self._fail(push, error, now)
        return actions + self._connect(now)

    def _give_back(self) -> list[SenderAction]:
        """Leases whose receiver may still wait for a Begin."""
        channel = self._channel
        if channel is None or channel.is_dropping:
            return []
        leases = [x for x in self._owed if x.incarnation == channel.incarnation and channel.use(x.abort.epoch)]
        self._owed.clear()
        channel.given_back += leases
        return [Send(channel.number, lease.abort) for lease in leases]

    def _drop(self, reason: str) -> list[SenderAction]:
        if self._channel is None or self._channel.is_dropping:
            return []
        self._channel.is_dropping = True
        return [DropChannel(self._channel.number, reason)]

    def _send(self, message: SenderMessage) -> list[SenderAction]:
        if self._channel is None or self._channel.is_dropping:
            return []
        return [Send(self._channel.number, message)]

    # Life of a push.

    def _push_begun(self, event: PushBegun, now: float) -> list[SenderAction]:
        deadline_s = now + self._config.begin_timeout_s
        push = _Push(event.push, event.sequence_id, event.epoch, event.incarnation, event.ttl_s, deadline_s)
        self._pushes[event.push] = push
        self._redial.pushed(now)
        if self._channel is not None and not self._channel.is_dropping:
            return self._begin(push, now)
        return self._connect(now)

    def _begin(self, push: _Push, now: float) -> list[SenderAction]:
        channel = self._channel
        assert channel is not None
        if push.incarnation != channel.incarnation:
            error: BatonError = NodeLost(
                f"lease of {push.sequence_id} was granted by incarnation {push.incarnation} of "
                f"{channel.node_id}, which is now {channel.incarnation}"
            )
            return [self._finish(push, error)]
        if not channel.use(push.epoch):
            return [self._finish(push, TransferFailed(f"lease {push.epoch} of {push.sequence_id} was used before"))]
        push.state, push.channel = PushState.BEGINNING, channel.number
        begin = self._send(Begin(push.sequence_id, push.epoch))
        return begin if channel.is_one_sided else begin + self._begun(push, now)

    def _commit_asked(self, event: CommitAsked, now: float) -> list[SenderAction]:
        push = self._pushes.get(event.push)
        if push is None or push.state is PushState.STOPPING or push.first_token is not None:
            return []
        push.first_token = event.first_token
        if push.state is not PushState.WRITING:
            return []
        return self._drain(push, now)

    def _drain(self, push: _Push, now: float) -> list[SenderAction]:
        push.state = PushState.DRAINING
        push.deadline_s = now + self._config.commit_timeout_s
        return [Drain(push.number, push.attempt)]

    def _abort_asked(self, event: AbortAsked, now: float) -> list[SenderAction]:
        push = self._pushes.get(event.push)
        if push is None:
            return []
        return self._on(event.push, Cancelled(f"{push.sequence_id}: {event.reason}"), now, say_abort=True)

    def _drained(self, event: Drained) -> list[SenderAction]:
        push = self._pushes.get(event.push)
        if push is None or push.state is not PushState.DRAINING or event.attempt != push.attempt:
            return []
        assert push.first_token is not None
        push.state = PushState.COMMITTED
        return self._send(
            Commit(
                push.sequence_id, push.epoch, push.attempt, event.num_blocks, event.layer_digests, push.first_token,
                event.num_sent_bytes,
            )
        )  # fmt: skip

    def _on(self, number: int, error: BatonError, now: float, *, say_abort: bool = False) -> list[SenderAction]:
        push = self._pushes.get(number)
        if push is None or push.state is PushState.STOPPING:
            return []
        if say_abort:
            push.farewell = Abort(push.sequence_id, push.epoch, error.message)
        return self._fail(push, error, now)

    def _fail(self, push: _Push, error: BatonError, now: float) -> list[SenderAction]:
        """End a push with an error: at once if it is not writing, else after Stopped."""
        if push.state is PushState.STOPPING:
            return []
        push.error = error
        if push.state in (PushState.WRITING, PushState.DRAINING):
            push.state = PushState.STOPPING
            push.deadline_s = now + self._config.stop_timeout_s
            return [StopWriting(push.number)]
        return self._part(push, now)

    def _part(self, push: _Push, now: float) -> list[SenderAction]:
        """Say its last word, on its own channel or, if it gives a lease back, on the next one."""
        actions: list[SenderAction] = []
        channel, word = self._channel, push.farewell
        is_own = channel is not None and channel.number == push.channel and not channel.is_dropping
        if isinstance(word, Abort):
            given_back = self._owed if channel is None or not is_own else channel.given_back
            given_back.append(_GivenBack(push.incarnation, word, now + push.ttl_s))
        if is_own:
            actions += [] if word is None else self._send(word)
        else:
            actions += self._give_back()
        return [*actions, self._finish(push, push.error), *self._connect(now)]

    def _stopped(self, number: int, now: float) -> list[SenderAction]:
        push = self._pushes.get(number)
        return [] if push is None or push.state is not PushState.STOPPING else self._part(push, now)

    def _finish(self, push: _Push, error: BatonError | None) -> SenderAction:
        del self._pushes[push.number]
        return Finish(push.number, error)

    # Messages of the peer.

    def _received(self, channel: int, message: ReceiverMessage, now: float) -> list[SenderAction]:
        if self._channel is None or self._channel.number != channel or self._channel.is_dropping:
            return []
        self._channel.heart.heard()
        if isinstance(message, Heartbeat):
            return []
        push = self._find(message.sequence_id, message.epoch)
        match message:
            case Begun():
                return [] if push is None else self._begun(push, now)
            case Ack():
                is_expected = push is not None and push.state is PushState.COMMITTED
                return [self._finish(push, None)] if push is not None and is_expected else []
            case Nack():
                return [] if push is None else self._nacked(push, message, now)
            case Revoke():
                return self._revoked(push, message, now)

    def _find(self, sequence_id: str, epoch: int) -> _Push | None:
        for push in self._pushes.values():
            if push.epoch == epoch and push.sequence_id == sequence_id and push.state is not PushState.WAITING:
                return push
        return None

    def _begun(self, push: _Push, now: float) -> list[SenderAction]:
        if push.state is not PushState.BEGINNING:
            return []
        push.state = PushState.WRITING
        push.deadline_s = now + push.ttl_s + self._config.lease_grace_s
        actions: list[SenderAction] = [StartWriting(push.number)]
        return actions if push.first_token is None else actions + self._drain(push, now)

    def _nacked(self, push: _Push, nack: Nack, now: float) -> list[SenderAction]:
        if not nack.retransmit_layers:
            error = from_code(nack.failure.code, nack.failure.message)
            if not isinstance(error, TransferFailed | Incompatible | NodeLost):
                error = TransferFailed(f"{self._peer} refused {push.sequence_id}: {nack.failure.message}")
            if push.state is not PushState.COMMITTED:
                push.farewell = Abort(push.sequence_id, push.epoch, "refused")
            return self._fail(push, error, now)
        if push.state is not PushState.COMMITTED or nack.attempt != push.attempt:
            return []
        push.attempt += 1
        push.state = PushState.DRAINING
        return [Drain(push.number, push.attempt, nack.retransmit_layers)]

    def _revoked(self, push: _Push | None, message: Revoke, now: float) -> list[SenderAction]:
        answer = Revoked(message.sequence_id, message.epoch)
        if push is None:
            return self._send(answer)  # Over: the writer has stopped.
        push.farewell = answer
        error = TransferFailed(f"{self._peer} revoked the lease of {push.sequence_id}: {message.reason}")
        return self._fail(push, error, now)

    # Time.

    def _forgive(self, late_s: float, now: float) -> None:
        """Move deadlines by the time in which this process was stalled and has unread messages."""
        if more_s := catch_up_s(late_s):
            for push in self._pushes.values():
                push.deadline_s = max(push.deadline_s + late_s, now + more_s)

    def _tick(self, now: float) -> list[SenderAction]:
        actions: list[SenderAction] = []
        for push in list(self._pushes.values()):
            if now >= push.deadline_s:
                actions += self._late(push, now)
        if self._channel is not None and not self._channel.is_dropping:
            pulse = self._channel.heart.beat(now)
            if pulse is Pulse.BEAT:
                actions += self._send(Heartbeat())
            elif pulse is Pulse.LOST:
                actions += self._drop("the receiver was silent")
        return actions + self._connect(now)

    def _late(self, push: _Push, now: float) -> list[SenderAction]:
        if push.state is PushState.STOPPING:
            # Stuck in the transport: break the connection under it.
            push.deadline_s = now + self._config.stop_timeout_s
            return self._drop(f"a write of {push.sequence_id} did not stop")
        waited_for = {
            PushState.WAITING: "a channel",
            PushState.BEGINNING: "Begun",
            PushState.WRITING: "commit before the lease ended",
            PushState.DRAINING: "its bytes to be written",
            PushState.COMMITTED: "the acknowledgement",
        }[push.state]
        error = TransferFailed(f"{push.sequence_id} to {self._peer}: gave up waiting for {waited_for}")
        return self._on(push.number, error, now, say_abort=True)
