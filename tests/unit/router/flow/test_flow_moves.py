"""Moves in a flow: every order of what source and target say, of tokens, cancels and deaths."""

from __future__ import annotations

import pytest

from baton.node_messages import (
    Cancel,
    HandedOff,
    Joined,
    Migrate,
    NotMigrated,
    Refused,
    Reserve,
    RouterMessage,
    SequenceFailed,
)
from baton.types import Failure, FinishReason, Lease, SamplingParams, SequenceSpec, TokenChunk, TransferReport
from router.cluster.load import Placement
from router.cluster.rebalance import MoveReason
from router.flow import messages as f
from router.flow.config import FlowConfig
from router.flow.machine import Flow
from router.flow.move import MoveOutcome

SAMPLING = SamplingParams(max_tokens=9, seed=1, stop_token_ids=(99,))
PROMPT = f.Prompt((1, 2))
REPORT = TransferReport("shm", True, 4096, 1, 0.01, 0.005)
ID = "r/0/0"
LEASE = Lease(ID, 7, "t", 1, "t:1", (0,), 60.0)
MOVE = f.MoveTo("t", MoveReason.DRAIN, 20)
FULL = Failure("NoBlocks", "full", True)
GONE = Failure("NodeLost", "t is gone", True)
BOOM = Failure("InternalError", "boom", False)
OUTCOME = {outcome: f.MoveOver("s", "t", MoveReason.DRAIN, outcome) for outcome in MoveOutcome}


def to(node_id: str, message: RouterMessage) -> f.ToNode:
    return f.ToNode(node_id, message, PROMPT)


def tokens(node: str, index: int, *ids: int, finish: FinishReason | None = None) -> f.FromNode:
    return f.FromNode(node, TokenChunk(ID, index, ids, (), finish))


LEASED = f.FromNode("t", LEASE)
JOINED = f.FromNode("t", Joined(ID, 0.1))
HANDED_OFF = f.FromNode("s", HandedOff(ID, REPORT))
NOT_MIGRATED = f.FromNode("s", NotMigrated(ID, GONE))
SOURCE_LOST, TARGET_LOST = f.NodeLost("s", "killed"), f.NodeLost("t", "killed")


def decoding(source: str = "s") -> Flow:
    """Three tokens are here; it came to its source with a transfer, or stayed there."""
    flow = Flow("r", 0, PROMPT, SAMPLING, arrived_s=0.0, deadline_s=1000.0, config=FlowConfig())
    flow.handle(f.Begin(), 0.0)
    if source == "s":
        flow.handle(f.Placed(Placement("p", "s")), 0.0)
        flow.handle(f.FromNode("s", Lease(ID, 1, "s", 1, "a:1", (0,), 60.0)), 0.0)
        flow.handle(tokens("p", 0, 10), 1.0)
        flow.handle(f.FromNode("s", Joined(ID, 0.1)), 1.0)
        flow.handle(f.FromNode("p", HandedOff(ID, REPORT)), 1.0)
    else:
        flow.handle(f.Placed(Placement("s", "s")), 0.0)
        flow.handle(tokens("s", 0, 10), 1.0)
    flow.handle(tokens("s", 1, 11, 12), 1.0)
    assert flow.can_move
    return flow


def sent(source: str = "s") -> Flow:
    flow = decoding(source)
    flow.handle(MOVE, 2.0)
    flow.handle(LEASED, 2.0)
    return flow


def feed(flow: Flow, *events: f.Event, now: float = 3.0) -> list[f.Action]:
    return [action for event in events for action in flow.handle(event, now)]


def cancels(actions: list[f.Action]) -> set[str]:
    return {a.node_id for a in actions if isinstance(a, f.ToNode) and isinstance(a.message, Cancel)}


def overs(actions: list[f.Action]) -> list[MoveOutcome]:
    return [a.outcome for a in actions if isinstance(a, f.MoveOver)]


def new_ids(actions: list[f.Action]) -> list[int]:
    return [i for a in actions if isinstance(a, TokenChunk) for i in a.token_ids]


def ends(flow: Flow, node: str, index: int) -> None:
    """It goes on there to its end, and its end is that of the flow."""
    ids = tuple(10 + i for i in range(index, 9))
    actions = feed(flow, tokens(node, index, *ids, finish=FinishReason.LENGTH))
    assert new_ids(actions) == list(ids)
    if not flow.has_ended:
        # The report of a transfer is waited for.
        actions = feed(flow, f.Tick(), now=100.0)
    assert actions[-1] == f.End(f.Outcome(f.OutcomeKind.FINISHED, FinishReason.LENGTH))
    assert len(flow.tokens) == 9


@pytest.mark.parametrize("source", ["s", "stays"])
def test_the_whole_move(source: str) -> None:
    flow = decoding(source)
    spec = SequenceSpec(ID, (1, 2), SAMPLING, (10, 11))
    assert feed(flow, MOVE) == [to("t", Reserve(spec, 60.0, "s", 20))], "all but the newest token is known there"
    assert not flow.can_move
    assert feed(flow, LEASED) == [to("s", Migrate(ID, LEASE))]
    assert new_ids(feed(flow, tokens("s", 3, 13))) == [13], "it goes on meanwhile"
    assert feed(flow, JOINED) == [OUTCOME[MoveOutcome.MOVED]]
    assert flow.placement == Placement("t", "t")
    assert feed(flow, HANDED_OFF) == []
    feed(flow, tokens("t", 4, 14), now=3.5)
    assert flow.can_move
    (move,) = flow.lifeline.relay().moves
    assert (move.source_node_id, move.target_node_id, move.reason, move.num_bytes) == ("s", "t", "drain", 4096)
    assert move.pause_s == 0.5
    ends(flow, "t", 5)


@pytest.mark.parametrize(
    ("events", "outcome", "to_cancel"),
    [
        # The target refuses, is lost, or does not answer: the source was told nothing.
        ([f.FromNode("t", Refused(ID, FULL))], MoveOutcome.REFUSED, {"t"}),
        ([TARGET_LOST], MoveOutcome.REFUSED, set()),
        ([f.Tick()], MoveOutcome.REFUSED, {"t"}),
        # The source could not move it.
        ([LEASED, NOT_MIGRATED], MoveOutcome.FAILED, {"t"}),
        ([LEASED, TARGET_LOST, NOT_MIGRATED], MoveOutcome.FAILED, set()),
        ([LEASED, f.FromNode("t", SequenceFailed(ID, GONE)), NOT_MIGRATED], MoveOutcome.FAILED, {"t"}),
    ],
)
@pytest.mark.parametrize("source", ["s", "stays"])
def test_a_move_that_does_not_come_about_leaves_it_where_it_was(
    source: str, events: list[f.Event], outcome: MoveOutcome, to_cancel: set[str]
) -> None:
    flow = decoding(source)
    before = flow.placement
    feed(flow, MOVE)
    actions = feed(flow, *events, now=10.0)
    assert overs(actions) == [outcome]
    assert cancels(actions) == to_cancel
    assert flow.placement == before
    assert flow.sequence_id == ID
    # Whatever still comes from the target means nothing.
    late = [LEASED, JOINED, tokens("t", 3, 13, 14), f.FromNode("t", SequenceFailed(ID, GONE)), TARGET_LOST]
    assert feed(flow, *late) == []
    assert flow.can_move, "it may be tried again"
    ends(flow, "s", 3)


@pytest.mark.parametrize(
    "order",
    [
        [JOINED, HANDED_OFF],
        [HANDED_OFF, JOINED],
        [tokens("t", 3, 13), JOINED, HANDED_OFF],
        [JOINED, tokens("t", 3, 13), HANDED_OFF],
        [HANDED_OFF, tokens("t", 3, 13), JOINED],
    ],
)
def test_the_target_has_it_however_that_is_heard(order: list[f.Event]) -> None:
    flow = sent()
    actions = feed(flow, *order)
    assert overs(actions) == [MoveOutcome.MOVED]
    assert cancels(actions) == set()
    assert flow.placement == Placement("t", "t")
    assert flow.lifeline.relay().moves[0].num_bytes == 4096
    ends(flow, "t", len(flow.tokens))


def test_an_acknowledgement_is_lost_and_both_run_it_the_target_wins() -> None:
    flow = sent()
    feed(flow, JOINED)
    # The source went on, and its tokens are the same.
    assert new_ids(feed(flow, tokens("s", 3, 13, 14), tokens("t", 3, 13, 14))) == [13, 14]
    assert cancels(feed(flow, NOT_MIGRATED)) == {"s"}
    assert feed(flow, tokens("s", 5, 15)) == [], "late"
    ends(flow, "t", 5)


def test_both_run_it_and_the_source_ends_it_first() -> None:
    flow = sent()
    feed(flow, JOINED)
    ids = tuple(10 + i for i in range(3, 9))
    actions = feed(flow, tokens("s", 3, *ids, finish=FinishReason.LENGTH))
    if not flow.has_ended:
        actions += feed(flow, f.Tick(), now=100.0)
    assert flow.has_ended
    assert "t" in cancels(actions)


def test_both_run_it_and_the_source_wins_if_it_is_heard_first() -> None:
    flow = sent()
    assert cancels(feed(flow, NOT_MIGRATED)) == {"t"}
    assert feed(flow, JOINED, tokens("t", 3, 13)) == []
    ends(flow, "s", 3)


def test_tokens_of_the_source_that_come_after_those_of_the_target() -> None:
    flow = sent()
    assert new_ids(feed(flow, JOINED, tokens("t", 5, 15, 16))) == [], "there is a hole"
    assert new_ids(feed(flow, tokens("s", 3, 13, 14))) == [13, 14, 15, 16]
    assert feed(flow, HANDED_OFF) == []
    ends(flow, "t", 7)


def test_a_hole_that_a_dead_source_left_is_computed_again() -> None:
    flow = sent()
    feed(flow, JOINED, SOURCE_LOST, tokens("t", 5, 15))
    actions = feed(flow, f.Tick(), now=50.0)
    assert f.Enqueue(is_rerun=True) in actions
    assert cancels(actions) == {"t"}


def test_the_source_dies_after_the_target_has_it() -> None:
    flow = sent()
    assert overs(feed(flow, JOINED, SOURCE_LOST)) == [MoveOutcome.MOVED]
    assert flow.can_move
    ends(flow, "t", 3)


@pytest.mark.parametrize("way", [[], [LEASED]])
def test_the_source_dies_before_the_target_has_it(way: list[f.Event]) -> None:
    flow = decoding()
    feed(flow, MOVE, *way)
    actions = feed(flow, SOURCE_LOST)
    assert f.Enqueue(is_rerun=True) in actions
    assert overs(actions) == [MoveOutcome.ENDED]
    assert cancels(actions) >= {"t"}
    assert flow.sequence_id == "r/0/1"


@pytest.mark.parametrize(
    "events",
    [
        [TARGET_LOST, HANDED_OFF],
        [JOINED, TARGET_LOST],
        [HANDED_OFF, TARGET_LOST],
        [JOINED, HANDED_OFF, TARGET_LOST],
    ],
)
def test_the_target_dies_with_it(events: list[f.Event]) -> None:
    flow = sent()
    actions = feed(flow, *events)
    assert f.Enqueue(is_rerun=True) in actions
    assert overs(actions) == [MoveOutcome.MOVED]
    assert "t" not in cancels(actions)
    if HANDED_OFF not in events:
        assert "s" in cancels(actions), "it may have gone on"


def test_the_target_fails_it_when_it_has_it() -> None:
    flow = sent()
    actions = feed(flow, JOINED, f.FromNode("t", SequenceFailed(ID, BOOM)))
    assert f.Enqueue(is_rerun=True) in actions
    assert cancels(actions) >= {"s", "t"}


@pytest.mark.parametrize("phase", ["asked", "sent", "leaving"])
@pytest.mark.parametrize(
    "event",
    [
        f.ClientCancelled("left"),
        f.StopText(),
        f.MakeRoom(),
        tokens("s", 3, 13, 99, finish=FinishReason.STOP),
        f.FromNode("s", SequenceFailed(ID, BOOM)),
    ],
)
def test_its_end_in_every_phase(phase: str, event: f.Event) -> None:
    flow = decoding()
    way = {"asked": [MOVE], "sent": [MOVE, LEASED], "leaving": [MOVE, LEASED, JOINED]}[phase]
    actions = feed(flow, *way, event)
    is_failure = isinstance(event, f.FromNode) and isinstance(event.message, SequenceFailed)
    if is_failure and phase == "leaving":
        # The source has let go, whatever else it says.
        assert cancels(actions) == set()
        ends(flow, "t", 3)
        return
    if flow.phase is f.Phase.SETTLING:
        actions += feed(flow, f.Tick(), now=100.0)
    assert cancels(actions) >= {"t"}, "nothing stays behind at the target"
    if isinstance(event, f.ClientCancelled | f.StopText | f.MakeRoom):
        assert cancels(actions) >= {"s"}
    assert overs(actions) == [MoveOutcome.MOVED if phase == "leaving" else MoveOutcome.ENDED]


def test_the_source_never_says_what_became_of_it() -> None:
    flow = sent()
    assert flow.wake_at_s <= 2.0 + 60.0 + FlowConfig().move_answer_s
    feed(flow, tokens("s", 3, 13), now=100.0)
    actions = feed(flow, f.Tick(), now=108.0)
    assert f.Enqueue(is_rerun=True) in actions
    assert cancels(actions) >= {"s", "t"}


def test_a_source_that_says_nothing_once_the_target_has_it_is_told_to_stop() -> None:
    flow = sent()
    feed(flow, JOINED)
    feed(flow, tokens("t", 3, 13), now=45.0)
    assert cancels(feed(flow, f.Tick(), now=49.0)) == {"s"}
    assert flow.can_move


@pytest.mark.parametrize("why", ["too early", "not joined", "a hole", "the last token is drawn", "to itself", "moving"])
def test_what_cannot_move_now_is_left_alone(why: str) -> None:
    flow = decoding()
    if why == "too early":
        flow = Flow("r", 0, PROMPT, SAMPLING, arrived_s=0.0, deadline_s=1000.0, config=FlowConfig())
        feed(flow, f.Begin(), f.Placed(Placement("p", "s")))
    elif why == "not joined":
        flow = Flow("r", 0, PROMPT, SAMPLING, arrived_s=0.0, deadline_s=1000.0, config=FlowConfig())
        feed(flow, f.Begin(), f.Placed(Placement("p", "s")), f.FromNode("s", LEASE), tokens("p", 0, 10))
    elif why == "a hole":
        feed(flow, tokens("s", 5, 15))
    elif why == "the last token is drawn":
        feed(flow, tokens("s", 3, 13, 14, 15, 16, 17))
    elif why == "moving":
        feed(flow, MOVE)
    target = "s" if why == "to itself" else "u"
    assert flow.handle(f.MoveTo(target, MoveReason.DRAIN, 1), 3.0) == []
    assert why == "to itself" or not flow.can_move
