"""Recorded steps: who computed beside whom, and the line and the factors that they were made of."""

from __future__ import annotations

from random import Random

import pytest

from engine.step import StepShape
from planner.fitted import Line, Point, Sharing
from planner.steps import RecordedStep, found_in, nodes_beside, predicted_s, steady

LINE = Line(0.01, 1e-4, 2e-8, 1e-3, 1e-6)
SHARING = Sharing(prompt=(1.3,), decode=(1.6,))
PROMPT = StepShape().with_prompt(0, 500)
DECODE = StepShape(num_decoding=4, num_kv_tokens=2000)


def step(node: str, ended_s: float, turn_s: float, host: str = "h", shape: StepShape = DECODE) -> RecordedStep:
    return RecordedStep(node, host, shape, ended_s, turn_s)


def test_nodes_count_for_the_part_of_a_step_that_they_compute_in() -> None:
    steps = [
        step("a", 1.0, 1.0), step("a", 4.0, 1.0),
        # In the first half of a's first step, and throughout its second.
        step("b", 0.5, 0.7), step("b", 3.5, 0.6), step("b", 4.0, 0.5),
        step("c", 3.25, 0.25), step("d", 1.0, 1.0, host="elsewhere"),
    ]  # fmt: skip
    assert nodes_beside(steps)[:2] == pytest.approx([0.5, 1.25])
    assert nodes_beside(steps)[-1] == 0


def _run(rng: Random, noise: float) -> list[RecordedStep]:
    """Of two nodes of a host: one by one, then both at once."""
    shapes = [StepShape().with_prompt(0, n) for n in (16, 64, 256, 1024)]
    shapes += [StepShape(num_decoding=n, num_kv_tokens=n * kv) for n in (1, 4, 16) for kv in (64, 512)]
    steps, now = [], 0.0
    for node in ("p", "d"):
        for shape in shapes * 3:
            seconds = LINE.step_s(shape) * (1 + rng.uniform(-noise, noise))
            now += seconds
            steps.append(step(node, now, seconds, shape=shape))
    for node in ("p", "d"):
        at_s = now
        for _ in range(60):
            shape = rng.choice(shapes)
            seconds = LINE.step_s(shape) * SHARING.factor(shape, 1) * (1 + rng.uniform(-noise, noise))
            at_s += seconds
            steps.append(step(node, at_s, seconds, shape=shape))
    return steps


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_line_and_the_factors_that_steps_were_made_of_are_found(noise: float) -> None:
    found = found_in(_run(Random(1), noise))
    for shape in (PROMPT, DECODE):
        assert found.line.step_s(shape) == pytest.approx(LINE.step_s(shape), rel=0.03 + noise / 2)
    assert found.sharing.prompt == pytest.approx((1.3,), rel=0.05)
    assert found.sharing.decode == pytest.approx((1.6,), rel=0.05)
    # Steps that are alike are one point.
    assert len(found.points) == 10


def test_points_of_before_count_as_well() -> None:
    known = [Point(StepShape(num_decoding=n, num_kv_tokens=n * 4000), 0.1) for n in (1, 2, 3)]
    found = found_in(_run(Random(1), 0.0), known)
    assert found.points[-3:] == tuple(known)


def test_what_was_interrupted_does_not_count() -> None:
    assert steady([1.0, 1.2, 1.1, 30.0]) == pytest.approx(1.1)
    assert steady([2.0]) == 2.0


def test_the_line_is_of_steps_that_nothing_interrupted_and_the_pace_of_all() -> None:
    """Every tenth decode takes 25 times as long: the line stays, and what a stream waits for is 3.4 times as much."""
    steps, now = [], 0.0
    for number in range(400):
        shape = (*(StepShape().with_prompt(0, n) for n in (16, 256)), StepShape(num_decoding=1, num_kv_tokens=100),
                 StepShape(num_decoding=4, num_kv_tokens=900), DECODE)[number % 5]  # fmt: skip
        is_interrupted = number % 50 in (2, 13, 24) and shape.num_decoding > 0
        seconds = LINE.step_s(shape) * (25 if is_interrupted else 1)
        now += seconds
        steps.append(step("n", now, seconds, shape=shape))
    found = found_in(steps)
    assert found.line.step_s(DECODE) == pytest.approx(LINE.step_s(DECODE), rel=0.02)
    assert found.pace.prompt == pytest.approx(1.0, rel=0.01)
    assert found.pace.decode == pytest.approx(1 + 24 / 10, rel=0.05)
    said_s, took_s = map(sum, zip(*predicted_s(found, steps), strict=True))
    assert said_s == pytest.approx(took_s, rel=0.02)
    # Of a few steps nothing is said.
    assert found_in(steps[:10]).pace.decode == 1.0


def test_a_step_after_idleness_takes_more_and_its_like_in_a_row_does_not() -> None:
    steps, now = [], 0.0
    for number in range(80):
        shape = (PROMPT, DECODE, DECODE, DECODE)[number % 4]._replace(num_kv_tokens=0 if number % 4 == 0 else 2000)
        # A pause before each prompt and the decode behind it.
        is_woken = number % 4 < 2
        now += 0.5 if is_woken else 0.0
        seconds = LINE.step_s(shape) + (0.004 if number % 4 == 0 else 0.002 if is_woken else 0.0)
        now += seconds
        steps.append(step("n", now, seconds, shape=shape))
    for tokens in (16, 64, 256):
        now += LINE.step_s(StepShape().with_prompt(0, tokens))
        shape = StepShape().with_prompt(0, tokens)
        steps.append(step("n", now, LINE.step_s(shape), shape=shape))
    known = [Point(shape, LINE.step_s(shape), 16) for shape in (PROMPT, StepShape(num_decoding=1, num_kv_tokens=100))]
    found = found_in(steps, known)
    assert found.wake.decode_s == pytest.approx(0.002, rel=0.1)
    assert found.wake.prompt_s == pytest.approx(0.004, rel=0.2)
    assert found.line.step_s(DECODE) == pytest.approx(LINE.step_s(DECODE), rel=0.02)
    said_s, took_s = predicted_s(found, steps)[0]
    assert said_s == pytest.approx(took_s, rel=0.05)
