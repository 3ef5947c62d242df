"""What tuning makes of measurements. Nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from bench.gpu_child import Context
from bench.gpu_measure import Device
from bench.gpu_rows import Rows
from bench.tune import Paths, Tuner, entry, thresholds
from engine.kernels.triton.tuning import parse
from tests.support.tuning_files import data


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([(1, 1.0, 9.0, 9.0), (64, 5.0, 6.0, 7.0), (128, 9.0, 7.0, 8.0), (256, 20.0, 12.0, 11.0)], (128, 256)),
        # Better once is not better from there on.
        ([(1, 2.0, 1.0, 0.5), (64, 5.0, 6.0, 7.0), (128, 9.0, 7.0, 8.0)], (128, None)),
        ([(1, 1.0, 2.0, 3.0), (64, 1.0, 2.0, 3.0)], (65, None)),
        ([(1, 2.0, 1.0, 0.5)], (1, 1)),
    ],
)
def test_the_way_to_multiply_is_chosen_by_rows(
    measured: list[tuple[int, float, float, float]], expected: tuple[int, int | None]
) -> None:
    assert thresholds([Paths(*row) for row in measured]) == expected


def test_a_plan_written_is_the_plan_read() -> None:
    read = parse(data(), "here.json", 132)
    plan = read.gemm_plan(6144, 4096, torch.bfloat16)
    again = parse({**data(), "gemm": {"6144x4096": entry(plan, 132)}}, "here.json", 132)
    assert again.gemm[6144, 4096] == plan


def tuner(rows: Rows) -> Tuner:
    return tune.tuner(Context(Device(), rows, is_tiny=True))


def measured(rows: Rows, section: str, candidate: Any, us: dict[str, float], *, is_right: bool = True) -> None:
    shape = json.dumps(candidate, sort_keys=True)
    names = {"kernel": f"tune {section}", "shape": shape, "dtype": "float16"}
    case = " | ".join(names.values())
    rows.add("row", stage="tune", case=case, part="check", is_right=is_right, us_by_shape=us, **names)


def test_the_fastest_candidate_that_is_right_is_chosen_and_faults_are_out(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    tuning = tuner(rows)
    section = next(tuning.sections())
    first, second = section.candidates
    assert section.name == "decode"
    assert tuning.chosen([]) == tuning.base
    # Half the time where it is short counts as much as half where it is long.
    measured(rows, "decode", first, {"a": 10.0, "b": 1000.0})
    measured(rows, "decode", second, {"a": 4.0, "b": 1100.0})
    assert tuning.chosen(rows.read()) == section.change(tuning.base, second)
    measured(rows, "decode", second, {"a": 1.0, "b": 1.0}, is_right=False)
    assert tuning.chosen(rows.read()) == section.change(tuning.base, first)
    rows.fault("tune", f"tune decode | {json.dumps(first, sort_keys=True)} | float16", "check", "hung", "")
    assert tuning.chosen(rows.read()) == tuning.base


def test_a_folder_is_tuned_by_the_same_path_without_a_gpu(tmp_path: Path) -> None:
    """Every candidate is a case; the file that is written is one that can be read, and has what was measured."""
    rows = Rows(tmp_path)
    context = Context(Device(), rows, is_tiny=True)
    kernels = set()
    for case in tune.cases(context):
        kernels.add(case.kernel)
        if "decode" not in case.kernel and "down" not in case.kernel:
            continue
        (part,) = case.parts(context.device)
        values = part.run()
        assert values["is_right"] is True
        named = {"kernel": case.kernel, "shape": case.shape, "dtype": case.dtype}
        rows.add("row", stage="tune", case=" | ".join(named.values()), part=part.name, **named, **values)
    assert kernels >= {"tune decode", "tune prefill", "tune down, few rows", "tune down, many rows", "tune down, rows"}
    written = json.loads((tmp_path / "tuned.json").read_text())
    plans = parse(written, "tuned.json").gemm
    product = next(p for p in tuner(rows)._products if p.name == "down")
    # Nothing was timed: the first candidate, which is the plan that was there.
    before = parse(data("interpreter.json"), "before").gemm_plan(product.out, product.inner, torch.float16)
    assert list(plans) == [(product.out, product.inner)]
    assert plans[product.out, product.inner].stream == before.stream
    assert plans[product.out, product.inner].grid == before.grid
    # Measured at other numbers of rows, but no sweep was.
    assert plans[product.out, product.inner].grid_from_rows == before.grid_from_rows
