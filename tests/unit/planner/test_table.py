"""Step times of the public table, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.errors import BadConfig
from engine.step import StepShape
from planner import machines
from planner.table import Curve, TokenTimes, rows_of

KNOWN = machines.catalogue()


def test_a_curve_is_straight_between_its_points_and_beyond_them() -> None:
    curve = Curve([(4, 30), (1, 10), (2, 20)])
    assert [curve.at(x) for x in (1, 1.5, 2, 3, 4)] == [10, 15, 20, 25, 30]
    assert not curve.extrapolated
    assert [curve.at(x) for x in (0, 6)] == [0, 40]
    assert curve.extrapolated == "0 to 6, measured are 1 to 4"


@pytest.mark.parametrize("points", [[(1, 2)], [(1, 2), (1, 3)]])
def test_a_curve_needs_two_different_points(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="two points"):
        Curve(points)


def test_every_group_has_the_whole_measurement() -> None:
    for machine in ("a100-80gb", "h100-80gb", "h100-80gb-pcap"):
        for model, degrees in (("bloom-176b", (8,)), ("llama2-70b", (2, 4, 8))):
            for degree in degrees:
                found = rows_of(model, KNOWN[machine], degree)
                assert len({(r.num_prompt_tokens, r.batch_size, r.num_output_tokens) for r in found}) == 19
                assert all(0 < r.decode_s < r.prompt_s for r in found if r.num_prompt_tokens >= 512)
                # Power was measured on A100 alone, and not in all runs.
                assert sum(r.power_share > 0 for r in found) == (65 if machine == "a100-80gb" else 0)


def test_times_are_the_medians_of_the_table_where_it_has_a_row() -> None:
    times = TokenTimes("bloom-176b", KNOWN["h100-80gb"], 8)
    assert times.prompt_s(2048) == pytest.approx(0.2519640094833448, rel=1e-12)
    assert times.batch_s(2048, 0) == times.step_s(StepShape(num_prompt_tokens=2048))
    assert times.batch_s(2000, 48) == pytest.approx(1.1 * times.prompt_s(2048))
    assert times.batch_s(0, 64) == times.step_s(StepShape(num_decoding=64, num_kv_tokens=100_000))
    # The known error: the table's own rows say 64 ms at batch 64.
    assert times.decode_s(64) == pytest.approx(0.0355, abs=2e-4)


def test_times_beyond_the_table_are_told() -> None:
    times = TokenTimes("bloom-176b", KNOWN["h100-80gb"], 8)
    times.prompt_s(128), times.prompt_s(32_768)
    assert times.warnings == ()
    times.decode_s(7), times.prompt_s(40_000)
    prompt, decode = times.warnings
    assert prompt.startswith("prompt times of bloom-176b on h100-80gb with TP 8")
    assert "128 to 40,000, measured are 128 to 32,768" in prompt
    assert "7 to 7, measured are" in decode


def test_a_machine_can_be_measured_as_another() -> None:
    mine = replace(KNOWN["h100-80gb"], name="mine", measured_as="a100-80gb")
    assert TokenTimes("bloom-176b", mine, 8).prompt_s(512) == TokenTimes("bloom-176b", KNOWN["a100-80gb"], 8).prompt_s(
        512
    )


def test_what_the_table_has_not_is_refused_with_what_it_has() -> None:
    with pytest.raises(
        BadConfig, match="no 'bloom-176b' on 'h200-141gb' with TP 8; expected one of bloom-176b on a100"
    ):
        rows_of("bloom-176b", KNOWN["h200-141gb"], 8)
