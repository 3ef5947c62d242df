"""What tuning makes of measurements. Nothing is measured here."""

from __future__ import annotations

import pytest
import torch

from bench import gpu_kernels
from bench.gpu_measure import Budget, Device
from bench.tune import Paths, entry, thresholds, tune_product
from engine.kernels.triton.tuning import parse
from tests.unit.test_triton_tuning import data


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


def test_a_product_is_tuned_by_the_same_path_without_a_gpu() -> None:
    sizes = gpu_kernels.TINY[1]
    product = gpu_kernels.products(sizes)[2]
    device = Device("none", is_gpu=False)
    before = data("interpreter.json")
    tuned = tune_product(before, product, sizes, device, Budget(60), few=2)
    key = f"{product.out}x{product.inner}"
    expected = parse(before, "before").gemm_plan(product.out, product.inner, sizes.dtype)
    assert set(tuned["gemm"]) - set(before["gemm"]) == {key}
    assert parse(tuned, "tuned").gemm[product.out, product.inner] == expected
