"""Step times of the public table, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

from baton.errors import BadConfig
from engine.step import StepShape
from planner import machines
from planner.table import Curve, Row, ShapeTimes, TokenTimes, rows_of

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


def _decode(sequences: int, kv_tokens: int) -> StepShape:
    return StepShape(num_decoding=sequences, num_kv_tokens=kv_tokens)


@pytest.mark.parametrize(
    ("machine", "batch_s", "alone_s"), [("a100-80gb", 0.0966, 0.0488), ("h100-80gb", 0.0638, 0.0361)]
)
def test_a_decode_costs_by_its_batch_and_by_its_kv(machine: str, batch_s: float, alone_s: float) -> None:
    times = ShapeTimes("bloom-176b", KNOWN[machine], 8)
    assert times.step_s(_decode(64, 64 * 576)) == pytest.approx(batch_s, rel=0.01)
    assert times.step_s(_decode(1, 576)) == pytest.approx(alone_s, rel=0.01)
    # 512 and 8,192 tokens before: 48.8 and 51.3 ms on A100, 36.1 and 37.4 on H100.
    assert 1.02 < times.step_s(_decode(1, 8256)) / times.step_s(_decode(1, 576)) < 1.08
    assert times.step_s(_decode(32, 64_000)) > times.step_s(_decode(32, 32_000)) > times.step_s(_decode(16, 32_000))
    assert times.warnings == ()
    times.step_s(_decode(65, 1))
    assert "1 to 65, measured are 1 to 64" in times.warnings[0]


@pytest.mark.parametrize("machine", ["a100-80gb", "h100-80gb"])
@pytest.mark.parametrize(
    ("model", "degree"), [("bloom-176b", 8), ("llama2-70b", 2), ("llama2-70b", 4), ("llama2-70b", 8)]
)
def test_the_times_are_near_every_row_of_the_table(machine: str, model: str, degree: int) -> None:
    times = ShapeTimes(model, KNOWN[machine], degree)
    cells: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows_of(model, KNOWN[machine], degree):
        if row.is_one_batch:
            cells.setdefault((row.num_prompt_tokens, row.batch_size, row.num_output_tokens), []).append(row)
    for (num_prompt_tokens, batch_size, _), found in cells.items():
        prompt = StepShape()
        for _ in range(batch_size):
            prompt = prompt.with_prompt(0, num_prompt_tokens)
        decode = _decode(batch_size, round(median(row.num_kv_tokens for row in found)))
        # Several prompts took longer than one of as many tokens.
        most = 0.06 if batch_size == 1 else 0.32
        assert times.step_s(prompt) == pytest.approx(median(row.prompt_s for row in found), rel=most)
        assert times.step_s(decode) == pytest.approx(median(row.decode_s for row in found), rel=0.12)


def test_a_batch_that_was_not_computed_at_once_is_left_out() -> None:
    found = rows_of("llama2-70b", KNOWN["a100-80gb"], 2)
    assert {row.batch_size for row in found if not row.is_one_batch} == {32, 64}
    assert all(row.is_one_batch for row in rows_of("bloom-176b", KNOWN["a100-80gb"], 8))


def test_a_mixed_step_reads_the_weights_once_and_meets_both_pure_ones() -> None:
    times = ShapeTimes("bloom-176b", KNOWN["a100-80gb"], 8)
    prompt, decode = StepShape().with_prompt(0, 1500), _decode(32, 40_000)
    both = decode.with_prompt(0, 1500)
    assert max(times.step_s(prompt), times.step_s(decode)) < times.step_s(both)
    assert times.step_s(both) < times.step_s(prompt) + times.step_s(decode)
    # One token of a prompt changes next to nothing.
    assert times.step_s(decode.with_prompt(0, 1)) == pytest.approx(times.step_s(decode), rel=1e-3)


def test_a_chunk_behind_a_long_beginning_costs_more_than_the_first() -> None:
    times = ShapeTimes("bloom-176b", KNOWN["a100-80gb"], 8)
    assert times.step_s(StepShape().with_prompt(8000, 512)) > times.step_s(StepShape().with_prompt(0, 512))
