"""Profiles of nodes: their file, and the machine, model and cluster that the planner makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from baton.errors import BadConfig
from baton.types import KvLayout, Role
from engine.step import StepShape
from planner.design import Design, Group
from planner.fitted import Line, Pace, Point, RequestTimes, Sharing, Transfers, Wake
from planner.measured import Measured, Power, read, write
from planner.overhead import NO_OVERHEAD, LoopTimes, Overhead
from planner.profiles import simulated_as
from planner.sim.config import SimulationConfig
from planner.workload import Request, Workload
from router.cluster.config import PolicyConfig

LINE = Line(0.01, 1e-4, 2e-8, 1e-3, 1e-6)
SHAPES = (
    *(StepShape().with_prompt(0, tokens) for tokens in (1, 63, 512, 2048)),
    *(StepShape(num_decoding=n, num_kv_tokens=n * kv) for n in (1, 4, 16) for kv in (100, 1000)),
)
MEASURED = Measured(
    model="m", device="cpu", software_version="1.0", kv_layout=KvLayout(4, 100, 2, 16, 64, "float32"), line=LINE,
    points=tuple(Point(shape, LINE.step_s(shape) * (1.02 if i else 0.9), i + 1) for i, shape in enumerate(SHAPES)),
    sharing=Sharing((1.1,), (1.2, 1.4)), wake=Wake(0.003, 0.002), pace=Pace(1.5, 2.0), other_cores=0.25,
    transfers=Transfers(1e-3, 1e9),
    requests=RequestTimes(0.02, 0.001, 0.004), power=Power(50, 300), layerwise_from_bytes=1 << 20,
    overhead=Overhead(0.003, 0.005, LoopTimes(0.002, 1e-4, 2e-4), LoopTimes(0.001), 2, 1.5),
)  # fmt: skip
SPLIT = SimulationConfig(policy=PolicyConfig(disaggregation="always"), max_output_tokens=1)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    for measured in (MEASURED, replace(MEASURED, transfers=None, power=None, sharing=Sharing())):
        write(tmp_path / "p.json", measured)
        assert read(tmp_path / "p.json") == measured
    with pytest.raises(BadConfig, match="cannot be written"):
        write(tmp_path / "nowhere" / "p.json", MEASURED)


def test_the_file_has_the_error_of_each_step(tmp_path: Path) -> None:
    write(tmp_path / "p.json", MEASURED)
    found = json.loads((tmp_path / "p.json").read_text())
    assert [point["error"] for point in found["points"]] == pytest.approx([1 / 0.9 - 1, *[1 / 1.02 - 1] * 9])
    assert found["median_error"] == pytest.approx(1 - 1 / 1.02)
    assert found["worst_error"] == pytest.approx(1 / 0.9 - 1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 1}, "no profile of format 4"),
        ({"points": []}, "damaged: 'no points'"),
        ({"points": None}, "damaged"),
        ({"line": {"base_s": 1}}, "damaged"),
        ({"line": {**dict.fromkeys(LINE.__slots__, 1), "base_s": -1}}, "-1 is no number from 0 on"),
        ({"transfers": {"latency_s": 0, "bytes_s": 0}}, "0 is no number"),
        ({"sharing": {"prompt": [0.5], "decode": []}}, "0.5 is no number from 1 on"),
        ({"sharing": []}, "damaged"),
        ({"kv_layout": {"num_layers": 0}}, "damaged"),
        ({"kv_layout": {**dict.fromkeys(KvLayout.__slots__, 1), "dtype": "int3"}}, "damaged"),
        ({"wake": {"decode_s": -1}}, "-1 is no number from 0 on"),
        ({"pace": {"decode": 0}}, "0 is no number from 1e-12 on"),
        ({"other_cores": None}, "damaged"),
        ({"requests": {"fixed_s": True}}, "True is no number"),
        ({"overhead": {"router": {"token_s": -1}, "client": {}}}, "-1 is no number from 0 on"),
        ({"overhead": {"busy_message_s": 0}}, "damaged"),
        ({"overhead": None}, "damaged"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(change: dict[str, object], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write(path, MEASURED)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadConfig, match=complaint):
        read(path)
    path.write_text("[")
    with pytest.raises(BadConfig, match="cannot be read"):
        read(path)


def _design(num_prompt: int, num_token: int) -> Design:
    machine = MEASURED.as_machine()
    return Design((Group(Role.PREFILL, machine, num_prompt), Group(Role.DECODE, machine, num_token)))


def test_a_cluster_of_measured_nodes_has_their_blocks_times_and_links() -> None:
    machine, model = MEASURED.as_machine(), MEASURED.as_model()
    config = MEASURED.configured(SPLIT)
    assert config.num_blocks(machine, model) == 100
    layout = MEASURED.kv_layout
    assert model.kv_bytes_per_token == layout.num_layers * layout.block_bytes / layout.block_tokens
    assert config.overhead == MEASURED.overhead
    alone = replace(MEASURED, sharing=Sharing(), overhead=NO_OVERHEAD)
    (one,) = simulated_as(alone, Workload("w", (Request(0, 1.0, 100, 3),)), _design(1, 1), SPLIT).run.served
    # With what interrupts steps.
    prompt_s = 1.5 * LINE.step_s(StepShape().with_prompt(0, 100))
    # The nodes had nothing to do before.
    assert one.first_token_s == pytest.approx(1.0 + 0.02 + 4 * 0.001 + prompt_s + 0.003)
    decodes_s = 2.0 * sum(LINE.step_s(StepShape(0, 0, 1, kv)) for kv in (101, 102))
    # Two blocks.
    moved_s = 1e-3 + 128 * model.kv_bytes_per_token / 1e9
    joined_s = one.first_token_s + moved_s + 0.004
    assert one.ended_s == pytest.approx(joined_s + decodes_s + 0.002, abs=1e-9)
    assert one.energy_j == pytest.approx(300 * (prompt_s + decodes_s + 0.005))


def test_a_run_has_what_each_transfer_took() -> None:
    alone = replace(MEASURED, overhead=NO_OVERHEAD)
    run = simulated_as(alone, Workload("w", (Request(0, 1.0, 100, 3),)), _design(1, 1), SPLIT).run
    (report,) = run.transfers
    assert report.num_bytes == 128 * MEASURED.as_model().kv_bytes_per_token
    assert report.exposed_s == pytest.approx(1e-3 + 0.004 + report.num_bytes / 1e9)


def test_another_machine_than_the_measured_one_is_refused() -> None:
    other = replace(MEASURED.as_machine(), name="h100-80gb")
    design = Design((Group(Role.MIXED, other, 1),))
    with pytest.raises(BadConfig, match="the design has h100-80gb, expected machines 'measured' alone"):
        simulated_as(MEASURED, Workload("w", (Request(0, 0.0, 10, 2),)), design, SPLIT)
