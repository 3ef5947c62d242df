"""Feed events, assert actions: every phase, with a cancel, a lost session and a death in each."""

from dataclasses import replace

import pytest

from baton.node_messages import (
    Cancel,
    Defect,
    FromRouter,
    HandedOff,
    LetGo,
    Migrate,
    NotMigrated,
    PrefillDone,
    Run,
    Send,
    SequenceFailed,
    SessionLost,
)
from baton.types import (
    Failure,
    FinishReason,
    Lease,
    PositionLogprobs,
    PromptLogprobs,
    SamplingParams,
    SequenceSpec,
    TokenChunk,
    TokenLogprob,
    TransferReport,
)
from engine.events import Failed, Handoff, Output, PrefillTimes, Started
from prefill_node.machine import (
    AbortPush,
    Action,
    BeginMove,
    BeginPush,
    CommitPush,
    Event,
    HoldCompute,
    MoveRefused,
    Phase,
    PrefillMachine,
    PushAborted,
    PushCaughtUp,
    PushCommitted,
    PushFailed,
    PushRefused,
    ReleaseBlocks,
    Resume,
    StopCompute,
    SubmitRefused,
)

SPEC = SequenceSpec("r/0/1", (1, 2, 3), SamplingParams(seed=0, max_tokens=4), (9,))
LEASE = Lease("r/0/1", 5, "d0", 77, "host:1", (0, 1), 10.0)
TIMES = PrefillTimes(0.1, 0.2, 4)
DONE = PrefillDone(SPEC.sequence_id, 0.1, 0.2, 4)
FIRST = TokenChunk("r/0/1", 1, (42,))
ENDING = TokenChunk("r/0/1", 1, (42,), finish_reason=FinishReason.STOP)
REPORT = TransferReport("shm", True, 100, 2, 0.1, 0.01)
LOST = Failure("NodeLost", "d0 is gone", retryable=True)
BLAMED = Failure("NodeLost", "d0 is gone", retryable=True, blamed_node_id="d0")
BOOM = Failure("InternalError", "boom", retryable=False)
ID = SPEC.sequence_id

RUN = FromRouter(1, Run(SPEC, LEASE))
STARTED = Started(ID, (3, 4))
TOKEN = Output(ID, FIRST, TIMES)
HANDOFF = Handoff(ID, FIRST, (3, 4))
CANCEL = FromRouter(1, Cancel(ID, "client left"))
# The way to each phase.
QUEUED: list[Event] = [RUN]
COMPUTING: list[Event] = [*QUEUED, STARTED]
COMMITTING: list[Event] = [*COMPUTING, TOKEN, HANDOFF]
ABORTING: list[Event] = [*COMPUTING, CANCEL]
STAYING: list[Event] = [FromRouter(1, Run(SPEC, None))]
MIGRATE = Migrate(ID, LEASE)
MIGRATING: list[Event] = [*STAYING, TOKEN, FromRouter(1, MIGRATE)]
HOLDING: list[Event] = [*MIGRATING, PushCaughtUp(ID)]
MOVING: list[Event] = [*HOLDING, HANDOFF]
RETURNING: list[Event] = [*MIGRATING, PushFailed(ID, LOST)]
RETURNING_HELD: list[Event] = [*HOLDING, PushFailed(ID, LOST)]
NEXT = Output(ID, TokenChunk(ID, 2, (43,)))
LAST = Output(ID, TokenChunk(ID, 2, (43,), finish_reason=FinishReason.LENGTH))
STAYS = Send(1, NotMigrated(ID, BLAMED))


def after(*events: Event) -> PrefillMachine:
    machine = PrefillMachine("p0")
    for event in events:
        machine.handle(event, 0.0)
    return machine


def test_the_whole_relay() -> None:
    machine = PrefillMachine("p0")
    assert machine.handle(RUN, 0.0) == [Run(SPEC, LEASE)]
    assert machine.handle(STARTED, 0.0) == [BeginPush(ID, LEASE, (3, 4), 4)]
    assert machine.handle(TOKEN, 0.0) == [Send(1, DONE), Send(1, FIRST)]
    assert machine.handle(HANDOFF, 0.0) == [CommitPush(ID, FIRST, 2)]
    assert machine.handle(PushCommitted(ID, REPORT), 0.0) == [ReleaseBlocks(ID), Send(1, HandedOff(ID, REPORT))]
    assert machine.num_sequences == 0


def test_the_first_token_ends_the_request_and_nothing_is_committed() -> None:
    machine = after(*COMPUTING)
    actions = machine.handle(Output(ID, ENDING, TIMES), 0.0)
    assert actions[:2] == [Send(1, DONE), Send(1, ENDING)]
    assert isinstance(actions[2], AbortPush)
    assert machine.handle(PushAborted(ID), 0.0) == [ReleaseBlocks(ID)]
    assert machine.num_sequences == 0


def test_without_a_lease_it_stays_and_decodes_to_its_end() -> None:
    machine = PrefillMachine("p0")
    assert machine.handle(FromRouter(1, Run(SPEC, None)), 0.0) == [Run(SPEC, None)]
    assert machine.handle(TOKEN, 0.0) == [Send(1, DONE), Send(1, FIRST)]
    last = TokenChunk(ID, 2, (43,), finish_reason=FinishReason.LENGTH)
    assert machine.handle(Output(ID, last), 0.0) == [Send(1, last)]
    assert machine.num_sequences == 0


@pytest.mark.parametrize("stop", [CANCEL, SessionLost(1)])
@pytest.mark.parametrize(
    ("way", "expected", "then"),
    [
        (QUEUED, [ReleaseBlocks(ID)], []),
        (STAYING, [ReleaseBlocks(ID)], []),
        ([*STAYING, TOKEN], [ReleaseBlocks(ID)], []),
        (MIGRATING, [StopCompute(ID), "abort"], [PushAborted(ID)]),
        (HOLDING, [StopCompute(ID), "abort"], [PushAborted(ID)]),
        (HOLDING, [StopCompute(ID), "abort"], [HANDOFF, PushAborted(ID)]),
        (MOVING, ["abort"], [PushAborted(ID)]),
        (MOVING, ["abort"], [PushCommitted(ID, REPORT), PushAborted(ID)]),
        (MOVING, ["abort"], [PushFailed(ID, LOST), PushAborted(ID)]),
        (RETURNING, [StopCompute(ID)], [PushAborted(ID)]),
        (RETURNING_HELD, [StopCompute(ID)], [HANDOFF, PushAborted(ID)]),
        ([*RETURNING_HELD, PushAborted(ID)], [ReleaseBlocks(ID)], []),
        ([*RETURNING, PushAborted(ID)], [ReleaseBlocks(ID)], []),
        (COMPUTING, [StopCompute(ID), "abort"], [PushAborted(ID)]),
        (COMMITTING, ["abort"], [PushAborted(ID)]),
        (COMMITTING, ["abort"], [PushCommitted(ID, REPORT)]),
        (COMMITTING, ["abort"], [PushCommitted(ID, REPORT), PushAborted(ID)]),
        (COMMITTING, ["abort"], [PushFailed(ID, LOST), PushAborted(ID)]),
        (ABORTING, [], [PushAborted(ID)]),
    ],
)
def test_cancel_in_every_phase(
    way: list[Event], expected: list[Action | str], then: list[Event], stop: FromRouter | SessionLost
) -> None:
    machine = after(*way)
    actions = machine.handle(stop, 0.0)
    assert ["abort" if isinstance(a, AbortPush) else a for a in actions] == expected
    assert machine.handle(stop, 0.0) == [], "twice is once"
    released = [a for event in then for a in machine.handle(event, 0.0)]
    assert released == ([ReleaseBlocks(ID)] if then else []), "exactly once, and the router hears nothing"
    assert machine.num_sequences == 0
    for late in (STARTED, TOKEN, PushCommitted(ID, REPORT), PushFailed(ID, LOST), PushAborted(ID), Failed(ID, BOOM)):
        assert machine.handle(late, 0.0) == []


def test_cancel_counts_only_in_the_session_that_runs_it() -> None:
    machine = after(*COMPUTING)
    assert machine.handle(FromRouter(2, Cancel(ID, "not yours")), 0.0) == []
    assert machine.handle(SessionLost(2), 0.0) == []
    assert machine.phase_of(ID) is Phase.COMPUTING


def test_a_token_after_cancel_is_not_sent_and_not_committed() -> None:
    machine = after(*ABORTING)
    assert machine.handle(TOKEN, 0.0) == []
    assert machine.phase_of(ID) is Phase.ABORTING


@pytest.mark.parametrize("way", [COMPUTING, COMMITTING])
def test_the_push_dies_and_decode_is_blamed_at_once(way: list[Event]) -> None:
    machine = after(*way)
    actions = machine.handle(PushFailed(ID, LOST), 0.0)
    assert Send(1, SequenceFailed(ID, BLAMED)) in actions
    assert any(isinstance(a, AbortPush) for a in actions)
    assert (StopCompute(ID) in actions) == (way is COMPUTING)
    assert ReleaseBlocks(ID) not in actions, "writes may still be under way"
    assert machine.handle(PushFailed(ID, LOST), 0.0) == []
    assert machine.handle(PushAborted(ID), 0.0) == [ReleaseBlocks(ID)]


def test_a_push_that_cannot_begin_has_no_reader() -> None:
    refused = Failure("Incompatible", "dtype is float32 here and bfloat16 there", retryable=False)
    actions = after(*COMPUTING).handle(PushRefused(ID, refused), 0.0)
    blamed = Failure(refused.code, refused.message, refused.retryable, "d0")
    assert actions == [ReleaseBlocks(ID), Send(1, SequenceFailed(ID, blamed))]


def test_our_own_defect_is_not_blamed_on_decode() -> None:
    assert Send(1, SequenceFailed(ID, BOOM)) in after(*COMMITTING).handle(PushFailed(ID, BOOM), 0.0)


@pytest.mark.parametrize("ended", [Failed(ID, BOOM), Defect(ID, BOOM)])
@pytest.mark.parametrize(("way", "has_push"), [(QUEUED, False), (STAYING, False), (COMPUTING, True)])
def test_the_step_fails_or_handling_it_does(way: list[Event], has_push: bool, ended: Event) -> None:
    machine = after(*way)
    actions = machine.handle(ended, 0.0)
    assert actions[-1] == Send(1, SequenceFailed(ID, BOOM))
    assert (ReleaseBlocks(ID) in actions) == (not has_push)
    if has_push:
        assert machine.handle(PushAborted(ID), 0.0) == [ReleaseBlocks(ID)]
    assert machine.num_sequences == 0


def test_the_engine_refuses() -> None:
    refused = Failure("Overloaded", "queue full", retryable=True)
    machine = after(*QUEUED)
    assert machine.handle(SubmitRefused(ID, refused), 0.0) == [Send(1, SequenceFailed(ID, refused))]
    assert machine.num_sequences == 0


def test_an_id_in_use_is_refused_and_the_first_goes_on() -> None:
    machine = after(*COMPUTING)
    (refused,) = machine.handle(FromRouter(2, Run(SPEC, LEASE)), 0.0)
    assert isinstance(refused, Send)
    assert isinstance(refused.message, SequenceFailed)
    failure = refused.message.failure
    assert (refused.session, failure.code, failure.retryable) == (2, "Overloaded", True)
    assert machine.phase_of(ID) is Phase.COMPUTING


@pytest.mark.parametrize(
    "lease", [Lease("other", 5, "d0", 7, "h:1", (0, 1), 1.0), Lease(ID, 5, "p0", 7, "h:1", (0, 1), 1.0)]
)
def test_a_lease_that_makes_no_sense_is_refused(lease: Lease) -> None:
    machine = PrefillMachine("p0")
    (refused,) = machine.handle(FromRouter(1, Run(SPEC, lease)), 0.0)
    assert isinstance(refused, Send)
    assert isinstance(refused.message, SequenceFailed)
    assert refused.message.failure.code == "InvalidRequest"
    assert machine.num_sequences == 0


@pytest.mark.parametrize("way", [[*STAYING, TOKEN], [TOKEN]])
def test_a_move_pushes_while_tokens_go_on_then_stops_it_and_hands_it_over(way: list[Event]) -> None:
    """Of a sequence that stays here, and of one that decode lets go of."""
    came_with_transfer = way == [TOKEN]
    machine = after(*way)
    asked = LetGo(1, MIGRATE) if came_with_transfer else FromRouter(1, MIGRATE)
    assert machine.handle(asked, 0.0) == [BeginMove(ID, LEASE)]
    assert machine.handle(NEXT, 0.0) == [Send(1, NEXT.chunk)]
    assert machine.handle(PushCaughtUp(ID), 0.0) == [HoldCompute(ID)]
    assert machine.handle(PushCaughtUp(ID), 0.0) == []
    assert machine.handle(NEXT, 0.0) == [Send(1, NEXT.chunk)], "a step that was under way"
    assert machine.handle(HANDOFF, 0.0) == [CommitPush(ID, FIRST, 2)]
    assert machine.handle(PushCommitted(ID, REPORT), 0.0) == [ReleaseBlocks(ID), Send(1, HandedOff(ID, REPORT))]
    assert machine.num_sequences == 0


@pytest.mark.parametrize(
    ("way", "then"),
    [
        (MIGRATING, [PushAborted(ID)]),
        (HOLDING, [PushAborted(ID), HANDOFF]),
        (HOLDING, [HANDOFF, PushAborted(ID)]),
        (HOLDING, [NEXT, HANDOFF, PushAborted(ID)]),
        (MOVING, [PushAborted(ID)]),
    ],
)
def test_a_move_that_breaks_leaves_it_running_here(way: list[Event], then: list[Event]) -> None:
    machine = after(*way)
    (abort,) = machine.handle(PushFailed(ID, LOST), 0.0)
    assert isinstance(abort, AbortPush)
    *before, last = then
    for event in before:
        assert machine.handle(event, 0.0) == ([Send(1, event.chunk)] if isinstance(event, Output) else [])
    assert machine.handle(last, 0.0) == [Resume(ID), STAYS], "not before nothing reads it, and the engine has stopped"
    assert machine.handle(NEXT, 0.0) == [Send(1, NEXT.chunk)]
    assert machine.handle(PushFailed(ID, LOST), 0.0) == [], "late"
    assert machine.handle(FromRouter(1, MIGRATE), 0.0) == [BeginMove(ID, LEASE)], "it may be tried again"


@pytest.mark.parametrize("way", [MIGRATING, HOLDING, RETURNING, RETURNING_HELD])
def test_it_ends_in_the_middle_of_a_move(way: list[Event]) -> None:
    machine = after(*way)
    actions = machine.handle(LAST, 0.0)
    assert actions[0] == Send(1, LAST.chunk)
    assert machine.handle(PushAborted(ID), 0.0) == [ReleaseBlocks(ID)]
    assert machine.num_sequences == 0


def test_it_ends_when_only_its_stop_was_awaited() -> None:
    machine = after(*RETURNING_HELD, PushAborted(ID))
    assert machine.handle(LAST, 0.0) == [Send(1, LAST.chunk), ReleaseBlocks(ID)]


def test_a_move_that_cannot_begin_changes_nothing() -> None:
    machine = after(*MIGRATING)
    full = Failure("Overloaded", "preempted", retryable=True)
    assert machine.handle(MoveRefused(ID, full), 0.0) == [Send(1, NotMigrated(ID, replace(full, blamed_node_id="d0")))]
    assert machine.phase_of(ID) is Phase.STAYING


@pytest.mark.parametrize(("way", "is_moving"), [(QUEUED, False), (COMPUTING, False), (MIGRATING, True), (MOVING, True)])
def test_one_that_does_not_decode_or_moves_already_is_not_moved(way: list[Event], is_moving: bool) -> None:
    machine = after(*way)
    phase = machine.phase_of(ID)
    (refused,) = machine.handle(FromRouter(1, MIGRATE), 0.0)
    assert isinstance(refused, Send)
    assert isinstance(refused.message, NotMigrated)
    assert refused.message.failure.code == "Overloaded"
    assert machine.phase_of(ID) is phase
    assert machine.handle(FromRouter(2, MIGRATE), 0.0) == [], "not this router's"


@pytest.mark.parametrize(
    "lease", [Lease("other", 5, "d0", 7, "h:1", (0, 1), 1.0), Lease(ID, 5, "p0", 7, "h:1", (0, 1), 1.0)]
)
def test_a_move_into_a_lease_that_makes_no_sense_is_refused(lease: Lease) -> None:
    machine = after(*STAYING, TOKEN)
    (refused,) = machine.handle(FromRouter(1, Migrate(ID, lease)), 0.0)
    assert isinstance(refused, Send)
    assert isinstance(refused.message, NotMigrated)
    assert refused.message.failure.code == "InvalidRequest"
    assert machine.phase_of(ID) is Phase.STAYING


def test_the_engine_fails_in_the_middle_of_a_move() -> None:
    for way in (MIGRATING, HOLDING, MOVING, RETURNING, RETURNING_HELD):
        machine = after(*way)
        assert Send(1, SequenceFailed(ID, BOOM)) in machine.handle(Failed(ID, BOOM), 0.0)
        assert machine.handle(PushAborted(ID), 0.0) == [ReleaseBlocks(ID)]
        assert machine.num_sequences == 0


@pytest.mark.parametrize("lease", [LEASE, None])
def test_what_was_scored_of_the_prompt_is_sent_while_the_sequence_is_computed(lease: Lease | None) -> None:
    scored = PromptLogprobs(ID, 1, (PositionLogprobs(TokenLogprob(2, -0.5), 3),))
    machine = PrefillMachine("p0")
    machine.handle(FromRouter(1, Run(SPEC, lease)), 0.0)
    if lease is not None:
        machine.handle(STARTED, 0.0)
    assert machine.handle(scored, 0.0) == [Send(1, scored)]
    machine.handle(FromRouter(1, Cancel(ID, "the client left")), 0.0)
    assert machine.handle(scored, 0.0) == []
