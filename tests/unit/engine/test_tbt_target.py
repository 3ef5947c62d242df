"""Prompts beside sequences that decode: chunks of such a size that a step is predicted to keep to the target."""

from collections.abc import Sequence as Seq

import pytest

from baton.types import SamplingParams, SequenceSpec, TokenChunk
from engine.blocks import BlockPool
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig
from engine.step import StepPlan, StepResult, StepShape

TOKEN_S = 0.001
DECODE_S = 0.02


def step_s(shape: StepShape) -> float:
    return DECODE_S + TOKEN_S * shape.num_prompt_tokens


def scheduler(target_s: float | None = 0.1, *, is_measured: bool = True) -> Scheduler:
    config = SchedulerConfig(block_tokens=64, max_batch_tokens=2048, tbt_target_s=target_s)
    s = Scheduler(config, BlockPool(256))
    for at in range(200 if is_measured else 0):
        shape = StepShape(num_decoding=at % 3, num_kv_tokens=100 * (at % 3))
        s.measured.add(shape := shape.with_prompt(0, (16, 64, 700)[at % 7 % 3]), step_s(shape))
    return s


def add(s: Scheduler, name: str, num_prompt: int, *, hands_off: bool = False) -> None:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=100)
    s.add(SequenceSpec(name, (1,) * num_prompt, sampling), hands_off=hands_off, now=0.0)


def launch(s: Scheduler) -> StepPlan:
    plan, _ = s.schedule(0.0)
    assert plan is not None
    return plan


def land(s: Scheduler, plan: StepPlan) -> None:
    sampled = {
        p.sequence.sequence_id: TokenChunk(p.sequence.sequence_id, p.sequence.num_generated, (1,))
        for p in plan.pieces
        if p.samples
    }
    s.apply(plan, StepResult(sampled), 0.0)
    s.check()


def step(s: Scheduler) -> dict[str, int]:
    """Tokens by sequence."""
    plan = launch(s)
    land(s, plan)
    return {p.sequence.sequence_id: p.num_tokens for p in plan.pieces}


def test_the_shape_of_a_step_is_told_with_it() -> None:
    s = scheduler(None)
    add(s, "a", 10)
    assert launch(s).shape == StepShape(10, 55)
    assert launch(s).shape == StepShape(num_decoding=1, num_kv_tokens=11)


def test_a_prompt_beside_one_that_decodes_is_computed_in_chunks_that_fit() -> None:
    s = scheduler()
    add(s, "a", 10)
    step(s)
    add(s, "b", 300)
    sizes: list[int] = []
    while sum(sizes) < 300:
        told = step(s)
        assert told.pop("a") == 1
        sizes.append(told.pop("b"))
        assert DECODE_S + TOKEN_S * sizes[-1] <= 0.105
    assert sum(sizes) == 300
    # All but the last use the time that there is.
    assert min(sizes[:-1]) >= 60


def test_alone_a_prompt_is_computed_at_once_and_without_a_target_always() -> None:
    s = scheduler()
    add(s, "a", 700)
    assert step(s) == {"a": 700}
    s = scheduler(None)
    add(s, "a", 10)
    step(s)
    add(s, "b", 700)
    assert step(s) == {"a": 1, "b": 700}


def test_a_sequence_that_may_arrive_any_time_counts_as_one_that_decodes() -> None:
    s = scheduler()
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=100)
    s.reserve(SequenceSpec("leased", (1,) * 10, sampling), 0.0)
    add(s, "a", 1000)
    assert step(s)["a"] > 100, "its prompt waits elsewhere"
    s.expect("leased")
    assert 60 <= step(s)["a"] <= 100
    s.return_lease("leased")
    assert step(s)["a"] > 100


def test_once_others_hand_sequences_over_a_step_that_decodes_none_is_bounded_as_well() -> None:
    s = scheduler()
    s.reserve(SequenceSpec("leased", (1,) * 10, SamplingParams(temperature=0.0, seed=0, max_tokens=100)), 0.0)
    s.return_lease("leased")
    add(s, "a", 1000)
    assert 0.3 <= DECODE_S + TOKEN_S * step(s)["a"] <= 0.42


def test_prompts_share_the_time_in_their_order() -> None:
    s = scheduler()
    add(s, "a", 10)
    step(s)
    for name in ("b", "c", "d"):
        add(s, name, 40)
    told = step(s)
    # One that is not whole is at least as long as a tile of rows.
    assert (told["b"], told["c"]) == (40, 32)
    assert "d" not in told
    assert step(s)["c"] == 8


@pytest.mark.parametrize("is_measured", [False, True])
def test_prompts_make_progress_whatever_the_target(is_measured: bool) -> None:
    s = scheduler(0.001, is_measured=is_measured)
    add(s, "a", 10)
    step(s)
    add(s, "b", 100)
    add(s, "c", 100)
    assert step(s) == {"a": 1, "b": 8}
    assert step(s) == {"a": 1, "b": 8}
    # Where decoding takes long, they have a share of the time.
    for _ in range(200 if is_measured else 0):
        s.measured.add(StepShape(num_decoding=1, num_kv_tokens=20), 0.4)
    assert not is_measured or 60 <= step(s)["b"] <= 84


def test_one_that_is_in_every_second_step_gets_half_the_time() -> None:
    class AllowAll:
        is_ready = True
        follows_tokens = True

        def is_over(self, token_ids: Seq[int]) -> bool:
            return False

        def bits(self, token_ids: Seq[int]) -> bytes:
            return b"\xff" * 4

    s = scheduler()
    add(s, "a", 10)
    add(s, "b", 10)
    first = launch(s)
    first.pieces[0].sequence.token_mask = AllowAll()
    add(s, "c", 1500)
    ahead = launch(s)
    for _ in range(6):
        land(s, first)
        first, ahead = ahead, launch(s)
        # Two of them make one of its gaps.
        assert step_s(ahead.shape) <= 0.055
        assert ahead.shape.num_prompt_tokens >= 16


@pytest.mark.parametrize(("waited_s", "most_s"), [(0.0, 0.105), (0.03, 0.075), (0.09, 0.045)])
def test_one_that_joined_during_a_step_has_less_time_left_for_its_first(waited_s: float, most_s: float) -> None:
    s = scheduler()
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=100)
    s.reserve(SequenceSpec("joins", (1,) * 10, sampling), now=0.0)
    add(s, "p", 2000)
    plan = launch(s)
    s.join("joins", TokenChunk("joins", 0, (1,)), now=1.0 - waited_s)
    land(s, plan)
    plan, _ = s.schedule(1.0)
    assert plan is not None
    assert plan.shape.num_decoding == 1
    assert 0 < step_s(plan.shape) <= most_s
    land(s, plan)
    plan, _ = s.schedule(1.1)
    assert plan is not None
    assert step_s(plan.shape) > 0.08, "from then on it waits for one step at a time"


def test_a_step_that_is_planned_ahead_counts_the_one_before_it() -> None:
    s = scheduler()
    add(s, "a", 10)
    step(s)
    s.reserve(SequenceSpec("joins", (1,) * 10, SamplingParams(temperature=0.0, seed=0, max_tokens=100)), now=0.0)
    add(s, "p", 400)
    first, _ = s.schedule(1.0)
    assert first is not None
    s.join("joins", TokenChunk("joins", 0, (1,)), now=1.0)
    second, _ = s.schedule(1.001)
    assert second is not None
    assert first.shape.num_prompt_tokens > 60
    assert second.shape.num_prompt_tokens < first.shape.num_prompt_tokens / 2
