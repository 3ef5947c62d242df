"""Files of tiles: what is refused, and what an unknown GPU gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from baton.errors import BadConfig
from engine.kernels.triton.tuning import Tuning, load, parse
from tests.support.tuning_files import data


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "sm90.json"), ((8, 0), "sm80.json"), ((10, 0), "sm90.json")])
def test_an_unknown_gpu_gets_its_architectures_defaults_and_one_warning(
    capability: tuple[int, int], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tuning = load("Some GPU", capability, 99)
    assert tuning == parse(data(name), name, 99)
    assert not tuning.is_measured
    assert [record.message for record in caplog.records] == [
        f"no tuning for Some GPU: using the unmeasured defaults of {name}; `make tune` measures"
    ]


@pytest.mark.parametrize("change", [{"extra": 1}, {"decode": {"64": {"block_n": 48, "num_warps": 4, "num_stages": 1}}}])
def test_what_is_no_tuning_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=r"here\.json"):
        parse({**data(), **change}, "here.json")


def test_an_unknown_field_is_named() -> None:
    broken = data()
    broken["prefill"]["64"]["typo"] = 1
    with pytest.raises(BadConfig, match="typo"):
        parse(broken, "here.json")


def tuning() -> Tuning:
    return parse(data(), "sm90.json", 132)


@pytest.mark.parametrize(
    ("out", "inner", "splits"), [(6144, 4096, 2), (4096, 4096, 4), (28672, 4096, 1), (4096, 14336, 4), (64, 64, 1)]
)
def test_products_are_cut_to_fill_the_processors(out: int, inner: int, splits: int) -> None:
    plan = tuning().gemm_plan(out, inner, torch.bfloat16)
    assert plan.splits == splits
    assert splits == 1 or plan.grid.block_n == 128


def test_tiles_are_chosen_by_head_dim() -> None:
    assert tuning().prefill_tile(80, torch.bfloat16, is_windowed=False) == tuning().prefill[128]
    assert tuning().prefill_tile(16, torch.bfloat16, is_windowed=True) == tuning().prefill_windowed[64]
    assert tuning().decode_tile(128, torch.float32) == tuning().decode_float32
    with pytest.raises(BadConfig, match="head_dim 300"):
        tuning().decode_tile(300, torch.bfloat16)
