"""Rooflines against the public table, and what power and energy follow."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

from baton.errors import BadConfig
from baton.types import Role
from engine.step import StepShape
from planner import machines, models
from planner.design import Design, Group, parse
from planner.energy import StepPower, bill
from planner.results import Ending, MachineUse, Profile, Run, Served
from planner.roofline import DATA_SHEET, Efficiency, Roofline, needs
from planner.table import Row, ShapeTimes, rows_of
from planner.workload import Request, Workload

KNOWN = machines.catalogue()
BLOOM, LLAMA = models.BUILT_IN["bloom-176b"], models.BUILT_IN["llama2-70b"]
CASES = ((BLOOM, 8), (LLAMA, 2), (LLAMA, 4), (LLAMA, 8))


def _prompt_of(row: Row) -> StepShape:
    return StepShape(num_prompt_tokens=row.num_batch_tokens, num_prompt_pairs=row.num_prompt_pairs)


def _decode_of(row: Row) -> StepShape:
    return StepShape(num_decoding=row.batch_size, num_kv_tokens=round(row.num_kv_tokens))


def _errors(machine: str, efficiency: Efficiency | None) -> tuple[list[float], list[float]]:
    """Of prompts and of decodes, predicted by measured less 1."""
    prompts, decodes = [], []
    for model, degree in CASES:
        times = Roofline(model, KNOWN[machine], degree, efficiency)
        for row in rows_of(model.name, KNOWN[machine], degree):
            if row.is_one_batch:
                prompts.append(times.step_s(_prompt_of(row)) / row.prompt_s - 1)
                decodes.append(times.step_s(_decode_of(row)) / row.decode_s - 1)
    return prompts, decodes


@pytest.mark.parametrize("machine", ["a100-80gb", "h100-80gb"])
def test_with_the_measured_efficiency_it_is_near_the_table(machine: str) -> None:
    prompts, decodes = _errors(machine, None)
    assert median(map(abs, prompts)) < 0.18
    assert median(map(abs, decodes)) < 0.13
    assert max(map(abs, prompts + decodes)) < 0.65


@pytest.mark.parametrize("machine", ["a100-80gb", "h100-80gb"])
def test_a_data_sheet_alone_is_far_too_fast(machine: str) -> None:
    prompts, decodes = _errors(machine, DATA_SHEET)
    assert max(prompts + decodes) < 0
    assert median(prompts) < -0.5
    assert median(decodes) < -0.5


def test_grouped_queries_read_an_eighth_of_the_kv() -> None:
    whole = replace(LLAMA, num_kv_heads=LLAMA.num_heads)
    decode = StepShape(num_decoding=16, num_kv_tokens=32_000)
    weights = LLAMA.read_bytes(16)
    assert needs(whole, decode).num_bytes - weights == pytest.approx(8 * (needs(LLAMA, decode).num_bytes - weights))
    assert needs(whole, decode).flops == needs(LLAMA, decode).flops


def test_a_cap_slows_prompts_and_not_decodes() -> None:
    capped, free = (Roofline(BLOOM, KNOWN[name], 8) for name in ("h100-80gb-pcap", "h100-80gb"))
    decode, prompt = StepShape(num_decoding=8, num_kv_tokens=8000), StepShape().with_prompt(0, 4096)
    assert capped.efficiency != free.efficiency or capped.step_s(decode) == free.step_s(decode)
    assert 1.2 < capped.step_s(prompt) / free.step_s(prompt) < 1.3


def test_a_machine_without_a_measured_efficiency_is_told() -> None:
    assert "h200-141gb" in Roofline(BLOOM, KNOWN["h200-141gb"], 8).warnings[0]
    assert Roofline(BLOOM, KNOWN["h200-141gb"], 8, Efficiency(0.5, 0.8, 0)).warnings == ()
    assert Roofline(BLOOM, KNOWN["a100-80gb"], 8).warnings == ()


@pytest.mark.parametrize(("degree", "complaint"), [(0, "expected 1 to 8"), (9, "expected 1 to 8"), (4, "352 GB")])
def test_what_does_not_fit_is_refused(degree: int, complaint: str) -> None:
    with pytest.raises(BadConfig, match=complaint):
        Roofline(BLOOM, KNOWN["a100-80gb"], degree)


def test_an_efficiency_beyond_the_data_sheet_is_refused() -> None:
    with pytest.raises(BadConfig, match=r"expected shares above 0"):
        Efficiency(1.1, 1, 0)


@pytest.mark.parametrize(("model", "degree"), CASES)
def test_power_is_near_what_was_measured_on_a100(model: models.Model, degree: int) -> None:
    machine = KNOWN["a100-80gb"]
    power = StepPower(model, machine, degree, ShapeTimes(model.name, machine, degree))
    for row in rows_of(model.name, machine, degree):
        # Of runs that are nearly all decoding; one group's 8,192 token runs were averaged over more than the run.
        if row.power_share and row.batch_size <= 4 and row.num_prompt_tokens <= 2048:
            used_w = power.step_w(_decode_of(row)) - (8 - degree) * machine.idle_power_w
            share = used_w / (degree * machine.power_w)
            assert share == pytest.approx(row.power_share, abs=0.07)


def test_prompts_draw_more_with_their_tokens_decodes_hardly_and_none_more_than_the_cap() -> None:
    machine = KNOWN["h100-80gb"]
    power = StepPower(BLOOM, machine, 8, ShapeTimes("bloom-176b", machine, 8))
    prompts = [power.step_w(StepShape().with_prompt(0, tokens)) for tokens in (128, 512, 2048)]
    decodes = [power.step_w(StepShape(num_decoding=n, num_kv_tokens=n * 576)) for n in (1, 8, 32)]
    assert prompts[0] < min(prompts[1:])
    assert max(prompts) <= 8 * 700
    assert max(decodes) / min(decodes) < 1.2
    assert max(decodes) < prompts[2]
    capped = KNOWN["h100-80gb-pcap"]
    assert (
        StepPower(BLOOM, capped, 8, ShapeTimes("bloom-176b", capped, 8)).step_w(StepShape().with_prompt(0, 2048))
        == 8 * 350
    )
    assert power.step_w(StepShape()) == power.idle_w == 8 * 70


def test_a_bill_divides_energy_by_phase_and_money_by_tokens() -> None:
    served = tuple(
        Served(Request(i, 0.0, 100, 10), num_tokens=10, ending=ending)
        for i, ending in enumerate((Ending.WHOLE, Ending.FAILED))
    )
    uses = (
        MachineUse("a", Role.PREFILL, "h100-80gb", prompt_energy_j=500, idle_energy_j=50),
        MachineUse("b", Role.DECODE, "h100-80gb", decode_energy_j=200, idle_energy_j=30),
    )
    design = parse(KNOWN, prompt=["h100-80gb:1"], token=["h100-80gb:1"])
    found = bill(Run(Profile.HONEST, Workload("w", tuple(s.request for s in served)), design, served, uses, 3600.0))
    assert (found.total_j, found.joules_per_request) == (780, 780)
    assert (found.joules_per_prompt_token, found.joules_per_output_token) == (5, 20)
    assert found.dollars == pytest.approx(2 * 8 * 4.76)
    assert found.dollars_per_million_tokens == pytest.approx(found.dollars / 110 * 1e6)
    none = bill(
        Run(Profile.HONEST, Workload("w", ()), Design((Group(Role.MIXED, KNOWN["h100-80gb"], 1),)), (), (), 0.0)
    )
    assert none.joules_per_request == none.dollars_per_million_tokens == 0
