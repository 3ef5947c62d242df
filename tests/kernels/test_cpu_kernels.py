"""CPU kernels against the reference, over head layouts, lengths, windows and poisoned memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from baton.types import KvLayout, SamplingParams, SequenceSpec
from engine.batch import Batch, build_batch
from engine.config import ModelConfig, RopeConfig
from engine.kernels.cpu import CpuKernels, PackedLinear, PlainLinear, can_pack
from engine.kernels.cpu_attention import loop_length
from engine.kernels.reference import ReferenceKernels
from engine.step import Piece, Sequence, StepPlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest error relative to the largest result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(found: Tensor, expected: Tensor) -> bool:
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return bool(error <= TOLERANCE[found.dtype])


def model(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=10,
        hidden_size=heads * head_dim,
        intermediate_size=32,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied_embeddings=False,
        windows=(None,),
        max_model_tokens=4096,
        dtype="float32",
    )


def batch_of(lengths: list[tuple[int, int]], layout: KvLayout) -> Batch:
    """Pieces (start, num_tokens), over scattered blocks."""
    free = torch.randperm(layout.num_blocks, generator=torch.Generator().manual_seed(3)).tolist()
    pieces = []
    for i, (start, count) in enumerate(lengths):
        spec = SequenceSpec(f"{i}", (1,) * (start + count), SamplingParams(max_tokens=1, seed=0))
        sequence = Sequence(spec)
        sequence.block_ids = [free.pop() for _ in range(layout.blocks_for(start + count))]
        pieces.append(Piece(sequence, start, count, samples=True))
    return build_batch(StepPlan(tuple(pieces)), layout)


def poisoned_cache(layout: KvLayout, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Random keys and values up to each sequence's end, NaN everywhere else."""
    shape = (layout.num_blocks, layout.num_kv_heads, 2, layout.block_tokens, layout.head_dim)
    cache = torch.full(shape, float("nan"), dtype=dtype)
    for span in batch.spans:
        left = span.start + span.num_tokens
        for block in span.block_ids:
            cache[block, :, :, : min(left, layout.block_tokens)] = torch.randn(
                layout.num_kv_heads, 2, min(left, layout.block_tokens), layout.head_dim
            ).to(dtype)
            left -= layout.block_tokens
    return cache


MIXED = [(0, 1), (0, 63), (0, 64), (0, 65), (63, 1), (64, 1), (65, 7), (120, 30), (300, 1), (200, 130), (511, 1)]


@pytest.mark.parametrize("window", [None, 1, 40, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 2, 64), (8, 2, 128), (8, 1, 32), (6, 2, 24), (7, 1, 80)])
def test_attention_equals_the_reference(heads: tuple[int, int, int], dtype: str, window: int | None) -> None:
    torch.manual_seed(1)
    config = model(*heads)
    layout = KvLayout(1, 60, config.num_kv_heads, config.head_dim, 64, dtype)
    batch = batch_of(MIXED, layout)
    cache = poisoned_cache(layout, batch, DTYPES[dtype])
    queries = torch.randn(batch.num_rows, config.num_heads, config.head_dim).to(DTYPES[dtype]) * 2
    scales = [kernels.query_scale(config.head_dim) for kernels in (ReferenceKernels(), CpuKernels())]
    scaled = [(queries.double() * scale).to(queries.dtype) for scale in scales]
    expected = ReferenceKernels().attention(config, layout, batch.spans)(scaled[0], cache, window)
    found = CpuKernels().attention(config, layout, batch.spans)(scaled[1], cache, window)
    assert torch.isfinite(found).all()
    assert close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_are_cut_into_smaller_tiles_with_the_same_result(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model(4, 2, 32)
    layout = KvLayout(1, 60, 2, 32, 64, dtype)
    batch = batch_of(MIXED, layout)
    cache = poisoned_cache(layout, batch, DTYPES[dtype])
    queries = torch.randn(batch.num_rows, 4, 32).to(DTYPES[dtype])
    whole = CpuKernels().attention(config, layout, batch.spans)(queries, cache, None)
    monkeypatch.setattr("engine.kernels.cpu_attention._MAX_SCORES", 1 << 14)
    cut = CpuKernels().attention(config, layout, batch.spans)(queries, cache, None)
    assert torch.equal(whole, cut)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_writes_each_token_to_its_place_and_nothing_else(dtype: str) -> None:
    layout = KvLayout(1, 60, 2, 16, 64, dtype)
    batch = batch_of(MIXED, layout)
    keys, values = (torch.randn(batch.num_tokens, 2, 16).to(DTYPES[dtype]) for _ in range(2))
    caches = [torch.zeros(60, 2, 2, 64, 16, dtype=DTYPES[dtype]) for _ in range(2)]
    ReferenceKernels().store(keys, values, caches[0], batch)
    CpuKernels().store(keys, values, caches[1], batch)
    assert torch.equal(caches[0], caches[1])


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("rows", [8, 40, 520])
def test_pointwise_kernels_equal_the_reference(dtype: torch.dtype, rows: int) -> None:
    cpu, reference = CpuKernels(), ReferenceKernels()
    for features in (16, 100, 1056):
        x, weight = torch.randn(rows, features).to(dtype) * 3, torch.randn(features).to(dtype)
        assert close(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
        gate_up = torch.randn(rows, 2 * features).to(dtype) * 5
        assert close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))
    x = torch.randn(rows, 5, 48).to(dtype)
    cos, sin = torch.randn(rows, 24), torch.randn(rows, 24)
    assert close(cpu.rotate(x, cos, sin), reference.rotate(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_rows_of_pointwise_kernels_do_not_see_each_other(dtype: torch.dtype) -> None:
    cpu = CpuKernels()
    gate_up, weight = torch.randn(1200, 2 * 232).to(dtype) * 4, torch.randn(464).to(dtype)
    cos, sin = torch.randn(1200, 29), torch.randn(1200, 29)
    heads = gate_up[:, :464].reshape(1200, 8, 58).contiguous()
    whole = cpu.silu_mul(gate_up), cpu.rms_norm(gate_up, weight, 1e-6), cpu.rotate(heads, cos, sin)
    for at, rows in ((0, 1), (3, 8), (17, 33), (100, 1000), (1199, 1)):
        part = slice(at, at + rows)
        assert torch.equal(cpu.silu_mul(gate_up[part].clone()), whole[0][part])
        assert torch.equal(cpu.rms_norm(gate_up[part].clone(), weight, 1e-6), whole[1][part])
        assert torch.equal(cpu.rotate(heads[part].clone(), cos[part].clone(), sin[part].clone()), whole[2][part])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1536, 1024), (1024, 1408), (50, 33), (96, 48), (1000, 256)])
@pytest.mark.parametrize("kind", [PackedLinear, PlainLinear])
def test_linear_rows_do_not_see_each_other(
    kind: type[PackedLinear] | type[PlainLinear], shape: tuple[int, int], dtype: str
) -> None:
    weight = torch.randn(shape).to(DTYPES[dtype]) * 0.1
    if kind is PackedLinear and not can_pack(weight):
        pytest.skip("packed products are not to be had here")
    linear = kind(weight, torch.randn(shape[0]).to(DTYPES[dtype]))
    x = torch.randn(1024, shape[1]).to(DTYPES[dtype])
    whole = linear(x)
    for at, rows in ((0, 8), (5, 16), (8, 24), (13, 40), (0, 128), (24, 504), (8, 1016)):
        assert torch.equal(linear(x[at : at + rows].clone()), whole[at : at + rows])


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7, 16])
def test_loops_of_that_length_are_split_at_whole_vectors(threads: int) -> None:
    for size in (1, 63, 64, 65, 32768, 32769, 70_000, 98_305, 1_000_003):
        length = loop_length(size, threads)
        # As at::parallel_for splits: no more threads than grains, equal shares rounded up.
        used = min(threads, -(-length // 32768))
        assert size <= length <= size + 128 * threads
        assert length % (64 * used) == 0


def test_config_helpers() -> None:
    assert model(8, 2, 16).group_size == 4
    assert dataclasses.replace(model(8, 2, 16), num_kv_heads=8).group_size == 1
