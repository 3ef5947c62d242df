"""The prompt phase, and moves of running sequences, as a pure machine: the state of each sequence, and the actions that
follow from each event.

    run -> QUEUED -> COMPUTING -> COMMITTING -> (handed off)
              |          |            |
              +-> gone   +---> ABORTING ---> gone

Without a lease a sequence is STAYING and decodes here, to its end or until it is to move; one that decodes here after a
transfer (decode_node) comes when it is to move:

    STAYING --migrate--> MIGRATING -> HOLDING -> COMMITTING -> (handed off)
       ^                     |           |            |
       '---- not migrated ---+- RETURNING <-----------'     its end, a cancel: ABORTING, as above

It goes on generating while it is MIGRATING, and its tokens are sent whatever becomes of the move. Law: the blocks of a
sequence whose push began are released, or taken back, exactly once: when the push was committed or its abort has
returned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from baton.errors import BatonError, InternalError, InvalidRequest, Overloaded
from baton.node_messages import (
    Cancel,
    Defect,
    FromRouter,
    HandedOff,
    LetGo,
    Migrate,
    NotMigrated,
    PrefillDone,
    Reserve,
    RouterMessage,
    Run,
    Send,
    SequenceFailed,
    SessionLost,
)
from baton.types import Embedding, Failure, Lease, PromptLogprobs, TokenChunk, TransferReport
from engine.events import Failed, Handoff, Output, Started

# -- events


@dataclass(frozen=True, slots=True)
class SubmitRefused:
    """The engine did not take the sequence."""

    sequence_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class PushRefused:
    """The push could not even begin: no writer ever had the blocks."""

    sequence_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class MoveRefused:
    """A move could not even begin: nothing was lent."""

    sequence_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class PushCaughtUp:
    """Of a sequence that goes on: little of it is left to be pushed, or its lease is nearly full."""

    sequence_id: str


@dataclass(frozen=True, slots=True)
class PushCommitted:
    """Decode has acknowledged."""

    sequence_id: str
    report: TransferReport


@dataclass(frozen=True, slots=True)
class PushFailed:
    """The commit ended without an acknowledgement."""

    sequence_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class PushAborted:
    """No write is under way and none will follow."""

    sequence_id: str


Event = (
    FromRouter
    | SessionLost
    | LetGo
    | SubmitRefused
    | PushRefused
    | MoveRefused
    | PushCaughtUp
    | PushCommitted
    | PushFailed
    | PushAborted
    | Defect
    | Started
    | PromptLogprobs
    | Embedding
    | Output
    | Handoff
    | Failed
)

# -- actions; an accepted Run is its own: submit the sequence to the engine


@dataclass(frozen=True, slots=True)
class BeginPush:
    sequence_id: str
    lease: Lease
    block_ids: tuple[int, ...]
    num_known_tokens: int


@dataclass(frozen=True, slots=True)
class BeginMove:
    """Lend the blocks of a sequence that decodes here, and push them into the lease while it goes on."""

    sequence_id: str
    lease: Lease


@dataclass(frozen=True, slots=True)
class HoldCompute:
    """Stop it between two tokens; answered by Handoff, unless it ends before."""

    sequence_id: str


@dataclass(frozen=True, slots=True)
class Resume:
    """It goes on here, and nothing outside reads its blocks."""

    sequence_id: str


@dataclass(frozen=True, slots=True)
class CommitPush:
    sequence_id: str
    tokens: TokenChunk
    # These hold its KV.
    num_blocks: int


@dataclass(frozen=True, slots=True)
class AbortPush:
    sequence_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopCompute:
    """Compute no further; the blocks stay."""

    sequence_id: str


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """No reader has the blocks any more. Also ends a computation under way."""

    sequence_id: str


Action = (
    Run | BeginPush | BeginMove | HoldCompute | Resume | CommitPush | AbortPush | StopCompute | ReleaseBlocks | Send
)  # fmt: skip


class Phase(Enum):
    QUEUED = "queued"
    # Its push has begun.
    COMPUTING = "computing"
    COMMITTING = "committing"
    # The router has heard its last of it; the push is being ended.
    ABORTING = "aborting"
    # Decodes here.
    STAYING = "staying"
    # Its full blocks are pushed while it decodes.
    MIGRATING = "migrating"
    # Told to stop between two tokens.
    HOLDING = "holding"
    # Its move has failed; it goes on here once nothing reads its blocks and, if it was told to stop, it has stopped.
    RETURNING = "returning"


class _Relay:
    __slots__ = (
        "failure",
        "is_abort_due",
        "is_handoff_due",
        "is_moving",
        "is_prompt",
        "lease",
        "num_known_tokens",
        "phase",
        "session",
    )

    def __init__(self, session: int, lease: Lease | None, num_known_tokens: int, *, is_prompt: bool = True) -> None:
        self.session = session
        self.lease = lease
        self.num_known_tokens = num_known_tokens
        self.phase = Phase.STAYING if lease is None else Phase.QUEUED
        # Nothing was generated yet.
        self.is_prompt = is_prompt
        # It decoded here before its push began.
        self.is_moving = False
        # RETURNING: why, and what it waits for.
        self.failure: Failure | None = None
        self.is_abort_due = False
        self.is_handoff_due = False

    @property
    def is_computing(self) -> bool:
        """What the engine says of it is for the router."""
        return self.phase is Phase.COMPUTING or self.is_decoding

    @property
    def is_decoding(self) -> bool:
        """Its tokens are those of a sequence that decodes here."""
        return self.phase in (Phase.STAYING, Phase.MIGRATING, Phase.HOLDING, Phase.RETURNING)


class PrefillMachine:
    """``handle(event, now)`` -> actions. Events about sequences it does not know are late, and ignored."""

    # The deadlines are those of the engine and of the pushes.
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
            case LetGo(session, message):
                assert message.sequence_id not in self._relays, "a sequence belongs to one machine"
                self._relays[message.sequence_id] = _Relay(session, None, 0, is_prompt=False)
                return self._migrate(session, message)
        relay = self._relays.get(event.sequence_id)
        if relay is None:
            return []
        match event:
            case SubmitRefused(sequence_id, failure):
                del self._relays[sequence_id]
                return [Send(relay.session, SequenceFailed(sequence_id, failure))]
            case Started(sequence_id, block_ids):
                return self._started(relay, sequence_id, block_ids)
            case PromptLogprobs() | Embedding():
                return [Send(relay.session, event)] if relay.is_computing else []
            case Output():
                return self._output(relay, event)
            case Handoff():
                return self._handed_over(relay, event)
            case PushCaughtUp(sequence_id):
                if relay.phase is not Phase.MIGRATING:
                    return []
                relay.phase = Phase.HOLDING
                return [HoldCompute(sequence_id)]
            case MoveRefused(sequence_id, failure):
                relay.phase, relay.is_moving = Phase.STAYING, False
                return [Send(relay.session, NotMigrated(sequence_id, self._blame(failure, relay)))]
            case Failed(sequence_id, failure) | Defect(sequence_id, failure):
                return self._fail(relay, sequence_id, failure)
            case PushRefused(sequence_id, failure):
                # The blocks have no reader: they go back as soon as the running step is over.
                relay.phase = Phase.QUEUED
                return self._fail(relay, sequence_id, self._blame(failure, relay))
            case PushFailed(sequence_id, failure):
                return self._push_failed(relay, sequence_id, self._blame(failure, relay))
            case PushCommitted(sequence_id, report):
                return self._committed(relay, sequence_id, report)
            case PushAborted(sequence_id):
                relay.is_abort_due = False
                return self._returned(relay, sequence_id) if relay.phase is Phase.RETURNING else self._gone(sequence_id)

    @property
    def num_sequences(self) -> int:
        return len(self._relays)

    @property
    def has_prompts(self) -> bool:
        """Prompts that are not computed to their end."""
        return any(relay.is_prompt for relay in self._relays.values())

    @property
    def has_decodes(self) -> bool:
        """Sequences that decode here."""
        return any(relay.is_decoding and not relay.is_prompt for relay in self._relays.values())

    def has(self, sequence_id: str) -> bool:
        return sequence_id in self._relays

    def phase_of(self, sequence_id: str) -> Phase | None:
        relay = self._relays.get(sequence_id)
        return None if relay is None else relay.phase

    def _received(self, session: int, message: RouterMessage) -> list[Action]:
        match message:
            case Run():
                return self._run(session, message)
            case Cancel(sequence_id, reason):
                relay = self._relays.get(sequence_id)
                return self._stop(sequence_id, reason) if relay is not None and relay.session == session else []
            case Migrate():
                return self._migrate(session, message)
            case Reserve():
                return []

    def _run(self, session: int, message: Run) -> list[Action]:
        sequence_id = message.sequence_id
        try:
            self._check_run(sequence_id, message.lease)
        except BatonError as error:
            return [Send(session, SequenceFailed(sequence_id, Failure.of(error)))]
        self._relays[sequence_id] = _Relay(session, message.lease, message.spec.num_known_tokens)
        return [message]

    def _migrate(self, session: int, message: Migrate) -> list[Action]:
        sequence_id, lease = message.sequence_id, message.lease
        relay = self._relays.get(sequence_id)
        if relay is None or relay.session != session or relay.phase is Phase.ABORTING:
            return []
        try:
            self._check_lease(sequence_id, lease)
            if relay.phase is not Phase.STAYING:
                raise Overloaded(f"{sequence_id} is {relay.phase.value} on {self._node_id}, expected one that decodes")
        except BatonError as error:
            return [Send(session, NotMigrated(sequence_id, Failure.of(error)))]
        relay.phase, relay.lease, relay.is_moving = Phase.MIGRATING, lease, True
        return [BeginMove(sequence_id, lease)]

    def _check_run(self, sequence_id: str, lease: Lease | None) -> None:
        if sequence_id in self._relays:
            raise Overloaded(f"{sequence_id} is still in use on {self._node_id}")
        if lease is not None:
            self._check_lease(sequence_id, lease)

    def _check_lease(self, sequence_id: str, lease: Lease) -> None:
        if lease.sequence_id != sequence_id:
            raise InvalidRequest(f"the lease is for {lease.sequence_id}, expected {sequence_id}", param="lease")
        if lease.node_id == self._node_id:
            message = f"the lease is on {self._node_id} itself, expected no lease: the sequence stays"
            raise InvalidRequest(message, param="lease")

    def _started(self, relay: _Relay, sequence_id: str, block_ids: tuple[int, ...]) -> list[Action]:
        if relay.phase is not Phase.QUEUED:
            return []
        assert relay.lease is not None
        relay.phase = Phase.COMPUTING
        return [BeginPush(sequence_id, relay.lease, block_ids, relay.num_known_tokens)]

    def _output(self, relay: _Relay, event: Output) -> list[Action]:
        if not relay.is_computing:
            return []
        sequence_id, is_last = event.sequence_id, event.chunk.finish_reason is not None
        relay.is_prompt = False
        actions: list[Action] = []
        if event.prefill is not None:
            times = event.prefill
            done = PrefillDone(
                sequence_id, times.queue_s, times.compute_s, times.num_computed_tokens, times.num_cached_tokens
            )  # fmt: skip
            actions.append(Send(relay.session, done))
        # Last, for it may be the end of the sequence.
        actions.append(Send(relay.session, event.chunk))
        return [*actions, *self._ended(relay, sequence_id)] if is_last else actions

    def _ended(self, relay: _Relay, sequence_id: str) -> list[Action]:
        """The token that was sent is its last."""
        match relay.phase:
            case Phase.STAYING:
                del self._relays[sequence_id]
                return []
            case Phase.RETURNING:
                return self._leave_returning(relay, sequence_id)
            case _:
                relay.phase = Phase.ABORTING
                return [AbortPush(sequence_id, "its last token ended the request")]

    def _handed_over(self, relay: _Relay, event: Handoff) -> list[Action]:
        sequence_id = event.sequence_id
        if relay.phase is Phase.RETURNING:
            relay.is_handoff_due = False
            return self._returned(relay, sequence_id)
        if relay.phase not in (Phase.COMPUTING, Phase.HOLDING):
            return []
        relay.is_handoff_due = False
        relay.phase = Phase.COMMITTING
        return [CommitPush(sequence_id, event.tokens, len(event.block_ids))]

    def _push_failed(self, relay: _Relay, sequence_id: str, failure: Failure) -> list[Action]:
        """One that was to move goes on here, any other fails. A failure of a commit may be told twice."""
        if relay.phase not in (Phase.COMPUTING, Phase.COMMITTING, Phase.MIGRATING, Phase.HOLDING):
            return []
        if not relay.is_moving:
            return self._fail(relay, sequence_id, failure)
        relay.is_handoff_due = relay.phase is Phase.HOLDING
        relay.is_abort_due = True
        relay.phase, relay.failure = Phase.RETURNING, failure
        return [AbortPush(sequence_id, failure.message)]

    def _returned(self, relay: _Relay, sequence_id: str) -> list[Action]:
        if relay.is_abort_due or relay.is_handoff_due:
            return []
        assert relay.failure is not None
        relay.phase, relay.is_moving = Phase.STAYING, False
        return [Resume(sequence_id), Send(relay.session, NotMigrated(sequence_id, relay.failure))]

    def _leave_returning(self, relay: _Relay, sequence_id: str) -> list[Action]:
        """It does not go on: its blocks wait for the abort alone."""
        if not relay.is_abort_due:
            return self._gone(sequence_id)
        relay.phase = Phase.ABORTING
        return [StopCompute(sequence_id)]

    def _gone(self, sequence_id: str) -> list[Action]:
        del self._relays[sequence_id]
        return [ReleaseBlocks(sequence_id)]

    def _committed(self, relay: _Relay, sequence_id: str, report: TransferReport) -> list[Action]:
        # Also when it was cancelled meanwhile: the acknowledgement says that no reader is left.
        del self._relays[sequence_id]
        actions: list[Action] = [ReleaseBlocks(sequence_id)]
        if relay.phase is Phase.COMMITTING:
            actions.append(Send(relay.session, HandedOff(sequence_id, report)))
        return actions

    def _fail(self, relay: _Relay, sequence_id: str, failure: Failure) -> list[Action]:
        if relay.phase is Phase.ABORTING:
            return []
        return [*self._stop(sequence_id, failure.message), Send(relay.session, SequenceFailed(sequence_id, failure))]

    def _stop(self, sequence_id: str, reason: str) -> list[Action]:
        relay = self._relays[sequence_id]
        match relay.phase:
            case Phase.QUEUED | Phase.STAYING:
                return self._gone(sequence_id)
            case Phase.RETURNING:
                return self._leave_returning(relay, sequence_id)
            case Phase.COMPUTING | Phase.MIGRATING | Phase.HOLDING:
                relay.phase = Phase.ABORTING
                return [StopCompute(sequence_id), AbortPush(sequence_id, reason)]
            case Phase.COMMITTING:
                relay.phase = Phase.ABORTING
                return [AbortPush(sequence_id, reason)]
            case Phase.ABORTING:
                return []

    def _blame(self, failure: Failure, relay: _Relay) -> Failure:
        """What went wrong on the way to decode is held against decode, our own defects are not."""
        if relay.lease is None or failure.blamed_node_id or failure.code == InternalError.__name__:
            return failure
        return replace(failure, blamed_node_id=relay.lease.node_id)
