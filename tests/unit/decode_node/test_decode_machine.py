"""Feed events, assert actions: every phase, with a cancel, a lost session and a death in each."""

import pytest

from baton.node_messages import (
    Cancel,
    FromRouter,
    Joined,
    Refused,
    Reserve,
    Send,
    SequenceFailed,
    SessionLost,
)
from baton.types import Failure, FinishReason, Lease, SamplingParams, SequenceSpec, TokenChunk
from decode_node.machine import (
    Action,
    DecodeMachine,
    Event,
    Expect,
    GrantRefused,
    Join,
    JoinRefused,
    Phase,
    Quarantine,
    RejectArrival,
    ReturnBlocks,
    RevokeLease,
    StopCompute,
)
from engine.events import Failed, Output
from kvtransfer.protocol.receiver_events import Arrived, Quarantined, Released, WriterBegan

SPEC = SequenceSpec("r/0/1", (1, 2, 3), SamplingParams(seed=0, max_tokens=4))
ID = SPEC.sequence_id
LEASE = Lease(ID, 5, "d0", 77, "host:1", (0, 1), 10.0)
FIRST = TokenChunk(ID, 0, (42,))
SECOND = TokenChunk(ID, 1, (43,))
LAST = TokenChunk(ID, 2, (44,), finish_reason=FinishReason.LENGTH)
BOOM = Failure("InternalError", "boom", retryable=False)

ASK = FromRouter(1, Reserve(SPEC, 10.0, "p0"))
ARRIVED = Arrived(ID, 5, FIRST)
CANCEL = FromRouter(1, Cancel(ID, "client left"))
LEASED: list[Event] = [ASK, LEASE]
RUNNING: list[Event] = [*LEASED, ARRIVED]
ENDING: list[Event] = [*LEASED, CANCEL]


def after(*events: Event) -> DecodeMachine:
    machine = DecodeMachine("d0")
    for event in events:
        machine.handle(event, 0.0)
    return machine


def failure_in(action: Action, kind: type[Refused | SequenceFailed] = SequenceFailed) -> Failure:
    assert isinstance(action, Send)
    assert isinstance(action.message, kind)
    return action.message.failure


def test_the_whole_relay() -> None:
    machine = DecodeMachine("d0")
    assert machine.handle(ASK, 1.0) == [ASK.message]
    assert machine.handle(LEASE, 1.0) == [Send(1, LEASE)]
    assert machine.handle(ARRIVED, 3.5) == [Join(ID, FIRST), Send(1, Joined(ID, 2.5))]
    assert machine.handle(Output(ID, SECOND), 4.0) == [Send(1, SECOND)]
    assert machine.handle(Output(ID, LAST), 5.0) == [Send(1, LAST)]
    assert machine.num_sequences == 0


@pytest.mark.parametrize("stop", [CANCEL, SessionLost(1)])
@pytest.mark.parametrize(
    ("way", "expected", "then"),
    [
        (LEASED, "revoke", [Released(ID, 5, "revoked")]),
        (LEASED, "revoke", [Quarantined(ID, 5, "revoked"), Released(ID, 5, "revoked")]),
        ([*LEASED, Quarantined(ID, 5, "expired")], "nothing", [Released(ID, 5, "expired")]),
        (RUNNING, "stop", []),
        ([*RUNNING, Output(ID, SECOND)], "stop", []),
        (ENDING, "nothing", [Released(ID, 5, "revoked")]),
    ],
)
def test_cancel_in_every_phase(
    way: list[Event], expected: str, then: list[Event], stop: FromRouter | SessionLost
) -> None:
    machine = after(*way)
    actions = machine.handle(stop, 1.0)
    assert [type(a) for a in actions] == {"revoke": [RevokeLease], "stop": [StopCompute], "nothing": []}[expected]
    assert machine.handle(stop, 1.0) == [], "twice is once"
    told = [a for event in then for a in machine.handle(event, 2.0)]
    assert [a for a in told if not isinstance(a, Quarantine)] == ([ReturnBlocks(ID)] if then else [])
    assert machine.num_sequences == 0
    for late in (Output(ID, SECOND), Failed(ID, BOOM), Quarantined(ID, 5, "x"), Released(ID, 5, "x"), CANCEL):
        assert machine.handle(late, 3.0) == []


@pytest.mark.parametrize("way", [[], ENDING, RUNNING])
def test_what_nobody_waits_for_is_not_acknowledged(way: list[Event]) -> None:
    (action,) = after(*way).handle(ARRIVED, 1.0)
    assert isinstance(action, RejectArrival)


@pytest.mark.parametrize(("way", "actions"), [(LEASED, [Expect(ID)]), (RUNNING, []), (ENDING, []), ([], [])])
def test_the_engine_hears_when_a_leased_sequence_is_on_its_way(way: list[Event], actions: list[Action]) -> None:
    assert after(*way).handle(WriterBegan(ID, 5), 1.0) == actions


def test_a_lease_that_expires_is_told_at_once_and_returned_when_no_writer_is_left() -> None:
    machine = after(*LEASED)
    quarantine, failed = machine.handle(Quarantined(ID, 5, "lease expired"), 10.0)
    assert quarantine == Quarantine(ID)
    failure = failure_in(failed)
    assert (failure.code, failure.retryable) == ("TransferFailed", True)
    assert failure.blamed_node_id == "p0"
    assert "lease expired" in failure.message
    assert machine.handle(Released(ID, 5, "lease expired"), 11.0) == [ReturnBlocks(ID)]


def test_a_lease_whose_writer_is_gone_is_returned_and_told() -> None:
    actions = after(*LEASED).handle(Released(ID, 5, "channel lost"), 10.0)
    assert actions[0] == ReturnBlocks(ID)
    assert failure_in(actions[1]).code == "TransferFailed"


def test_a_lease_that_prefill_gives_back_is_for_prefill_to_tell() -> None:
    assert after(*LEASED).handle(Released(ID, 5, "the first token was the last", True), 10.0) == [ReturnBlocks(ID)]
    machine = after(*LEASED)
    assert machine.handle(Quarantined(ID, 5, "what failed there", True), 10.0) == [Quarantine(ID)]
    assert machine.handle(Released(ID, 5, "what failed there", True), 11.0) == [ReturnBlocks(ID)]
    assert machine.num_sequences == 0


def test_the_engine_refuses_what_arrived() -> None:
    machine = after(*RUNNING)
    refused = Failure("InvalidRequest", "wrong token", retryable=False)
    assert machine.handle(JoinRefused(ID, refused), 1.0) == [Send(1, SequenceFailed(ID, refused))]
    assert machine.handle(Released(ID, 5, "refused"), 1.0) == [ReturnBlocks(ID)]
    assert machine.num_sequences == 0


def test_a_failed_step_is_told() -> None:
    machine = after(*RUNNING)
    assert machine.handle(Failed(ID, BOOM), 1.0) == [Send(1, SequenceFailed(ID, BOOM))]
    assert machine.num_sequences == 0


def test_no_blocks_is_a_refusal_and_leaves_nothing() -> None:
    machine = after(ASK)
    refused = Failure("NoBlocks", "none free", retryable=True)
    assert machine.handle(GrantRefused(ID, refused), 0.0) == [Send(1, Refused(ID, refused))]
    assert machine.num_sequences == 0


def test_an_id_in_use_and_a_prefill_on_the_same_node_are_refused() -> None:
    machine = after(*RUNNING)
    (refused,) = machine.handle(FromRouter(2, Reserve(SPEC, 1.0, "p1")), 0.0)
    assert isinstance(refused, Send)
    assert (refused.session, failure_in(refused, Refused).code) == (2, "Overloaded")
    assert machine.phase_of(ID) is Phase.RUNNING
    (same,) = DecodeMachine("d0").handle(FromRouter(1, Reserve(SPEC, 1.0, "d0")), 0.0)
    assert failure_in(same, Refused).code == "InvalidRequest"


def test_sessions_do_not_reach_into_each_other() -> None:
    machine = after(*RUNNING)
    actions: list[Action] = machine.handle(SessionLost(2), 0.0) + machine.handle(FromRouter(2, Cancel(ID, "")), 0.0)
    assert actions == []
    assert machine.phase_of(ID) is Phase.RUNNING
