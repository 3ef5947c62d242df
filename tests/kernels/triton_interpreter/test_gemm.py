"""Products of few and of many rows against float64; both give a row the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.kernels.cases import TOLERANCE, relative_error
from engine.kernels.triton.gemm import _grid_kernel, _stream_kernel, linear, probe
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.tuning import GemmPlan, GridTile, StreamTile, load
from tests.support.kernel_device import DEVICE

PLAN = GemmPlan(
    splits=1,
    block_k=32,
    stream=StreamTile(32, 32, 4, 2),
    grid=GridTile(32, 32, 4, 2, num_programs=3),
    grid_from_rows=24,
)


def described(plan: GemmPlan) -> GemmPlan:
    return dataclasses.replace(
        plan,
        stream=dataclasses.replace(plan.stream, has_descriptors=True),
        grid=dataclasses.replace(plan.grid, has_descriptors=True),
    )


def inputs(rows: int, out: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(rows)
    sizes = (rows, inner), (out, inner), (out,)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight / inner**0.5, bias


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [*((rows, torch.float32) for rows in (1, 23, 25, 63)), *((rows, t) for t in TOLERANCE for rows in (9, 30))],
)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("is_gated", [False, True])
def test_linear_equals_the_reference(rows: int, splits: int, dtype: torch.dtype, is_gated: bool) -> None:
    x, weight, bias = inputs(rows, 82, 200, dtype)
    found = linear(x, weight, bias, dataclasses.replace(PLAN, splits=splits), is_gated=is_gated)
    expected = x.double() @ weight.double().T + bias.double()
    if is_gated:
        gate, up = expected.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("inner", [72, 33])
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("splits", [1, 2])
def test_descriptors_read_what_pointers_read(rows: int, inner: int, splits: int) -> None:
    x, weight, bias = inputs(rows, 48, inner, torch.float32)
    plan = dataclasses.replace(PLAN, splits=splits)
    assert torch.equal(linear(x, weight, bias, described(plan)), linear(x, weight, bias, plan))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, splits: int, is_gated: bool) -> None:
    x, weight, bias = inputs(40, 64, 96, dtype)
    plan = dataclasses.replace(PLAN, splits=splits)
    whole = linear(x, weight, bias, plan, is_gated=is_gated)
    for at, rows in ((0, 1), (3, 23), (8, 32)):
        part = slice(at, at + rows)
        assert torch.equal(linear(x[part].clone(), weight, bias, plan, is_gated=is_gated), whole[part])
    assert probe(weight, plan)


@pytest.mark.parametrize("is_gated", [False, True])
def test_what_is_asked_of_the_hardware_is_what_serves(is_gated: bool) -> None:
    """A plan for gated weights was once probed as if gate and up did not meet: other tiles, another kernel."""
    seen: set[bool] = set()

    def hook(*args: object, **options: object) -> None:
        seen.add(bool(options["IS_GATED"]))

    kernels = TritonKernels(load("interpreter", (8, 0), 1), DEVICE)
    _, weight, _ = inputs(1, 64, 96, torch.float32)
    for kernel in (_stream_kernel, _grid_kernel):
        kernel.add_pre_run_hook(hook)
    try:
        (kernels.gated_linear if is_gated else kernels.linear)(weight, None)
    finally:
        for kernel in (_stream_kernel, _grid_kernel):
            kernel.pre_run_hooks.pop()
    assert seen == {is_gated}


def test_no_rows() -> None:
    x, weight, bias = inputs(1, 10, 16, torch.float32)
    assert linear(x[:0], weight, bias, PLAN).shape == (0, 10)


def test_what_a_neighbour_holds_does_not_matter() -> None:
    x, weight, _ = inputs(30, 40, 48, torch.float32)
    whole = linear(x, weight, None, PLAN)
    x[7] = float("nan")
    found = linear(x, weight, None, PLAN)
    assert found[7].isnan().all()
    keep = torch.arange(30) != 7
    assert torch.equal(found[keep], whole[keep])


@pytest.mark.parametrize("is_gated", [False, True])
def test_the_vendors_product_is_used_only_if_bits_may_differ(is_gated: bool) -> None:
    tuning = load("interpreter", (8, 0), 1)
    tuning = dataclasses.replace(tuning, gemm_float32=dataclasses.replace(PLAN, vendor_from_rows=4))
    exact, free = (TritonKernels(tuning, DEVICE, is_batch_invariant=is_exact) for is_exact in (True, False))
    assert exact.name != free.name
    x, weight, bias = inputs(5, 48, 200, torch.float32)
    ours, either = (k.gated_linear(weight, bias) if is_gated else k.linear(weight, bias) for k in (exact, free))
    product = torch.nn.functional.linear(x, weight, bias)
    vendor = free.silu_mul(product) if is_gated else product
    assert torch.equal(either(x), vendor)
    assert torch.equal(either(x[:3]), ours(x[:3]))
    assert torch.equal(ours(x)[:3], ours(x[:3]))
    assert not torch.equal(ours(x), vendor)
