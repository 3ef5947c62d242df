"""The token phase as a pure machine: the state of each sequence, and the actions that follow from each event.

    reserve -> ASKED -> LEASED -> RUNNING -> gone, also to the prefill machine, which moves it to another node
                          |
                          +--> ENDING (no writer may come back) --> gone

Law: leased blocks are returned only when the receiver reports Released, running ones when the engine releases them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from baton.errors import BadConfig, BatonError, InvalidRequest, Overloaded, TransferFailed
from baton.node_messages import (
    Cancel,
    Defect,
    FromRouter,
    Joined,
    LetGo,
    Migrate,
    Refused,
    Reserve,
    RouterMessage,
    Run,
    Send,
    SequenceFailed,
    SessionLost,
)
from baton.types import Embedding, Failure, Lease, PromptLogprobs, TokenChunk
from engine.events import Failed, Handoff, Output, Started
from kvtransfer.protocol.receiver_events import Arrived, LeaseNotice, Quarantined, Released, WriterBegan


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How long a lease may last: what the router asks for, within these limits."""

    # If the router does not say.
    default_ttl_s: float = 30.0
    max_ttl_s: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.default_ttl_s <= self.max_ttl_s:
            raise BadConfig(
                f"default_ttl_s is {self.default_ttl_s}, expected more than 0 and at most max_ttl_s ({self.max_ttl_s})",
                param="default_ttl_s",
            )


# -- events; what was granted is its Lease


@dataclass(frozen=True, slots=True)
class GrantRefused:
    sequence_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class JoinRefused:
    """The engine did not take what arrived."""

    sequence_id: str
    failure: Failure


Event = (
    FromRouter
    | SessionLost
    | Lease
    | GrantRefused
    | LeaseNotice
    | JoinRefused
    | Defect
    | Started
    | PromptLogprobs
    | Embedding
    | Output
    | Handoff
    | Failed
)

# -- actions; an accepted Reserve is its own: lease blocks out, and answer with the Lease or GrantRefused


@dataclass(frozen=True, slots=True)
class Expect:
    """Its prompt is being computed: it will arrive soon."""

    sequence_id: str


@dataclass(frozen=True, slots=True)
class Join:
    """Answer with JoinRefused if the engine does not take the sequence, and do not acknowledge the arrival."""

    sequence_id: str
    first_token: TokenChunk


@dataclass(frozen=True, slots=True)
class RejectArrival:
    """Do not acknowledge what arrived: the sequence is not expected any more."""

    sequence_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class RevokeLease:
    sequence_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    sequence_id: str


@dataclass(frozen=True, slots=True)
class ReturnBlocks:
    sequence_id: str


@dataclass(frozen=True, slots=True)
class StopCompute:
    """Compute no further; the engine takes the blocks back."""

    sequence_id: str


Action = Reserve | Expect | Join | RejectArrival | RevokeLease | Quarantine | ReturnBlocks | StopCompute | LetGo | Send


class Phase(Enum):
    ASKED = "asked"
    LEASED = "leased"
    RUNNING = "running"
    # The router has heard its last of it; the lease's blocks wait for the receiver.
    ENDING = "ending"


class _Relay:
    __slots__ = ("granted_s", "phase", "prefill_node_id", "session")

    def __init__(self, session: int, prefill_node_id: str) -> None:
        self.session = session
        self.prefill_node_id = prefill_node_id
        self.phase = Phase.ASKED
        self.granted_s = 0.0


class DecodeMachine:
    """``handle(event, now)`` -> actions. Events about sequences it does not know are late, and ignored."""

    # The deadlines are those of the engine and of the leases.
    wake_at_s: float | None = None

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._relays: dict[str, _Relay] = {}

    def handle(self, event: Event, now: float) -> list[Action]:  # noqa: C901 - one table of transitions
        match event:
            case FromRouter(session, message):
                return self._received(session, message)
            case SessionLost(session):
                mine = [name for name, relay in self._relays.items() if relay.session == session]
                return [action for name in mine for action in self._stop(name, "the router's session was lost")]
            case Lease():
                return self._granted(event, now)
            case Arrived():
                return self._arrived(event, now)
        relay = self._relays.get(event.sequence_id)
        if relay is None:
            return []
        match event:
            case GrantRefused(sequence_id, failure):
                del self._relays[sequence_id]
                return [Send(relay.session, Refused(sequence_id, failure))]
            case JoinRefused(sequence_id, failure):
                relay.phase = Phase.ENDING
                return [Send(relay.session, SequenceFailed(sequence_id, failure))]
            case WriterBegan(sequence_id):
                return [Expect(sequence_id)] if relay.phase is Phase.LEASED else []
            case Quarantined(sequence_id):
                return [Quarantine(sequence_id), *self._lease_over(relay, event)]
            case Released():
                return self._released(relay, event)
            case Output(sequence_id, chunk):
                if relay.phase is Phase.RUNNING and chunk.finish_reason is not None:
                    del self._relays[sequence_id]
                return [Send(relay.session, chunk)] if relay.phase is Phase.RUNNING else []
            case Failed(sequence_id, failure):
                del self._relays[sequence_id]
                return [Send(relay.session, SequenceFailed(sequence_id, failure))]
            case Defect(sequence_id, failure):
                return self._give_up(relay, sequence_id, failure)
            case Started() | PromptLogprobs() | Embedding() | Handoff():
                return []

    @property
    def num_sequences(self) -> int:
        return len(self._relays)

    def phase_of(self, sequence_id: str) -> Phase | None:
        relay = self._relays.get(sequence_id)
        return None if relay is None else relay.phase

    def _received(self, session: int, message: RouterMessage) -> list[Action]:
        match message:
            case Reserve():
                return self._reserve(session, message)
            case Cancel(sequence_id, reason):
                relay = self._relays.get(sequence_id)
                return self._stop(sequence_id, reason) if relay is not None and relay.session == session else []
            case Migrate():
                return self._let_go(session, message)
            case Run():
                return []

    def _let_go(self, session: int, message: Migrate) -> list[Action]:
        relay = self._relays.get(message.sequence_id)
        if relay is None or relay.session != session or relay.phase is not Phase.RUNNING:
            return []
        del self._relays[message.sequence_id]
        return [LetGo(session, message)]

    def _reserve(self, session: int, message: Reserve) -> list[Action]:
        sequence_id = message.sequence_id
        try:
            self._check_reserve(sequence_id, message.prefill_node_id)
        except BatonError as error:
            return [Send(session, Refused(sequence_id, Failure.of(error)))]
        self._relays[sequence_id] = _Relay(session, message.prefill_node_id)
        return [message]

    def _check_reserve(self, sequence_id: str, prefill_node_id: str) -> None:
        if sequence_id in self._relays:
            raise Overloaded(f"{sequence_id} is still in use on {self._node_id}")
        if prefill_node_id == self._node_id:
            message = f"prefill is {self._node_id} itself, expected no reservation: run the sequence without a lease"
            raise InvalidRequest(message, param="prefill_node_id")

    def _granted(self, lease: Lease, now: float) -> list[Action]:
        relay = self._relays[lease.sequence_id]
        assert relay.phase is Phase.ASKED, "a grant is answered at once"
        relay.phase = Phase.LEASED
        relay.granted_s = now
        return [Send(relay.session, lease)]

    def _arrived(self, event: Arrived, now: float) -> list[Action]:
        sequence_id = event.sequence_id
        relay = self._relays.get(sequence_id)
        if relay is None or relay.phase is not Phase.LEASED:
            return [RejectArrival(sequence_id, f"{sequence_id} is not expected on {self._node_id} any more")]
        relay.phase = Phase.RUNNING
        joined = Joined(sequence_id, now - relay.granted_s)
        return [Join(sequence_id, event.first_token), Send(relay.session, joined)]

    def _released(self, relay: _Relay, event: Released) -> list[Action]:
        actions = self._lease_over(relay, event)
        del self._relays[event.sequence_id]
        return [ReturnBlocks(event.sequence_id), *actions]

    def _lease_over(self, relay: _Relay, event: Quarantined | Released) -> list[Action]:
        """Tell the router, unless it has asked for this itself or was told.

        A prefill node that gives a lease back tells the router why: the first token was the last, or what failed there.
        Overtaken by a word from here, that would be a failed attempt, held against it.
        """
        assert relay.phase is not Phase.RUNNING, "a lease that was taken over does not end"
        if relay.phase is not Phase.LEASED:
            return []
        relay.phase = Phase.ENDING
        if event.is_given_back:
            return []
        error = TransferFailed(f"KV of {event.sequence_id} did not arrive: {event.reason}")
        return [Send(relay.session, SequenceFailed(event.sequence_id, Failure.of(error, relay.prefill_node_id)))]

    def _give_up(self, relay: _Relay, sequence_id: str, failure: Failure) -> list[Action]:
        if relay.phase is Phase.ENDING:
            return []
        if relay.phase is Phase.ASKED:
            # Nothing was granted.
            del self._relays[sequence_id]
            return [Send(relay.session, Refused(sequence_id, failure))]
        return [*self._stop(sequence_id, failure.message), Send(relay.session, SequenceFailed(sequence_id, failure))]

    def _stop(self, sequence_id: str, reason: str) -> list[Action]:
        relay = self._relays[sequence_id]
        match relay.phase:
            case Phase.LEASED:
                relay.phase = Phase.ENDING
                return [RevokeLease(sequence_id, reason)]
            case Phase.RUNNING:
                del self._relays[sequence_id]
                return [StopCompute(sequence_id)]
            case Phase.ASKED | Phase.ENDING:
                return []
