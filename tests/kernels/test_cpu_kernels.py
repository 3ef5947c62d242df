"""CPU kernels against the reference, over head layouts, lengths, windows and poisoned memory."""

from __future__ import annotations

import dataclasses
import math
import platform

import pytest
import torch
from torch import Tensor

from baton.types import KvLayout, SamplingParams, SequenceSpec
from engine.batch import Batch, PieceRows, build_batch
from engine.kernels.cpu import CpuKernels
from engine.kernels.cpu.attention import query_scale
from engine.kernels.cpu.kernel import Kernel
from engine.kernels.cpu.llvm import Emitter, Int, Isa
from engine.kernels.interface import Kernels
from engine.kernels.reference import ReferenceKernels
from engine.model_config import ModelConfig, RopeConfig
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


MIXED = [(0, 1), (0, 63), (0, 64), (0, 65), (63, 1), (64, 1), (65, 7), (120, 30), (300, 1), (200, 130), (511, 1)]


def slots(positions: range, block_ids: tuple[int, ...], block_tokens: int) -> Tensor:
    return torch.tensor([block_ids[p // block_tokens] * block_tokens + p % block_tokens for p in positions])


def filled_cache(kernels: Kernels, config: ModelConfig, layout: KvLayout, batch: Batch) -> Tensor:
    """Random keys and values up to each sequence's end, written by the kernels; NaN everywhere else."""
    dtype = DTYPES[layout.dtype]
    generator = torch.Generator().manual_seed(7)
    shape = (layout.num_blocks, layout.num_kv_heads, 2, layout.block_tokens, layout.head_dim)
    cache = torch.full(shape, float("nan"), dtype=dtype)
    for piece in batch.pieces:
        end = piece.start + piece.num_tokens
        qkv = torch.randn(end, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, generator=generator)
        still = torch.ones(end, config.head_dim // 2), torch.zeros(end, config.head_dim // 2)
        where = slots(range(end), piece.block_ids, layout.block_tokens)
        kernels.rope_store(qkv.to(dtype), None, 0.0, *still, cache, where)
    return cache


def scaled_queries(kernels: Kernels, config: ModelConfig, num_rows: int, layout: KvLayout) -> Tensor:
    """The same queries for every set of kernels, each with its own scale; keys go to a cache that is thrown away."""
    dtype = DTYPES[layout.dtype]
    qkv = torch.randn(num_rows, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim).to(dtype) * 2
    still = torch.ones(num_rows, config.head_dim // 2), torch.zeros(num_rows, config.head_dim // 2)
    shape = (num_rows, layout.num_kv_heads, 2, layout.block_tokens, layout.head_dim)
    where = torch.arange(num_rows) * layout.block_tokens
    return kernels.rope_store(qkv, None, 0.0, *still, torch.empty(shape, dtype=dtype), where)


HOST = Isa.of_host()
# Any x86 processor that runs the tests has these; on others the host's set is tested alone.
AVX2 = dataclasses.replace(
    HOST,
    name="avx2",
    cpu="haswell",
    features="+avx2,+fma,+f16c",
    lanes=8,
    tile_rows=6,
    tile_vectors=2,
    has_bf16_dot=False,
    has_vnni=False,
)
NARROW = dataclasses.replace(AVX2, name="128bit", lanes=4, tile_rows=4, tile_vectors=3)
ISAS = {"host": HOST, "avx2": AVX2, "narrow": NARROW} if platform.machine() == "x86_64" else {"host": HOST}


@pytest.fixture(params=ISAS)
def cpu(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(ISAS[request.param])


# Attention is compiled anew for every row, which takes a second: vectors that are not the host's meet few shapes.
HEADS = [(4, 4, 16), (4, 2, 64), (6, 2, 24), (7, 1, 80), (4, 2, 256)]
CASES = [(isa, heads) for isa in ISAS for heads in (HEADS if isa == "host" else HEADS[2:3])]


@pytest.mark.parametrize("window", [None, 1, 40, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("isa", "heads"), CASES)
def test_attention_equals_the_reference(isa: str, heads: tuple[int, int, int], dtype: str, window: int | None) -> None:
    cpu, config = CpuKernels(ISAS[isa]), model(*heads)
    layout = KvLayout(1, 60, config.num_kv_heads, config.head_dim, 64, dtype)
    batch = batch_of(MIXED, layout)
    results = []
    for kernels in (cpu, ReferenceKernels()):
        torch.manual_seed(1)
        cache = filled_cache(kernels, config, layout, batch)
        queries = scaled_queries(kernels, config, batch.num_tokens, layout)
        results.append(kernels.attention(config, layout, batch.pieces)(queries, cache, window))
    assert torch.isfinite(results[0]).all()
    assert close(*results)


@pytest.mark.parametrize("block_tokens", [16, 128])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_over_blocks_of_other_sizes(dtype: str, block_tokens: int) -> None:
    cpu = CpuKernels()
    config = model(4, 2, 32)
    layout = KvLayout(1, 1600, 2, 32, block_tokens, dtype)
    batch = batch_of(MIXED[:8], layout)
    results = []
    for kernels in (cpu, ReferenceKernels()):
        torch.manual_seed(1)
        cache = filled_cache(kernels, config, layout, batch)
        queries = scaled_queries(kernels, config, batch.num_tokens, layout)
        results.append(kernels.attention(config, layout, batch.pieces)(queries, cache, 90))
    assert close(*results)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_token_has_the_same_bits_however_it_is_cut(
    cpu: CpuKernels, dtype: str, window: int | None
) -> None:
    """One piece of 200 tokens against its tokens alone, in twos and in sevens, among other sequences."""
    config = model(6, 2, 24)
    layout = KvLayout(1, 60, 2, 24, 64, dtype)
    whole = batch_of([(0, 200)], layout)
    cache = filled_cache(cpu, config, layout, whole)
    queries = scaled_queries(cpu, config, 200, layout)
    expected = cpu.attention(config, layout, whole.pieces)(queries, cache, window)
    block_ids = whole.pieces[0].block_ids
    for size in (1, 2, 7, 64, 150):
        pieces = tuple(PieceRows(at, at, min(size, 200 - at), block_ids) for at in range(0, 200, size))
        assert torch.equal(cpu.attention(config, layout, pieces)(queries, cache, window), expected)
        for piece in pieces[:: max(1, len(pieces) // 5)]:
            part = queries[piece.row : piece.row + piece.num_tokens].clone()
            alone = cpu.attention(config, layout, (dataclasses.replace(piece, row=0),))(part, cache, window)
            assert torch.equal(alone, expected[piece.row : piece.row + piece.num_tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 2, 16), (6, 2, 24), (8, 1, 80), (2, 2, 128)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_store_equals_the_reference(
    cpu: CpuKernels, shape: tuple[int, int, int], dtype: str, normed: bool
) -> None:
    """Queries directly; keys and values by what attention over a single token reads back."""
    heads, kv_heads, head_dim = shape
    torch.manual_seed(2)
    kind, rows = DTYPES[dtype], 75
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(kind)
    angles = torch.randn(rows, head_dim // 2)
    norms = (torch.randn(head_dim).to(kind), torch.randn(head_dim).to(kind)) if normed else None
    where = torch.randperm(64 * 3)[:rows]
    found, expected = [], []
    for kernels, out in ((cpu, found), (ReferenceKernels(), expected)):
        cache = torch.full((3, kv_heads, 2, 64, head_dim), float("nan"), dtype=kind)
        queries = kernels.rope_store(qkv, norms, 1e-5, angles.cos(), angles.sin(), cache, where)
        scale = query_scale(head_dim) if kernels is cpu else 1 / math.sqrt(head_dim)
        out += [(queries.double() / scale).to(kind), plain(cache, kernels).view(3, kv_heads, 2, 64, head_dim)]
    assert close(found[0], expected[0])
    written = torch.zeros(3 * 64, dtype=torch.bool).index_fill_(0, where, True).view(3, 1, 1, 64, 1).expand_as(found[1])
    assert torch.isnan(found[1][~written]).all()
    assert close(found[1][written], expected[1][written])


def plain(cache: Tensor, kernels: Kernels) -> Tensor:
    """[..., 2, block_tokens, head_dim] out of the CPU kernels' order (pointwise.py), spelled out anew."""
    if isinstance(kernels, ReferenceKernels):
        return cache
    *_, block_tokens, head_dim = cache.shape
    step = 2 if cache.dtype == torch.bfloat16 else 1
    keys = cache[:, :, 0].reshape(*cache.shape[:2], head_dim // step, block_tokens, step).transpose(3, 2)
    values = cache[:, :, 1].reshape(*cache.shape[:2], block_tokens // step, head_dim, step).transpose(3, 4)
    shape = (*cache.shape[:2], block_tokens, head_dim)
    return torch.stack((keys.reshape(shape), values.reshape(shape)), dim=2)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("rows", [1, 8, 520])
def test_pointwise_kernels_equal_the_reference(cpu: CpuKernels, dtype: torch.dtype, rows: int) -> None:
    reference = ReferenceKernels()
    for features in (16, 100, 1056):
        x, weight = torch.randn(rows, features).to(dtype) * 3, torch.randn(features).to(dtype)
        assert close(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
        sums, delta = (x.clone(), x.clone()), torch.randn(rows, features).to(dtype)
        normed = [k.add_rms_norm(s, delta, weight, 1e-6) for k, s in zip((cpu, reference), sums, strict=True)]
        assert close(*normed)
        assert torch.equal(*sums)
        gate_up = torch.randn(rows, 2 * features).to(dtype) * 30
        assert close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_rows_of_pointwise_kernels_do_not_see_each_other(cpu: CpuKernels, dtype: torch.dtype) -> None:
    gate_up, weight = torch.randn(1200, 2 * 232).to(dtype) * 4, torch.randn(464).to(dtype)
    whole = cpu.silu_mul(gate_up), cpu.rms_norm(gate_up, weight, 1e-6)
    for at, rows in ((0, 1), (3, 8), (17, 33), (100, 1000), (1199, 1)):
        part = slice(at, at + rows)
        assert torch.equal(cpu.silu_mul(gate_up[part].clone()), whole[0][part])
        assert torch.equal(cpu.rms_norm(gate_up[part].clone(), weight, 1e-6), whole[1][part])


def test_silu_keeps_its_sign_and_limits_far_out(cpu: CpuKernels) -> None:
    gates = torch.tensor([[-1e30, -200.0, -88.0, -1.0, 0.0, 1.0, 90.0, 1e30, float("inf")]])
    found = cpu.silu_mul(torch.cat((gates, torch.ones_like(gates)), dim=1))
    assert torch.isnan(cpu.silu_mul(torch.tensor([[float("nan"), 1.0]]))).all()
    torch.testing.assert_close(found[0, 3:], torch.nn.functional.silu(gates)[0, 3:], rtol=1e-6, atol=0)
    assert (found[0, :3].abs() < 1e-30).all() or (found[0, 0] >= -1e-7 * 1e30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1536, 1024), (50, 33), (96, 48), (1000, 256), (1, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_equals_the_reference_and_rows_do_not_see_each_other(
    cpu: CpuKernels, shape: tuple[int, int], dtype: str, biased: bool
) -> None:
    torch.manual_seed(4)
    weight = torch.randn(shape).to(DTYPES[dtype]) * 0.1
    bias = torch.randn(shape[0]).to(DTYPES[dtype]) if biased else None
    linear = cpu.linear(weight, bias)
    x = torch.randn(801, shape[1]).to(DTYPES[dtype])
    whole = linear(x)
    assert close(whole, ReferenceKernels().linear(weight, bias)(x))
    for at, rows in ((0, 1), (5, 2), (8, 24), (13, 40), (0, 128), (24, 504), (800, 1)):
        assert torch.equal(linear(x[at : at + rows].clone()), whole[at : at + rows])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_task_is_taken_once_whatever_the_threads(threads: int) -> None:
    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        place = parameters[0] + task * 4
        e.store("float32", e.load("float32", place, 1) + 1.0, place)

    kernel = Kernel("count", HOST, 1, build)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for num_tasks in (1, 2, 1000):
            counts = torch.zeros(num_tasks + 1)
            kernel(num_tasks, counts.data_ptr())
            assert counts.tolist() == [1.0] * num_tasks + [0.0]
    finally:
        torch.set_num_threads(before)


def test_exp2_is_exact_to_a_rounding(cpu: CpuKernels) -> None:
    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        at = task * 16
        e.store("float32", e.exp2(e.load("float32", parameters[0] + at, 4)), parameters[1] + at)

    kernel = Kernel("exp2", HOST, 2, build)
    x = torch.cat((torch.linspace(-130, 127, 40_000), torch.tensor([0.0, -0.0, -1e30, -float("inf")])))
    found = torch.empty_like(x)
    kernel(len(x) // 4, x.data_ptr(), found.data_ptr())
    normal = x > -126
    torch.testing.assert_close(found[normal].double(), x[normal].double().exp2(), rtol=2e-7, atol=0)
    assert (found[x < -127] == 0).all()
    assert found[-4:].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_config_helpers() -> None:
    assert model(8, 2, 16).group_size == 4
    assert dataclasses.replace(model(8, 2, 16), num_kv_heads=8).group_size == 1
