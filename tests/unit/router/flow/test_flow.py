"""One request, step by step: events in, actions out."""

from __future__ import annotations

import pytest

from baton.node_messages import (
    Cancel,
    HandedOff,
    Joined,
    PrefillDone,
    Refused,
    Reserve,
    RouterMessage,
    Run,
    SequenceFailed,
)
from baton.observe import FailedAttempt
from baton.prefix import PrefixScheme
from baton.types import (
    Embedding,
    Failure,
    FinishReason,
    KvLayout,
    Lease,
    PositionLogprobs,
    PrefixCaching,
    PromptLogprobs,
    SamplingParams,
    SequenceSpec,
    TokenChunk,
    TokenLogprob,
    TransferReport,
)
from router.cluster.load import Placement
from router.flow import messages as f
from router.flow.config import FlowConfig
from router.flow.machine import Flow

SAMPLING = SamplingParams(max_tokens=4, seed=1, stop_token_ids=(99,))
SPLIT = Placement("p", "d")
PROMPT = f.Prompt((1, 2))
REPORT = TransferReport("shm", False, 4096, 1, 0.01, 0.005)


def begin(sampling: SamplingParams = SAMPLING, **config: float) -> Flow:
    flow = Flow(
        "r", 0, PROMPT, sampling, arrived_s=0.0, deadline_s=100.0, config=FlowConfig(**config)  # type: ignore[arg-type]
    )  # fmt: skip
    assert flow.handle(f.Begin(), 0.0) == [f.Enqueue(is_rerun=False)]
    return flow


def spec(flow: Flow, attempt: int = 0, generated: tuple[int, ...] = ()) -> SequenceSpec:
    return SequenceSpec(f"r/0/{attempt}", (1, 2), flow.sampling, generated)


def lease(attempt: int = 0) -> Lease:
    return Lease(f"r/0/{attempt}", 1, "d", 1, "a:1", (0,), 60.0)


def chunk(index: int, *ids: int, attempt: int = 0, finish: FinishReason | None = None) -> TokenChunk:
    return TokenChunk(f"r/0/{attempt}", index, ids, (), finish)


def tokens(node: str, index: int, *ids: int, attempt: int = 0, finish: FinishReason | None = None) -> f.FromNode:
    return f.FromNode(node, chunk(index, *ids, attempt=attempt, finish=finish))


def to(node_id: str, message: RouterMessage) -> f.ToNode:
    return f.ToNode(node_id, message, PROMPT)


def joined() -> f.FromNode:
    return f.FromNode("d", Joined("r/0/0", 0.1))


def handed_off(attempt: int = 0) -> f.FromNode:
    return f.FromNode("p", HandedOff(f"r/0/{attempt}", REPORT))


def failed(node: str, failure: Failure) -> f.FromNode:
    return f.FromNode(node, SequenceFailed("r/0/0", failure))


def prefilling(**config: float) -> Flow:
    flow = begin(**config)  # type: ignore[arg-type]
    flow.handle(f.Placed(SPLIT), 0.0)
    flow.handle(f.FromNode("d", lease()), 0.0)
    return flow


def finished(reason: FinishReason) -> f.End:
    return f.End(f.Outcome(f.OutcomeKind.FINISHED, reason))


def test_of_a_prompt_no_more_is_cached_than_it_has() -> None:
    """A rerun begins with the tokens so far as well, and a node may say anything."""
    flow = prefilling()
    flow.handle(tokens("p", 0, 7), 1.0)
    flow.handle(f.FromNode("p", PrefillDone("r/0/0", 0.1, 0.2, 0, 4_000_000_000)), 1.0)
    assert flow.lifeline.relay().num_cached_tokens == 2


def test_split_life() -> None:
    flow = begin()
    assert flow.handle(f.Placed(SPLIT), 1.0) == [to("d", Reserve(spec(flow), 60.0, "p"))]
    assert flow.handle(f.FromNode("d", lease()), 1.0) == [to("p", Run(spec(flow), lease()))]
    assert flow.handle(tokens("p", 0, 7), 2.0) == [chunk(0, 7)]
    assert flow.phase is f.Phase.DECODING
    assert flow.handle(joined(), 2.0) == [f.PairWorked(SPLIT)]
    assert flow.handle(tokens("d", 1, 8, 9), 3.0) == [chunk(1, 8, 9)]
    assert flow.handle(handed_off(), 3.0) == []
    last = flow.handle(tokens("d", 3, 10, finish=FinishReason.LENGTH), 4.0)
    assert last == [
        chunk(3, 10, finish=FinishReason.LENGTH),
        f.PairWorked(SPLIT),
        f.Detach("r/0/0"),
        finished(FinishReason.LENGTH),
    ]
    assert flow.handle(tokens("d", 4, 11), 5.0) == []


def settling() -> Flow:
    flow = prefilling()
    flow.handle(tokens("p", 0, 7), 1.0)
    last = chunk(1, 8, 9, 10, finish=FinishReason.LENGTH)
    assert flow.handle(f.FromNode("d", last), 1.5) == [last]
    assert flow.phase is f.Phase.SETTLING
    return flow


@pytest.mark.parametrize(
    ("event", "at_s"),
    [
        (handed_off(), 1.6),
        (f.NodeLost("p", "died"), 1.6),
        (f.ClientCancelled("client left"), 1.6),
        (f.StopText(), 1.6),
        (f.Tick(), 1.5 + FlowConfig().report_timeout_s),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_whole_answer_ends_with_the_transfer_report_or_without(event: f.Event, at_s: float) -> None:
    flow = settling()
    assert flow.handle(event, at_s) == [f.PairWorked(SPLIT), f.Detach("r/0/0"), finished(FinishReason.LENGTH)]
    relay = flow.lifeline.relay()
    assert relay.transfer == (REPORT if event == handed_off() else None)
    assert relay.e2e_s == 1.5


def test_a_stop_string_waits_for_no_report_beside_an_end_that_came_too_early() -> None:
    flow = prefilling()
    flow.handle(joined(), 0.5)
    flow.handle(tokens("p", 0, 7), 1.0)
    assert flow.handle(tokens("d", 2, 9, 10, finish=FinishReason.LENGTH), 1.5) == []
    assert flow.handle(f.StopText(), 1.6)[-1] == finished(FinishReason.STOP)
    assert flow.has_ended


def test_a_settling_answer_is_moved_by_nothing_else() -> None:
    flow = settling()
    for event in (f.NodeLost("d", "died"), f.Tick(), handed_off(attempt=1), tokens("d", 4, 11)):
        assert flow.handle(event, 1.55) == []
    assert flow.outcome == f.Outcome(f.OutcomeKind.FINISHED, FinishReason.LENGTH)


def test_first_token_that_ends_it_gives_the_lease_back() -> None:
    last = prefilling().handle(tokens("p", 0, 99, finish=FinishReason.STOP), 1.0)
    assert to("d", Cancel("r/0/0", "finished")) in last
    assert last[-1] == finished(FinishReason.STOP)


def test_decode_may_overtake_the_first_token() -> None:
    flow = prefilling()
    assert flow.handle(tokens("d", 1, 8), 1.0) == []
    assert flow.handle(tokens("p", 0, 7), 1.1) == [chunk(0, 7, 8)]


def test_hole_that_stays_is_a_failure() -> None:
    flow = prefilling()
    flow.handle(tokens("d", 1, 8), 1.0)
    actions = flow.handle(f.Tick(), flow.wake_at_s)
    assert to("d", Cancel("r/0/0", "Unavailable")) in actions
    assert actions[-1] == f.Enqueue(is_rerun=True)


def test_repeated_tokens_are_dropped_and_different_ones_a_defect() -> None:
    flow = prefilling()
    flow.handle(tokens("p", 0, 7), 1.0)
    assert flow.handle(tokens("p", 0, 7), 1.0) == []
    end = flow.handle(tokens("d", 0, 6), 1.0)[-1]
    assert isinstance(end, f.End)
    assert end.outcome.error is not None
    assert end.outcome.error.code == "InternalError"


def test_decode_lost_runs_again_from_the_tokens_so_far() -> None:
    flow = prefilling()
    flow.handle(tokens("p", 0, 7), 1.0)
    actions = flow.handle(f.NodeLost("d", "killed"), 2.0)
    assert actions == [
        to("p", Cancel("r/0/0", "NodeLost")),
        f.Detach("r/0/0"),
        f.AttemptFailed("r/0/0", FailedAttempt("p", "d", "d", "NodeLost", "node d was lost: killed", 2.0, 1.0)),
        f.Enqueue(is_rerun=True),
    ]
    assert flow.demand(2.0).avoid == {"d"}
    again = flow.handle(f.Placed(Placement("p", "p")), 2.0)
    assert again == [to("p", Run(spec(flow, 1, (7,)), None))]
    assert flow.handle(tokens("d", 1, 8), 2.0) == [], "the old attempt is history"
    assert flow.handle(tokens("p", 1, 8, attempt=1), 3.0) == [chunk(1, 8, attempt=1)]


def test_prefill_lost_after_the_handover_does_not_matter() -> None:
    flow = prefilling()
    flow.handle(tokens("p", 0, 7), 1.0)
    flow.handle(joined(), 1.0)
    assert flow.handle(f.NodeLost("p", "killed"), 2.0) == []
    assert flow.phase is f.Phase.DECODING


def test_prefill_lost_with_the_first_token_is_run_again() -> None:
    flow = prefilling()
    flow.handle(joined(), 1.0)
    assert flow.handle(f.NodeLost("p", "killed"), 2.0)[-1] == f.Enqueue(is_rerun=True)


def test_refusals_use_up_no_attempt_and_are_not_hammered() -> None:
    flow = begin()
    for i in range(6):
        flow.handle(f.Placed(SPLIT), 1.0)
        actions = flow.handle(f.FromNode("d", Refused(flow.sequence_id, Failure("NoBlocks", "full", True))), 1.0)
        assert f.NodeFull("d") in actions
        if i >= 2:
            assert f.Enqueue(is_rerun=True) not in actions, "later ones wait first"
            assert flow.handle(f.Tick(), flow.wake_at_s) == [f.Enqueue(is_rerun=True)]
    assert flow.lifeline.attempts == 1


def test_cancel_reaches_both_nodes() -> None:
    actions = prefilling().handle(f.ClientCancelled("left"), 1.0)
    assert to("p", Cancel("r/0/0", "left")) in actions
    assert to("d", Cancel("r/0/0", "left")) in actions


def test_attempts_run_out_with_the_last_failure() -> None:
    flow = begin(max_attempts=2)  # type: ignore[arg-type]
    for _ in range(2):
        flow.handle(f.Placed(SPLIT), 1.0)
        actions = flow.handle(f.NodeLost("d", "killed"), 1.0)
    assert isinstance(actions[-1], f.End)
    assert actions[-1].outcome.kind is f.OutcomeKind.FAILED
    assert "2 attempts" in str(actions[-1].outcome.error)


def test_logits_that_are_not_finite_end_the_request_at_once_and_blame_no_node() -> None:
    """Every node with these weights would compute the same, and three such requests would bar any pair."""
    flow = prefilling()
    actions = flow.handle(failed("p", Failure("BadLogits", "NaN at token 2", False)), 1.0)
    end = actions[-1]
    assert isinstance(end, f.End)
    assert end.outcome.error is not None
    assert (end.outcome.error.code, end.outcome.error.message) == ("BadLogits", "NaN at token 2")
    assert not any(isinstance(a, f.PairFailed | f.Enqueue) for a in actions)
    assert to("d", Cancel("r/0/0", "BadLogits")) in actions


def test_waiting_for_any_node_has_an_end_that_a_new_node_lifts() -> None:
    flow = begin()
    flow.handle(f.NoNodeAvailable(), 1.0)
    flow.handle(f.NoNodeAvailable(), 20.0)
    assert flow.wake_at_s == 31.0
    flow.handle(f.NodeAvailable(), 25.0)
    assert flow.wake_at_s == 100.0
    flow.handle(f.NoNodeAvailable(), 40.0)
    end = flow.handle(f.Tick(), 70.0)[-1]
    assert isinstance(end, f.End)
    assert end.outcome.error is not None
    assert end.outcome.error.code == "Unavailable"


def test_deadline_says_what_happened_before() -> None:
    flow = prefilling()
    flow.handle(f.NodeLost("d", "killed"), 2.0)
    end = flow.handle(f.Tick(), 100.0)[-1]
    assert isinstance(end, f.End)
    assert "killed" in str(end.outcome.error)


def test_asking_for_the_demand_changes_nothing() -> None:
    flow = prefilling()
    flow.handle(failed("p", Failure("TransferFailed", "broken", True, "d")), 1.0)
    avoid_s = FlowConfig().avoid_s
    assert flow.demand(1.0 + avoid_s).avoid == frozenset(), "blamed long ago"
    assert flow.demand(1.0).avoid == {"d"}


def scoring(num_prompt: int = 6) -> Flow:
    """Its prompt is being computed by the first attempt."""
    sampling = SamplingParams(max_tokens=4, seed=1, prompt_logprobs=0)
    prompt = f.Prompt(tuple(range(num_prompt)), is_scored=True)
    flow = Flow("r", 0, prompt, sampling, arrived_s=0.0, deadline_s=100.0, config=FlowConfig())
    flow.handle(f.Begin(), 0.0)
    flow.handle(f.Placed(SPLIT), 0.0)
    flow.handle(f.FromNode("d", lease()), 0.0)
    return flow


def scored(first: int, last: int, attempt: int = 0) -> PromptLogprobs:
    reports = tuple(PositionLogprobs(TokenLogprob(i, -float(i)), 1) for i in range(first, last + 1))
    return PromptLogprobs(f"r/0/{attempt}", first, reports)


def test_what_was_scored_is_delivered_once_whatever_attempt_brings_it() -> None:
    flow = scoring()
    assert flow.handle(f.FromNode("p", scored(1, 2)), 1.0) == [scored(1, 2)]
    flow.handle(f.NodeLost("p", "died"), 1.5)
    flow.handle(f.Placed(SPLIT), 2.0)
    flow.handle(f.FromNode("d", lease(1)), 2.0)
    assert flow.handle(f.FromNode("p", scored(3, 5)), 2.5) == [], "the attempt is over"
    assert flow.handle(f.FromNode("p", scored(1, 1, 1)), 3.0) == []
    assert flow.handle(f.FromNode("p", scored(2, 4, 1)), 3.0) == [scored(3, 4, 1)]
    assert flow.handle(f.FromNode("p", scored(5, 5, 1)), 3.0) == [scored(5, 5, 1)]
    assert flow.handle(tokens("p", 0, 7, attempt=1), 4.0) == [chunk(0, 7, attempt=1)]


@pytest.mark.parametrize(
    "event",
    [
        f.FromNode("p", scored(2, 3)),
        f.FromNode("p", scored(1, 6)),
        f.FromNode("p", PromptLogprobs("r/0/0", 0, scored(1, 1).logprobs)),
        tokens("p", 0, 7),
    ],
    ids=["a hole", "beyond the prompt", "the first token", "a token too early"],
)
def test_a_prompt_that_is_not_scored_as_asked_is_a_defect(event: f.FromNode) -> None:
    flow = scoring()
    *_, end = flow.handle(event, 1.0)
    assert isinstance(end, f.End)
    assert end.outcome.error is not None
    assert end.outcome.error.code == "InternalError"


def test_an_embedding_is_delivered_once_and_comes_before_a_token() -> None:
    sampling = SamplingParams(max_tokens=1, seed=1, pooling="last")
    flow = begin(sampling)
    flow.handle(f.Placed(Placement("p", "p")), 0.0)
    embedding = Embedding("r/0/0", b"\0\0\x80\x3f")
    assert flow.handle(f.FromNode("p", embedding), 1.0) == [embedding]
    assert flow.handle(f.FromNode("p", embedding), 1.0) == []
    assert flow.handle(tokens("p", 0, 7, finish=FinishReason.LENGTH), 1.0)[0] == chunk(
        0, 7, finish=FinishReason.LENGTH
    )  # fmt: skip
    hasty = begin(sampling)
    hasty.handle(f.Placed(Placement("p", "p")), 0.0)
    *_, end = hasty.handle(tokens("p", 0, 7), 1.0)
    assert isinstance(end, f.End)
    assert end.outcome.error is not None
    assert "before the prompt's embedding" in end.outcome.error.message


def test_a_prompt_that_is_scored_is_looked_for_in_no_cache() -> None:
    layout = KvLayout(1, 8, 1, 1, 4, "float32")
    scheme = PrefixScheme("f", "fake", layout, PrefixCaching(phases_agree=True))
    for is_scored, num_keys, num_choices in ((False, 2, 3), (True, 0, 1)):
        prompt = f.Prompt(tuple(range(9)), b"", 3, is_scored=is_scored)
        assert (len([*prompt.keys(scheme)]), prompt.num_choices) == (num_keys, num_choices)
