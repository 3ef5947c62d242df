"""How long the next step may take, by who waits for it."""

from __future__ import annotations

import pytest

from engine.scheduler_config import SchedulerConfig
from engine.step import StepShape
from engine.step_limit import StepLimit
from engine.step_times import MeasuredSteps

TARGET_S = 0.1
NONE, ONE = StepShape(0, 0, 0, 0), StepShape(0, 0, 1, 10)


def limit(target_s: float | None = TARGET_S) -> StepLimit:
    config = SchedulerConfig(
        block_tokens=4, max_batch_tokens=64, max_num_seqs=4, max_waiting=4, max_model_tokens=64, tbt_target_s=target_s
    )
    return StepLimit(config, MeasuredSteps())


def test_a_step_that_no_sequence_waits_for_has_no_limit() -> None:
    assert limit().next_s(NONE, 0.0) is None
    assert limit(None).next_s(ONE, 0.0) is None


def test_a_node_that_is_handed_sequences_takes_a_few_targets() -> None:
    handed = limit()
    handed.handed_to()
    assert handed.next_s(NONE, 0.0) == pytest.approx(TARGET_S * SchedulerConfig().prompt_step_targets)
    handed.expect("s")
    assert handed.next_s(NONE, 0.0) == pytest.approx(TARGET_S)
    handed.expect_no_more("s")
    assert handed.next_s(NONE, 0.0) == pytest.approx(TARGET_S * SchedulerConfig().prompt_step_targets)


def test_what_joined_meanwhile_has_waited_once() -> None:
    joined = limit()
    joined.expect("s")
    joined.joined("s", 1.0)
    joined.joined("t", 1.03)
    assert joined.next_s(ONE, 1.04) == pytest.approx(TARGET_S - 0.04)
    assert joined.next_s(ONE, 2.0) == pytest.approx(TARGET_S)
    joined.joined("u", 2.0)
    joined.decoded(3)
    assert joined.next_s(ONE, 2.05) == pytest.approx(TARGET_S)


def test_one_that_waits_for_the_host_has_half_in_two_steps() -> None:
    out = limit()
    for sits_out, expected_s in ((True, TARGET_S / 2), (False, TARGET_S / 2), (False, TARGET_S)):
        out.planned(sits_out=sits_out)
        assert out.next_s(ONE, 0.0) == pytest.approx(expected_s)
    out.planned(sits_out=True)
    out.decoded(2)
    assert out.next_s(ONE, 0.0) == pytest.approx(TARGET_S)


def test_a_step_ahead_begins_when_the_one_under_way_is_predicted_to_be_over() -> None:
    ahead = limit()
    ahead.began(NONE, 5.0)
    over_s = 5.0 + MeasuredSteps().step_s(NONE)
    assert ahead.begins_s(1.0, is_ahead=True) == over_s
    assert ahead.begins_s(9.0, is_ahead=True) == 9.0
    assert ahead.begins_s(1.0, is_ahead=False) == 1.0
