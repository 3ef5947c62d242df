"""Products of 8-bit integers on CPUs against plain torch, bit for bit, on every kind of vectors that runs here."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels.cpu import CpuKernels
from engine.kernels.cpu.llvm import Isa
from engine.kernels.int8 import GROUP, quantized
from engine.kernels.reference import ReferenceKernels

HOST = Isa.of_host()
AVX2 = Isa("avx2", "haswell", "+avx2,+fma,+f16c", 8, 6, 2, has_bf16_dot=False, has_vnni=False)
NARROW = dataclasses.replace(AVX2, name="128bit", lanes=4, tile_rows=4, tile_vectors=3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def isas() -> Iterator[tuple[str, Isa]]:
    yield "host", HOST
    if HOST.has_vnni:
        yield "host-without-vnni", dataclasses.replace(HOST, has_vnni=False)
    if platform.machine() == "x86_64":
        yield from (("avx2", AVX2), ("narrow", NARROW))
    if HOST.has_vnni and HOST.lanes == 16:
        # What a processor with AVX-VNNI computes, by the instruction that AVX-512 has for it.
        features = f"{AVX2.features},+avx512f,+avx512vl,+avx512vnni"
        yield "avx2-vnni", dataclasses.replace(AVX2, features=features, has_vnni=True)


ISAS = dict(isas())


@pytest.fixture(params=ISAS)
def cpu(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(ISAS[request.param], quantization="int8")


def layer(shape: tuple[int, int], dtype: str, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, bias and activations, some of them far out."""
    torch.manual_seed(4)
    x = torch.randn(rows, shape[1]) * torch.randn(shape[1]).exp()
    return tuple(t.to(DTYPES[dtype]) for t in (torch.randn(shape) * 0.1, torch.randn(shape[0]), x))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(200, 320), (96, 2 * GROUP), (50, 33), (1, 1)])
def test_linear_has_the_bits_of_the_reference_and_rows_do_not_see_each_other(
    cpu: CpuKernels, shape: tuple[int, int], dtype: str
) -> None:
    weight, bias, x = layer(shape, dtype, 401)
    linear = cpu.linear(weight, bias)
    whole = linear(x)
    assert torch.equal(whole, ReferenceKernels(quantization="int8").linear(weight, bias)(x))
    for at, rows in ((0, 1), (5, 2), (8, 24), (13, 40), (0, 390), (400, 1)):
        assert torch.equal(linear(x[at : at + rows].clone()), whole[at : at + rows])


def test_without_a_bias_and_of_rows_of_zeros(cpu: CpuKernels) -> None:
    weight, _, x = layer((70, 130), "bfloat16", 9)
    weight[3], x[2], x[5, :GROUP] = 0, 0, 0
    found = cpu.linear(weight, None)(x)
    assert torch.equal(found, ReferenceKernels(quantization="int8").linear(weight, None)(x))
    assert (found[:, 3] == 0).all()
    assert (found[2] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_row_or_output_alone(cpu: CpuKernels, value: float) -> None:
    weight, bias, x = layer((70, 300), "float32", 9)
    expected = cpu.linear(weight, bias)(x)
    spoilt_x, spoilt_weight = x.clone(), weight.clone()
    spoilt_x[4, 290], spoilt_weight[66, 10] = value, value
    by_row = cpu.linear(weight, bias)(spoilt_x)
    assert torch.isnan(by_row[4]).all()
    assert torch.equal(by_row[torch.arange(9) != 4], expected[torch.arange(9) != 4])
    by_output = cpu.linear(spoilt_weight, bias)(x)
    assert torch.isnan(by_output[:, 66]).all()
    assert torch.equal(by_output[:, torch.arange(70) != 66], expected[:, torch.arange(70) != 66])


def test_the_largest_sums_are_exact(cpu: CpuKernels) -> None:
    """Every product of a group at its limit: nothing saturates on the way."""
    signs = torch.tensor([1.0, -1.0])
    weight, x = signs[:, None].expand(2, GROUP).contiguous(), signs[:, None].expand(2, GROUP).contiguous()
    largest = float(GROUP * 127 * 127)
    # Scales are powers of two, so that nothing else is rounded.
    found = cpu.linear(weight * 127, None)(x * 127)
    assert found.tolist() == [[largest, -largest], [-largest, largest]]


def test_weights_are_within_half_a_level_of_their_group() -> None:
    weight, _, _ = layer((7, 300), "float32", 1)
    levels, scales = quantized(weight)
    error = (levels * scales[:, :, None]).flatten(1)[:, :300] - weight
    for group in range(3):
        inside = slice(group * GROUP, (group + 1) * GROUP)
        assert (error[:, inside].abs() <= weight[:, inside].abs().amax(1, keepdim=True) / 254 * (1 + 1e-6)).all()
    assert (levels[:, 2, 300 - 2 * GROUP :] == 0).all()


def test_int8_and_other_kernels_have_other_names() -> None:
    assert CpuKernels(HOST, quantization="int8").name == f"cpu-{HOST.name}-w8a8g{GROUP}"
    assert ReferenceKernels(quantization="int8").name == f"reference-w8a8g{GROUP}"
    assert CpuKernels(HOST).name == f"cpu-{HOST.name}"
