"""Elementwise kernels against the reference, odd sizes, and what must not be written."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels.cases import TOLERANCE, relative_error
from engine.kernels.reference import ReferenceKernels
from engine.kernels.triton.pointwise import add_rms_norm, embed, rms_norm, rope_store, silu_mul

REFERENCE = ReferenceKernels()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("features", [1, 63, 65, 1500])
def test_norms_equal_the_reference(features: int, dtype: torch.dtype) -> None:
    x, delta = torch.randn(5, features).to(dtype) * 3, torch.randn(5, features).to(dtype)
    weight = torch.randn(features).to(dtype)
    wide = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert relative_error(rms_norm(x, weight, 1e-6), wide) < TOLERANCE[dtype]
    total = x.clone()
    normed = add_rms_norm(total, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    assert torch.equal(rms_norm(total, weight, 1e-6), normed)
    assert torch.equal(rms_norm(x[2:3].clone(), weight, 1e-6), rms_norm(x, weight, 1e-6)[2:3])
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, features)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("features", [1, 63, 65, 1100])
def test_silu_mul_equals_the_reference(features: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 2 * features).to(dtype) * 5
    found = silu_mul(gate_up)
    assert relative_error(found, REFERENCE.silu_mul(gate_up.double().float())) < TOLERANCE[dtype]
    assert torch.equal(silu_mul(gate_up[1:2].clone()), found[1:2])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_embed_takes_rows(dtype: torch.dtype) -> None:
    table = torch.randn(7, 1100).to(dtype)
    ids = torch.tensor([6, 0, 3, 3])
    assert torch.equal(embed(table, ids), table[ids])
    assert embed(table, ids[:0]).shape == (0, 1100)
    drawn = torch.tensor([0, 6, 5])
    assert torch.equal(embed(table, torch.tensor([3, ~2, ~1]), drawn), table[[3, 5, 6]])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (7, 1, 80), (3, 3, 96), (16, 8, 256)])
def test_rotation_writes_queries_and_pages(
    heads: int, kv_heads: int, head_dim: int, has_norm: bool, dtype: torch.dtype
) -> None:
    rows, block_tokens = 4, 16
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angle = torch.randn(rows, head_dim // 2)
    norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)) if has_norm else None
    caches = [torch.full((6, kv_heads, 2, block_tokens, head_dim), math.nan).to(dtype) for _ in range(2)]
    slots = torch.tensor([4 * 16 + 0, 1 * 16 + 1, 5 * 16 + 3, -1])
    query = rope_store(qkv, norms, 1e-6, angle.cos(), angle.sin(), caches[0], slots)
    reference = REFERENCE.rope_store(qkv[:3], norms, 1e-6, angle[:3].cos(), angle[:3].sin(), caches[1], slots[:3])
    expected = reference.double() * math.sqrt(head_dim)  # the reference scales its queries
    assert relative_error(query[:3], expected) < TOLERANCE[dtype]
    assert torch.isfinite(query).all()
    assert torch.equal(caches[0].isnan(), caches[1].isnan())
    assert relative_error(caches[0].nan_to_num(), caches[1].nan_to_num().double()) < TOLERANCE[dtype]


def test_embed_of_a_token_that_was_not_drawn_stays_in_the_table() -> None:
    table = torch.randn(5, 40)
    found = embed(table, torch.tensor([3, -1, -2]), torch.tensor([-1, 4]))
    assert torch.equal(found, table[[3, 0, 4]])
