from collections.abc import Sequence as Seq

import numpy as np
import pytest

from baton.errors import BadConfig, BadLogits, InternalError, InvalidRequest, NoBlocks, Overloaded, PromptTooLong
from baton.types import (
    Embedding,
    FinishReason,
    PositionLogprobs,
    PromptLogprobs,
    SamplingParams,
    SequenceSpec,
    TokenChunk,
    TokenLogprob,
)
from engine.blocks import BlockPool, BlockState
from engine.events import EngineEvent, Failed, Handoff, Output, Started
from engine.schedule import Reserved, Scheduler, final_blocks
from engine.scheduler_config import SchedulerConfig
from engine.step import Piece, Sequence, StepPlan, StepResult


def spec(
    name: str,
    num_prompt: int,
    max_tokens: int = 8,
    generated: tuple[int, ...] = (),
    stop: tuple[int, ...] = (),
    min_tokens: int = 0,
) -> SequenceSpec:
    sampling = SamplingParams(
        temperature=0.0, seed=0, max_tokens=max_tokens, stop_token_ids=stop, min_tokens=min_tokens
    )
    return SequenceSpec(name, tuple(range(100, 100 + num_prompt)), sampling, generated)


def scheduler(num_blocks: int = 64, **settings: int | float) -> Scheduler:
    defaults: dict[str, int | float] = {
        "block_tokens": 4,
        "max_batch_tokens": 16,
        "max_num_seqs": 8,
        "max_model_tokens": 256,
        "watermark": 0.0,
    }
    return Scheduler(SchedulerConfig(**{**defaults, **settings}), BlockPool(num_blocks))  # type: ignore[arg-type]


def shape(plan: StepPlan | None) -> list[tuple[str, int, int, bool]]:
    assert plan is not None
    return [(p.sequence.sequence_id, p.start, p.num_tokens, p.samples) for p in plan.pieces]


def drawn(plan: StepPlan, token: int = 1) -> StepResult:
    return StepResult({p.sequence.sequence_id: chunk_of(p, (token,)) for p in plan.pieces if p.samples})


def chunk_of(piece: Piece, token_ids: tuple[int, ...]) -> TokenChunk:
    return TokenChunk(piece.sequence.sequence_id, piece.sequence.num_generated, token_ids)


def step(s: Scheduler, token: int = 1) -> tuple[list[tuple[str, int, int, bool]], list[EngineEvent]]:
    plan, started = s.schedule(0.0)
    if plan is None:
        return [], started
    told = shape(plan)
    events = started + s.apply(plan, drawn(plan, token), 0.0)
    s.check()
    return told, events


def test_a_prompt_runs_in_chunks_that_end_on_block_boundaries_then_decodes() -> None:
    s = scheduler()
    s.add(spec("a", 21, max_tokens=3), hands_off=False, now=0.0)
    assert step(s)[0] == [("a", 0, 16, False)]
    told, (output,) = step(s, token=7)
    assert told == [("a", 16, 5, True)]
    assert isinstance(output, Output)
    assert output.chunk == TokenChunk("a", 0, (7,))
    assert output.prefill is not None
    assert output.prefill.num_computed_tokens == 21
    assert step(s)[0] == [("a", 21, 1, True)]
    told, (output,) = step(s)
    assert told == [("a", 22, 1, True)]
    assert isinstance(output, Output)
    assert output.chunk.finish_reason is FinishReason.LENGTH
    assert output.prefill is None
    assert s.pool.num_free == 64
    assert s.num_sequences == 0
    assert s.take_gone() == ["a"]


def launch(s: Scheduler) -> StepPlan:
    plan, _ = s.schedule(0.0)
    assert plan is not None
    return plan


def land(s: Scheduler, plan: StepPlan, token: int = 1) -> list[EngineEvent]:
    events = s.apply(plan, drawn(plan, token), 0.0)
    s.check()
    return events


def test_a_step_is_planned_over_tokens_that_are_being_drawn() -> None:
    s = scheduler()
    s.add(spec("a", 21, max_tokens=3), hands_off=False, now=0.0)
    first, second = launch(s), launch(s)
    assert shape(first) == [("a", 0, 16, False)]
    assert shape(second) == [("a", 16, 5, True)]
    assert not second.pieces[0].token_is_on_device
    land(s, first)
    third = launch(s)
    assert shape(third) == [("a", 21, 1, True)]
    assert third.pieces[0].token_is_on_device
    (output,) = land(s, second, 7)
    assert isinstance(output, Output)
    assert (output.chunk.token_ids, output.prefill is None) == ((7,), False)
    assert not third.pieces[0].token_is_on_device
    # The third token is the last whatever the second one is.
    fourth = launch(s)
    assert shape(fourth) == [("a", 22, 1, True)]
    land(s, third)
    assert s.schedule(0.0) == (None, [])
    (output,) = land(s, fourth)
    assert isinstance(output, Output)
    assert output.chunk.finish_reason is FinishReason.LENGTH
    assert (s.pool.num_free, s.num_sequences) == (64, 0)


@pytest.mark.parametrize("how", ["stop", "cancel", "fail"])
def test_who_has_ended_is_dropped_from_the_step_that_did_not_wait(how: str) -> None:
    s = scheduler()
    s.add(spec("a", 4, stop=(9,)), hands_off=False, now=0.0)
    s.add(spec("b", 4), hands_off=False, now=0.0)
    first, second = launch(s), launch(s)
    assert s.pool.num_held == 4
    if how == "cancel":
        s.cancel("a", 0.0)
    events = s.fail(first, InternalError("boom"), 0.0) if how == "fail" else land(s, first, 9)
    assert len(events) == (1 if how == "cancel" else 2)
    # Its blocks stay until the second step is over; no sequence gets them before.
    assert s._entries["a"].num_flights == 1
    assert s.pool.num_held == 4
    third, _ = s.schedule(0.0)
    assert (third is None) == (how == "fail")
    events = land(s, second)
    assert [e.sequence_id for e in events] == ([] if how == "fail" else ["b"])
    assert "a" not in s.pool
    assert s.take_gone() == (["a", "b"] if how == "fail" else ["a"])
    if third is not None:
        assert shape(third) == [("b", 5, 1, True)]
        land(s, third)
    s.cancel("b", 0.0)
    assert s.pool.num_free == 64


def test_a_sequence_whose_mask_waits_for_the_host_sits_out_alone() -> None:
    class AllowAll:
        is_ready = True
        follows_tokens = True

        def is_over(self, token_ids: Seq[int]) -> bool:
            return False

        def bits(self, token_ids: Seq[int]) -> bytes:
            return b"\xff" * 4

    s = scheduler()
    s.add(spec("a", 3, max_tokens=4), hands_off=False, now=0.0)
    s.add(spec("b", 3, max_tokens=4), hands_off=False, now=0.0)
    first = launch(s)
    first.pieces[0].sequence.token_mask = AllowAll()
    second = launch(s)
    assert shape(second) == [("b", 3, 1, True)]
    land(s, first)
    # Its token is known: it goes on beside the one that did not wait.
    third = launch(s)
    assert shape(third) == [("a", 3, 1, True), ("b", 4, 1, True)]
    land(s, second)
    fourth = launch(s)
    assert shape(fourth) == [("b", 5, 1, True)]
    land(s, third)
    land(s, fourth)
    # Alone it has nothing beside it.
    last = launch(s)
    assert shape(last) == [("a", 4, 1, True)]
    assert s.schedule(0.0) == (None, [])
    land(s, last)


def test_penalties_and_log_probabilities_do_not_take_the_overlap() -> None:
    s = scheduler()
    sampling = SamplingParams(
        seed=0, max_tokens=4, min_tokens=2, stop_token_ids=(9,), repetition_penalty=1.5, logprobs=3, logit_bias={1: 2.0}
    )
    s.add(SequenceSpec("a", (1, 2), sampling), hands_off=False, now=0.0)
    first, second = launch(s), launch(s)
    assert shape(second) == [("a", 2, 1, True)]
    land(s, first)
    land(s, second)


def test_a_step_that_does_not_wait_takes_blocks_from_nobody() -> None:
    s = scheduler(num_blocks=4)
    s.add(spec("a", 7, max_tokens=9), hands_off=False, now=0.0)
    s.add(spec("b", 7, max_tokens=9), hands_off=False, now=0.0)
    first, second = launch(s), launch(s)
    assert shape(second) == [("a", 7, 1, True), ("b", 7, 1, True)]
    land(s, first)
    assert s.schedule(0.0) == (None, [])
    land(s, second)
    third = launch(s)
    assert shape(third) == [("a", 8, 1, True)]
    assert s.num_preempted == 1
    land(s, third)


def test_decodes_are_in_every_step_and_prompts_fill_the_rest_in_order() -> None:
    s = scheduler()
    s.add(spec("a", 3), hands_off=False, now=0.0)
    step(s)
    s.add(spec("b", 30), hands_off=False, now=0.0)
    s.add(spec("c", 3), hands_off=False, now=0.0)
    # The chunk of b ends on a block boundary, so three tokens of the budget are left for c.
    assert step(s)[0] == [("a", 3, 1, True), ("b", 0, 12, False), ("c", 0, 3, True)]
    assert step(s)[0] == [("a", 4, 1, True), ("c", 3, 1, True), ("b", 12, 12, False)]


@pytest.mark.parametrize(
    ("drawn_token", "min_tokens", "max_tokens", "expected"),
    [
        (9, 0, 5, FinishReason.STOP),
        (9, 1, 5, None),
        (9, 0, 1, FinishReason.STOP),
        (8, 0, 1, FinishReason.LENGTH),
        (8, 0, 2, None),
    ],
)
def test_finish_at_the_first_token(
    drawn_token: int, min_tokens: int, max_tokens: int, expected: FinishReason | None
) -> None:
    for hands_off in (False, True):
        s = scheduler()
        s.add(spec("a", 5, max_tokens, stop=(9,), min_tokens=min_tokens), hands_off=hands_off, now=0.0)
        (output,) = (e for e in step(s, drawn_token)[1] if isinstance(e, Output))
        assert output.chunk.finish_reason is expected
        assert s.pool.num_held == (2 if hands_off or expected is None else 0)


def test_resumed_tokens_are_computed_but_counted_as_output() -> None:
    s = scheduler()
    s.add(spec("a", 5, max_tokens=4, generated=(11, 12)), hands_off=False, now=0.0)
    told, (output,) = step(s)
    assert told == [("a", 0, 7, True)]
    assert isinstance(output, Output)
    assert output.chunk.index == 2
    _, (output,) = step(s)
    assert isinstance(output, Output)
    assert (output.chunk.index, output.chunk.finish_reason) == (3, FinishReason.LENGTH)


def test_a_handed_off_sequence_holds_its_blocks_until_released() -> None:
    s = scheduler()
    s.add(spec("a", 9), hands_off=True, now=0.0)
    told, (started, output, handoff) = step(s, token=7)
    assert told == [("a", 0, 9, True)]
    assert started == Started("a", (0, 1, 2))
    assert isinstance(output, Output)
    assert handoff == Handoff("a", TokenChunk("a", 0, (7,)), (0, 1, 2))
    assert s.pool.state_of("a") is BlockState.SENDING
    assert step(s) == ([], [])
    s.cancel("a", 0.0)
    assert s.pool.num_held == 3
    s.release("a", 0.0)
    s.release("a", 0.0)
    assert s.pool.num_held == 0


def test_final_blocks_are_whole_until_the_prompt_is_complete() -> None:
    sequence = Sequence(spec("a", 13, generated=(1, 2)))
    assert [final_blocks(sequence, n, 4) for n in (0, 3, 4, 11, 12, 14, 15)] == [0, 0, 1, 2, 3, 3, 4]


def test_a_sequence_that_decodes_is_held_at_once_and_resumed() -> None:
    s = scheduler()
    s.add(spec("a", 7, max_tokens=5), hands_off=False, now=0.0)
    step(s, token=7)
    step(s, token=8)
    s.hold("a")
    # Two blocks hold the KV of all nine tokens but the last.
    assert s.schedule(0.0) == (None, [Handoff("a", TokenChunk("a", 0, (7, 8)), (0, 1))])
    assert s.pool.state_of("a") is BlockState.SENDING
    s.check()
    assert step(s) == ([], [])
    s.resume("a", 0.0)
    assert s.pool.state_of("a") is BlockState.RUNNING
    assert step(s, token=9)[0] == [("a", 8, 1, True)]
    s.cancel("a", 0.0)
    assert s.num_sequences == 0, "without a reader outside the blocks go back at once"


def test_hold_waits_for_both_steps_under_way_and_tells_the_tokens_of_both() -> None:
    s = scheduler()
    s.add(spec("a", 4), hands_off=False, now=0.0)
    first, second = launch(s), launch(s)
    s.hold("a")
    s.hold("a")
    assert [type(e) for e in land(s, first, 7)] == [Output]
    assert s.schedule(0.0) == (None, [])
    output, handoff = land(s, second, 8)
    assert isinstance(output, Output)
    assert handoff == Handoff("a", TokenChunk("a", 0, (7, 8)), (0, 1))
    s.release("a", 0.0)
    assert s.pool.num_free == 64


def test_hold_of_one_that_waits_or_is_unknown_or_ends() -> None:
    s = scheduler(num_blocks=4)
    s.hold("unknown")
    s.add(spec("a", 7, max_tokens=2), hands_off=False, now=0.0)
    s.hold("a")
    _, events = step(s, token=7)
    assert [type(e) for e in events] == [Started, Output, Handoff]
    s.resume("a", 0.0)
    plan = launch(s)
    s.hold("a")
    (output,) = land(s, plan)
    assert isinstance(output, Output)
    assert output.chunk.finish_reason is FinishReason.LENGTH
    assert s.pool.num_held == 2, "whatever it came to, the blocks stay until release"
    with pytest.raises(InternalError, match="a is not held"):
        s.resume("a", 0.0)
    s.release("a", 0.0)
    with pytest.raises(InternalError, match="a is not held"):
        s.resume("a", 0.0)
    assert s.pool.num_held == 0


def test_one_that_is_resumed_without_a_slot_waits_and_is_computed_again() -> None:
    s = scheduler(max_num_seqs=2)
    s.add(spec("a", 7), hands_off=True, now=0.0)
    step(s, token=7)
    s.add(spec("b", 3, max_tokens=3), hands_off=False, now=0.0)
    step(s)
    s.resume("a", 0.0)
    assert s.load().num_waiting == 1
    assert step(s)[0] == [("b", 3, 1, True)]
    step(s)
    assert step(s)[0] == [("a", 0, 8, True)]


def test_a_sample_of_several_tokens_ends_where_its_tokens_say() -> None:
    s = scheduler()
    s.add(spec("a", 5, max_tokens=6, stop=(9,)), hands_off=False, now=0.0)
    plan = launch(s)
    (output,) = s.apply(plan, StepResult({"a": chunk_of(plan.pieces[0], (5, 6, 7))}), 0.0)
    assert isinstance(output, Output)
    assert output.chunk == TokenChunk("a", 0, (5, 6, 7))
    s.check()
    plan, ahead = launch(s), launch(s)
    # The KV of 5 and 6 is there.
    assert shape(plan) == [("a", 7, 1, True)]
    assert s.apply(plan, StepResult({"a": chunk_of(plan.pieces[0], (8,))}), 0.0) != []
    assert shape(ahead) == [("a", 8, 1, True)]
    (output,) = s.apply(ahead, StepResult({"a": chunk_of(ahead.pieces[0], (4, 9, 3))}), 0.0)
    assert isinstance(output, Output)
    assert output.chunk == TokenChunk("a", 4, (4, 9), finish_reason=FinishReason.STOP)
    assert s.pool.num_free == 64


def test_a_step_ahead_of_a_sample_of_several_tokens_is_dropped() -> None:
    s = scheduler()
    s.add(spec("a", 5, max_tokens=8), hands_off=False, now=0.0)
    first, ahead = launch(s), launch(s)
    s.apply(first, StepResult({"a": chunk_of(first.pieces[0], (5, 6))}), 0.0)
    # Planned behind a piece that will be dropped, each next one would be dropped as well.
    assert s.schedule(0.0) == (None, [])
    assert s.apply(ahead, StepResult({"a": TokenChunk("a", 1, (6,))}), 0.0) == []
    s.check()
    assert shape(launch(s)) == [("a", 6, 1, True)]


@pytest.mark.parametrize(
    "wrong", [TokenChunk("a", 0, ()), TokenChunk("a", 1, (5,)), TokenChunk("a", 0, (1, 2, 3, 4, 5))]
)
def test_what_cannot_be_drawn_fails_that_sequence(wrong: TokenChunk) -> None:
    s = scheduler()
    s.add(spec("a", 5, max_tokens=8), hands_off=False, now=0.0)
    (failed,) = s.apply(launch(s), StepResult({"a": wrong}), 0.0)
    assert isinstance(failed, Failed)
    assert (failed.failure.code, s.pool.num_free) == ("InternalError", 64)


@pytest.mark.parametrize("hands_off", [False, True])
def test_cancel_during_a_step_returns_blocks_only_after_it(hands_off: bool) -> None:
    s = scheduler()
    s.add(spec("a", 9), hands_off=hands_off, now=0.0)
    plan, _ = s.schedule(0.0)
    assert plan is not None
    s.cancel("a", 0.0)
    s.cancel("a", 0.0)
    if hands_off:
        s.release("a", 0.0)
    assert s.pool.num_held == 3
    s.check()
    assert s.apply(plan, drawn(plan), 0.0) == []
    assert s.pool.num_held == 0
    assert s.num_sequences == 0


def test_cancel_stops_a_long_prompt_within_one_chunk() -> None:
    s = scheduler()
    s.add(spec("a", 200), hands_off=True, now=0.0)
    step(s)
    s.cancel("a", 0.0)
    assert step(s)[0] == []
    assert s.pool.state_of("a") is BlockState.SENDING


def test_a_waiting_prompt_is_cancelled_without_a_trace() -> None:
    s = scheduler(num_blocks=4)
    s.add(spec("a", 9, max_tokens=4), hands_off=True, now=0.0)
    step(s)
    s.add(spec("b", 9, max_tokens=4), hands_off=True, now=0.0)
    assert step(s)[0] == []
    s.cancel("b", 0.0)
    assert s.take_gone() == ["b"]
    assert s.num_sequences == 1


def test_prompts_wait_for_memory_in_order() -> None:
    s = scheduler(num_blocks=6)
    s.add(spec("a", 12, max_tokens=4), hands_off=True, now=0.0)
    s.add(spec("b", 16, max_tokens=4), hands_off=True, now=0.0)
    s.add(spec("c", 4, max_tokens=4), hands_off=True, now=0.0)
    assert step(s)[0] == [("a", 0, 12, True)]
    assert step(s)[0] == [], "c must not overtake b"
    s.release("a", 0.0)
    assert step(s)[0] == [("b", 0, 16, True)]
    assert step(s)[0] == [("c", 0, 4, True)]


def test_ids_are_not_looked_at_where_no_model_reads_them() -> None:
    limits = SchedulerConfig().of_model(block_tokens=4, max_model_tokens=64, vocab_size=None)
    s = Scheduler(limits, BlockPool(16))
    s.add(SequenceSpec("a", (1 << 40,), SamplingParams(seed=0, max_tokens=4)), hands_off=False, now=0.0)
    assert len(shape(s.schedule(0.0)[0])) == 1


def test_a_prompt_with_one_token_behind_it_may_fill_context_and_memory() -> None:
    for num_blocks in (4, 100):
        s = scheduler(num_blocks=num_blocks)
        longest = min(4 * num_blocks, 256)
        s.add(spec("a", longest, max_tokens=1), hands_off=False, now=0.0)
        events = [event for _ in range(20) for event in step(s)[1]]
        assert [e.chunk.finish_reason for e in events if isinstance(e, Output)] == [FinishReason.LENGTH]
        with pytest.raises(PromptTooLong):
            s.add(spec("b", longest + 1, max_tokens=1), hands_off=False, now=0.0)
        with pytest.raises(PromptTooLong):
            s.add(spec("c", longest, max_tokens=2), hands_off=False, now=0.0)


def test_refusals_name_both_values() -> None:
    s = scheduler(num_blocks=4, max_waiting=1)
    with pytest.raises(PromptTooLong, match=r"250 prompt tokens.*258.*256"):
        s.add(spec("a", 250), hands_off=False, now=0.0)
    with pytest.raises(PromptTooLong, match=r"20 tokens need 5 KV blocks.*has 4"):
        s.reserve(spec("a", 12), 0.0)
    with pytest.raises(InvalidRequest, match="2 tokens were generated"):
        s.add(spec("a", 3, max_tokens=2, generated=(1, 2)), hands_off=False, now=0.0)
    s.add(spec("a", 3), hands_off=False, now=0.0)
    with pytest.raises(Overloaded, match="still in use"):
        s.add(spec("a", 3), hands_off=False, now=0.0)
    with pytest.raises(Overloaded, match="1 prompts wait"):
        s.add(spec("b", 3), hands_off=False, now=0.0)
    assert s.num_sequences == 1


def test_lease_then_join_decodes_from_the_first_token() -> None:
    s = scheduler()
    assert s.reserve(spec("a", 8, max_tokens=3), 0.0) == Reserved(0, (0, 1, 2), 2), "known tokens and one more"
    assert step(s)[0] == []
    s.join("a", TokenChunk("a", 0, (5,)), 0.0)
    assert s.pool.state_of("a") is BlockState.RUNNING
    told, (output,) = step(s)
    assert told == [("a", 8, 1, True)]
    assert isinstance(output, Output)
    assert (output.chunk.index, output.prefill) == (1, None)
    step(s)
    assert s.pool.num_held == 0


@pytest.mark.parametrize(
    ("known", "tokens"),
    [((), TokenChunk("a", 0, (5, 6, 7))), ((5,), TokenChunk("a", 1, (6, 7))), ((5, 6), TokenChunk("a", 0, (5, 6, 7)))],
)
def test_join_takes_any_number_of_tokens(known: tuple[int, ...], tokens: TokenChunk) -> None:
    s = scheduler()
    s.reserve(spec("a", 8, generated=known), 0.0)
    s.join("a", tokens, 0.0)
    told, (output,) = step(s, token=8)
    assert told == [("a", 10, 1, True)]
    assert isinstance(output, Output)
    assert output.chunk == TokenChunk("a", 3, (8,))
    s.hold("a")
    _, (handoff,) = s.schedule(0.0)
    assert isinstance(handoff, Handoff)
    assert handoff.tokens == TokenChunk("a", len(known), ((5, 6, 7, 8))[len(known) :])


def test_join_checks_the_tokens() -> None:
    s = scheduler(vocab_size=1000)
    with pytest.raises(InternalError, match="without a lease"):
        s.join("a", TokenChunk("a", 0, (5,)), 0.0)
    s.reserve(spec("a", 8, max_tokens=9, generated=(3,)), 0.0)
    ended = TokenChunk("a", 1, (5,), finish_reason=FinishReason.STOP)
    wrong = [(2, (5,)), (0, (4, 5)), (1, ()), (0, (3,)), (1, (5,) * 8)]
    for chunk in (*(TokenChunk("a", index, ids) for index, ids in wrong), ended):
        with pytest.raises(InvalidRequest, match="expected unfinished tokens that continue the 1 generated ones"):
            s.join("a", chunk, 0.0)
    with pytest.raises(InvalidRequest, match="ids from 5 to 1000, expected 0 to 999"):
        s.join("a", TokenChunk("a", 1, (5, 1000)), 0.0)
    with pytest.raises(InvalidRequest, match="5 new tokens, whose KV needs 4 blocks, expected at most the 3"):
        s.join("a", TokenChunk("a", 1, (5,) * 5), 0.0)
    s.check()
    s.return_lease("a")
    s.return_lease("a")
    assert s.pool.num_held == 0


def test_quarantined_blocks_stay_until_the_lease_is_returned() -> None:
    s = scheduler()
    s.reserve(spec("a", 8), 0.0)
    s.quarantine("a", 1.0)
    s.quarantine("unknown", 1.0)
    assert s.pool.state_of("a") is BlockState.QUARANTINED
    with pytest.raises(Overloaded):
        s.reserve(spec("a", 8), 2.0)
    s.return_lease("a")
    assert s.pool.num_free == 64


def test_reserve_leaves_room_for_growth_and_for_the_prompt_that_waits() -> None:
    s = scheduler(num_blocks=10, watermark=0.2)
    s.reserve(spec("a", 11), 0.0)
    with pytest.raises(NoBlocks, match="6 KV blocks, 7 of 10 are free and 5"):
        s.reserve(spec("b", 20), 0.0)
    s = scheduler(num_blocks=10, max_num_seqs=2)
    s.add(spec("a", 24, max_tokens=4), hands_off=True, now=0.0)
    s.add(spec("b", 24, max_tokens=4), hands_off=True, now=0.0)
    step(s)
    with pytest.raises(NoBlocks, match="0 of them"):
        s.reserve(spec("c", 4), 0.0)


def test_the_number_of_decoding_sequences_is_bounded_and_leaves_prompts_a_slot() -> None:
    s = scheduler(max_num_seqs=3)
    for name in ("a", "b"):
        s.reserve(spec(name, 4), 0.0)
    with pytest.raises(Overloaded, match="2 sequences decode"):
        s.reserve(spec("c", 4), 0.0)
    s.add(spec("d", 4), hands_off=False, now=0.0)
    assert step(s)[0] == [], "a sequence that would stay waits for a slot"
    for name in ("a", "b"):
        s.join(name, TokenChunk(name, 0, (1,)), 0.0)
    s.cancel("d", 0.0)
    s.add(spec("e", 4), hands_off=True, now=0.0)
    assert {p[0] for p in step(s)[0]} == {"a", "b", "e"}


def test_the_youngest_is_preempted_and_computed_again() -> None:
    s = scheduler(num_blocks=4)
    s.add(spec("a", 7, max_tokens=9), hands_off=False, now=0.0)
    s.add(spec("b", 7, max_tokens=9), hands_off=False, now=0.0)
    assert len(step(s, token=5)[0]) == 2
    step(s, token=6)
    assert step(s, token=7)[0] == [("a", 8, 1, True)]
    assert s.num_preempted == 1
    assert s.load().num_waiting == 1
    told: list[tuple[str, int, int, bool]] = []
    while not told or told[0][0] == "a":
        told, events = step(s, token=8)
    # b's tokens so far are known: all of them are computed again, and the numbering goes on.
    assert told == [("b", 0, 9, True)]
    (output,) = events
    assert isinstance(output, Output)
    assert output.chunk.index == 2
    assert output.prefill is None


def test_preemptions_of_one_sequence_are_bounded() -> None:
    s = scheduler(num_blocks=8, max_preemptions=2, max_batch_tokens=32)
    s.add(spec("victim", 5, max_tokens=20), hands_off=False, now=0.0)
    s.add(spec("hog", 9, max_tokens=20), hands_off=False, now=0.0)
    counts: dict[str, int] = {}
    for round_ in range(300):
        for event in step(s)[1]:
            if isinstance(event, Output) and event.chunk.finish_reason is not None:
                counts[event.sequence_id] = round_
        if round_ % 3 == 0 and s.load().num_waiting < 3 and round_ < 200:
            s.add(spec(f"n{round_}", 9, max_tokens=20), hands_off=False, now=0.0)
        for entry in s._entries.values():
            assert entry.num_preemptions <= 2
    assert s.num_preempted > 4
    assert s.num_sequences == 0, "everything came to its end"
    assert {"victim", "hog"} <= set(counts)


def test_a_failed_step_fails_its_sequences_and_no_other() -> None:
    s = scheduler()
    s.add(spec("a", 4), hands_off=False, now=0.0)
    s.add(spec("b", 4), hands_off=True, now=0.0)
    s.add(spec("c", 12), hands_off=False, now=0.0)
    s.add(spec("d", 4), hands_off=False, now=0.0)
    plan, _ = s.schedule(0.0)
    assert plan is not None
    assert {p.sequence.sequence_id for p in plan.pieces} == {"a", "b", "c"}
    s.cancel("c", 0.0)
    failed = s.fail(plan, InternalError("boom"), 0.0)
    assert [(type(e), e.sequence_id) for e in failed] == [(Failed, "a"), (Failed, "b")]
    s.check()
    assert s.pool.num_held == 1, "b's blocks have a reader outside"
    s.release("b", 0.0)
    assert step(s)[0] == [("d", 0, 4, True)]


def test_a_missing_token_fails_that_sequence() -> None:
    s = scheduler()
    s.add(spec("a", 4), hands_off=False, now=0.0)
    plan, _ = s.schedule(0.0)
    assert plan is not None
    (failed,) = s.apply(plan, StepResult(), 0.0)
    assert isinstance(failed, Failed)
    assert s.pool.num_held == 0


@pytest.mark.parametrize("limits", [{"max_num_seqs": 1}, {"max_batch_tokens": 1}, {"max_batch_tokens": 2}])
def test_the_tightest_limits_still_finish_everything(limits: dict[str, int]) -> None:
    s = scheduler(**limits)
    s.add(spec("a", 7, max_tokens=5), hands_off=False, now=0.0)
    s.add(spec("b", 6, max_tokens=5), hands_off=True, now=0.0)
    s.add(spec("c", 5, max_tokens=5), hands_off=False, now=0.0)
    counts = {"a": 0, "b": 0, "c": 0}
    for _ in range(60):
        told, events = step(s)
        assert sum(count for _, _, count, _ in told) <= s.config.max_batch_tokens
        assert len(told) <= s.config.max_num_seqs
        for event in events:
            counts[event.sequence_id] += isinstance(event, Output)
    s.release("b", 0.0)
    assert counts == {"a": 5, "b": 1, "c": 5}
    assert s.num_sequences == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"block_tokens": 0},
        {"max_num_seqs": 0},
        {"max_batch_tokens": 0},
        {"max_preemptions": 0},
        {"watermark": 1.0},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, int | float]) -> None:
    with pytest.raises(BadConfig, match=next(iter(bad))):
        scheduler(**bad)


def scored_spec(name: str, num_prompt: int, generated: tuple[int, ...] = ()) -> SequenceSpec:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=4, prompt_logprobs=1)
    return SequenceSpec(name, tuple(range(100, 100 + num_prompt)), sampling, generated)


def score_step(s: Scheduler) -> tuple[list[tuple[str, int, int, range]], list[EngineEvent]]:
    plan, _ = s.schedule(0.0)
    assert plan is not None
    assert sum(max(1, len(p.scored) + p.samples) for p in plan.pieces) <= s.config.max_num_seqs
    reports = {p.sequence.sequence_id: reported(p.scored) for p in plan.pieces if p.scored}
    events = s.apply(plan, StepResult(drawn(plan).sampled, scored=reports), 0.0)
    s.check()
    return [(p.sequence.sequence_id, p.start, p.num_tokens, p.scored) for p in plan.pieces], events


def reported(positions: range) -> tuple[PositionLogprobs, ...]:
    return tuple(PositionLogprobs(TokenLogprob(position + 1, -1.0), 1) for position in positions)


def test_a_prompt_is_scored_in_chunks_for_whose_logits_there_is_room() -> None:
    s = scheduler(max_num_seqs=6)
    s.add(scored_spec("a", 9), hands_off=False, now=0.0)
    s.add(spec("b", 8), hands_off=False, now=0.0)
    told, events = score_step(s)
    # A whole block, beside the six rows that there is room for; the next prompt has the rest.
    assert told == [("a", 0, 4, range(4)), ("b", 0, 8, range(0))]
    assert events[0] == PromptLogprobs("a", 1, reported(range(4)))
    told, events = score_step(s)
    assert told == [("b", 8, 1, range(0)), ("a", 4, 5, range(4, 8))]
    kinds = [(type(e).__name__, e.sequence_id) for e in events]
    assert kinds == [("Output", "b"), ("PromptLogprobs", "a"), ("Output", "a")]
    assert events[1] == PromptLogprobs("a", 5, reported(range(4, 8)))


def test_what_was_scored_before_a_preemption_is_not_scored_again() -> None:
    s = scheduler(num_blocks=4, max_num_seqs=6, max_batch_tokens=4)
    s.add(spec("first", 3, max_tokens=6), hands_off=False, now=0.0)
    s.add(scored_spec("a", 12), hands_off=False, now=0.0)
    heard: list[EngineEvent] = []
    for _ in range(30):
        _, events = score_step(s)
        heard += [e for e in events if isinstance(e, PromptLogprobs)]
        if any(isinstance(e, Output) and e.sequence_id == "a" for e in events):
            break
    assert s.num_preempted == 1
    assert [position for e in heard for position in e.logprobs] == [*reported(range(11))]
    assert [e.index for e in heard] == sorted({e.index for e in heard})
    assert heard[0].index == 1
    assert len(heard[0].logprobs) < 11, "it was preempted in the middle"


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_prompt_is_pooled_by_rising_position_whatever_its_chunks(pooling: str) -> None:
    rows = np.random.default_rng(2).normal(size=(9, 5)).astype(np.float32)
    found = []
    for max_num_seqs in (2, 4, 16):
        s = scheduler(max_num_seqs=max_num_seqs)
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=1, pooling=pooling)
        s.add(SequenceSpec("a", tuple(range(9)), sampling), hands_off=False, now=0.0)
        while s.num_sequences:
            plan, _ = s.schedule(0.0)
            assert plan is not None
            (piece,) = plan.pieces
            wanted = [*piece.scored, *[piece.end - 1] * piece.samples]
            hidden = {"a": rows[wanted]} if wanted else {}
            found += s.apply(plan, StepResult(drawn(plan).sampled, hidden=hidden), 0.0)
    embeddings = [e for e in found if isinstance(e, Embedding)]
    total = rows[0].astype(np.float64)
    for row in rows[1:]:
        total += row
    values = rows[-1] if pooling == "last" else (total / 9).astype(np.float32)
    assert [e.values for e in embeddings] == [values.tobytes()] * 3


def test_a_prompt_that_tokens_follow_was_scored_elsewhere() -> None:
    s = scheduler()
    s.add(scored_spec("a", 5, generated=(7,)), hands_off=False, now=0.0)
    assert score_step(s)[0] == [("a", 0, 6, range(0))]
    s.reserve(scored_spec("b", 5), 0.0)
    s.join("b", TokenChunk("b", 0, (5,)), 0.0)
    assert score_step(s)[0] == [("a", 6, 1, range(0)), ("b", 5, 1, range(0))]


@pytest.mark.parametrize("error", [BadLogits("NaN"), None])
def test_a_prompt_that_cannot_be_scored_fails_alone(error: Exception | None) -> None:
    s = scheduler()
    s.add(scored_spec("a", 4), hands_off=False, now=0.0)
    s.add(spec("b", 4), hands_off=False, now=0.0)
    plan, _ = s.schedule(0.0)
    assert plan is not None
    failed, output = s.apply(plan, StepResult(drawn(plan).sampled, {} if error is None else {"a": error}), 0.0)
    assert isinstance(failed, Failed)
    assert (failed.sequence_id, failed.failure.code) == ("a", "InternalError" if error is None else "BadLogits")
    assert isinstance(output, Output)
    s.check()
