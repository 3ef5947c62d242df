"""The line through measured steps, and what fits into a time."""

from __future__ import annotations

import random
import time

import pytest

from baton.types import StepTimes
from engine.step import StepShape
from engine.step_times import MeasuredSteps

TRUE = StepTimes(base_s=0.02, prompt_token_s=0.0015, sequence_s=0.0004, kv_token_s=1e-6)
PAIR_S = 2e-7


def seconds(shape: StepShape, pair_s: float = PAIR_S) -> float:
    line = TRUE.step_s(shape.num_prompt_tokens, shape.num_decoding, shape.num_kv_tokens)
    return line + pair_s * shape.num_prompt_pairs


def random_shape(rng: random.Random) -> StepShape:
    num_decoding = rng.choice((0, 1, 8, 20))
    shape = StepShape(num_decoding=num_decoding, num_kv_tokens=num_decoding * rng.randrange(100, 2000))
    if num_decoding == 0 or rng.random() < 0.5:
        shape = shape.with_prompt(rng.randrange(0, 3000), rng.choice((16, 64, 200, 1000)))
    return shape


def measured(num_steps: int = 400, noise: float = 0.0, pair_s: float = PAIR_S) -> MeasuredSteps:
    rng, steps = random.Random(1), MeasuredSteps()
    for _ in range(num_steps):
        shape = random_shape(rng)
        steps.add(shape, seconds(shape, pair_s) * (1 + noise * rng.uniform(-1, 1)))
    return steps


def test_pairs_of_a_chunk_are_what_each_token_sees() -> None:
    shape = StepShape().with_prompt(5, 3)
    assert shape == StepShape(num_prompt_tokens=3, num_prompt_pairs=6 + 7 + 8)
    assert shape.with_prompt(0, 1).num_prompt_pairs == 22


def test_the_line_is_found() -> None:
    told = measured(pair_s=0.0).told
    assert told is not None
    for name in ("base_s", "prompt_token_s", "sequence_s", "kv_token_s"):
        assert getattr(told, name) == pytest.approx(getattr(TRUE, name), rel=0.05), name


def test_steps_are_predicted_in_spite_of_noise() -> None:
    steps, rng = measured(noise=0.2), random.Random(2)
    for _ in range(100):
        shape = random_shape(rng)
        assert steps.step_s(shape) == pytest.approx(seconds(shape), rel=0.15)


def test_what_the_kv_before_a_prompt_token_costs_is_told_with_it() -> None:
    steps = MeasuredSteps()
    for at in range(200):
        shape = StepShape().with_prompt(1000 + at % 3, 100 + at % 7)
        steps.add(shape, seconds(shape))
    assert steps.told is not None
    told_s = steps.told.step_s(100, 0, 0)
    assert told_s == pytest.approx(seconds(StepShape().with_prompt(1000, 100)), rel=0.05)


def test_nothing_is_told_before_some_steps_and_no_coefficient_is_negative() -> None:
    steps = MeasuredSteps()
    for at in range(4):
        assert steps.told is None
        steps.add(StepShape().with_prompt(0, 10 + at), 0.05)
    assert steps.told is not None
    assert steps.told.step_s(12, 0, 0) == pytest.approx(0.05, rel=0.1)
    steps = MeasuredSteps()
    # Fewer sequences took longer.
    for at in range(40):
        num = 1 + at % 4
        steps.add(StepShape(num_decoding=num, num_kv_tokens=100 * (5 - num)), 0.1 - 0.01 * num)
    assert steps.told is not None
    assert min(steps.told.base_s, steps.told.prompt_token_s, steps.told.sequence_s, steps.told.kv_token_s) >= 0
    assert steps.told.step_s(0, 2, 300) == pytest.approx(0.08, rel=0.1)


@pytest.mark.parametrize("seconds_taken", [0.0, -1.0, float("nan")])
def test_what_is_no_time_is_ignored(seconds_taken: float) -> None:
    steps = measured()
    before = steps.told
    for _ in range(50):
        steps.add(StepShape(num_decoding=1, num_kv_tokens=10), seconds_taken)
        steps.add(StepShape(), 1.0)
    assert steps.told == before


def test_a_machine_that_becomes_slower_is_noticed_and_one_long_step_is_not() -> None:
    steps, rng = measured(), random.Random(3)
    shape = StepShape(num_decoding=8, num_kv_tokens=8000)
    steps.add(shape, 60.0)
    for _ in range(16):
        steps.add(shape := random_shape(rng), seconds(shape))
    assert steps.step_s(shape) == pytest.approx(seconds(shape), rel=0.2)
    for _ in range(800):
        steps.add(shape := random_shape(rng), 3 * seconds(shape))
    assert steps.step_s(shape) == pytest.approx(3 * seconds(shape), rel=0.1)


@pytest.mark.parametrize("start", [0, 1000, 3000])
def test_what_fits_takes_the_time_that_there_is(start: int) -> None:
    steps, beside = measured(800), StepShape(num_decoding=8, num_kv_tokens=8000)
    count = steps.fitting_tokens(0.2, beside, start)
    assert count > 0
    assert 0.15 < seconds(beside.with_prompt(start, count)) < 0.21
    assert steps.fitting_tokens(0.001, beside, start) < 0


def test_far_from_what_was_measured_chunks_grow_step_by_step() -> None:
    steps, beside = MeasuredSteps(), StepShape(num_decoding=4, num_kv_tokens=400)
    assert steps.fitting_tokens(1.0, beside, 0) == 0
    count, counts = 16, []
    while count < 500:
        steps.add(shape := beside.with_prompt(0, count), seconds(shape))
        counts.append(count)
        assert steps.fitting_tokens(1.0, beside, 0) <= 2 * count
        count = 2 * count
    assert counts == [16, 32, 64, 128, 256]


def test_steps_that_take_longer_than_predicted_make_room_for_themselves() -> None:
    """A line is not all: of steps with a bound 95 % keep to it, whatever their noise."""
    steps, rng = measured(), random.Random(4)
    beside, late, sizes = StepShape(num_decoding=8, num_kv_tokens=8000), 0, 1000
    for at in range(2 * sizes):
        shape = beside.with_prompt(0, max(16, steps.fitting_tokens(0.2, beside, 0)))
        taken_s = seconds(shape) * rng.lognormvariate(0.0, 0.15)
        steps.add(shape, taken_s)
        late += taken_s > 0.2 and at >= sizes
    assert late / sizes < 0.12


def test_a_step_is_added_in_microseconds() -> None:
    steps, shape = measured(), StepShape(8, 100, 8, 8000)
    taken = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100):
            steps.add(shape, 0.05)
        taken.append((time.perf_counter() - started) / 100)
    # About 9 us; the bound is far off, as tests run beside each other.
    assert min(taken) < 50e-6


def test_what_was_seen_long_ago_fades_out_on_a_machine_whose_speed_changes_all_the_time() -> None:
    """Weights become smaller than numbers can be: the engine must not end with that."""
    steps = measured(40)
    rng = random.Random(3)
    for _ in range(20_000):
        steps.add(StepShape(0, 0, 4, 400), seconds(StepShape(0, 0, 4, 400)) * rng.choice((1, 6)))
    assert steps.told is not None
    assert steps.told.base_s >= 0
