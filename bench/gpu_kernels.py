"""The shapes of `bench.gpu`: every kernel on the layers of Llama-3-8B, or on tiny ones, beside its peers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import gpu_sampling
from bench.cases import TOLERANCE, PagedSequences
from bench.gpu_measure import Device, Peer, Work
from bench.gpu_sizes import Sizes
from engine.kernels.triton.decode_attention import decode_attention
from engine.kernels.triton.gemm import linear, probe
from engine.kernels.triton.kv_copy import gather_blocks, scatter_blocks
from engine.kernels.triton.pointwise import add_rms_norm, embed, rms_norm, rope_store, silu_mul
from engine.kernels.triton.prefill_attention import (
    Chunk,
    contiguous_prefill_attention,
    list_tiles,
    paged_prefill_attention,
    tiles_on,
)
from engine.kernels.triton.shared_prefix import Group, plan_prefixes, rows_per_tile, shared_decode_attention
from engine.kernels.triton.tuning import Tuning


def works(sizes: Sizes, tuning: Tuning, device: Device) -> Iterator[Work]:
    """All of them, the most telling first: the run may be cut off by its budget."""
    for work in _works(sizes, tuning, device):
        yield dataclasses.replace(work, dtype=str(sizes.dtype).removeprefix("torch."))


def _works(sizes: Sizes, tuning: Tuning, device: Device) -> Iterator[Work]:
    for block_tokens in sizes.block_tokens:
        yield from decode_works(sizes, tuning, device, block_tokens)
    yield from gemm_works(sizes, tuning, device, products(sizes))
    for block_tokens in sizes.block_tokens:
        yield from prefill_works(sizes, tuning, device, block_tokens)
    yield from _shared(sizes, tuning, device)
    yield from _pointwise(sizes, device)
    yield from _copies(sizes, device)
    yield from gpu_sampling.works(sizes, device)


def _randn(device: Device, dtype: torch.dtype, *size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device.torch).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device.torch, dtype=torch.float32).to(dtype)


def _indices(device: Device, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device.torch)


def _sdpa(backend: SDPBackend, inputs: dict[str, Any], *, is_causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(
            inputs["q4"], inputs["k4"], inputs["v4"], is_causal=is_causal, enable_gqa=True
        )


def _sdpa_peers(*, is_causal: bool) -> dict[str, Any]:
    return {
        "sdpa_flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION, is_causal=is_causal),
        "sdpa_cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION, is_causal=is_causal),
    }


def decode_works(sizes: Sizes, tuning: Tuning, device: Device, block_tokens: int) -> Iterator[Work]:
    shape, size = sizes.shape, sizes.dtype.itemsize
    tile = tuning.decode_tile(shape.head_dim, sizes.dtype)

    def make(rows: int, context: int, seed: int) -> dict[str, Any]:
        sequences = PagedSequences(shape, [context] * rows, block_tokens, sizes.dtype, device.torch, seed)
        return {
            "sequences": sequences,
            "query": sequences.query(rows),
            "q4": sequences.query(rows).unsqueeze(2),
            "k4": torch.stack(sequences.keys).transpose(1, 2).contiguous(),
            "v4": torch.stack(sequences.values).transpose(1, 2).contiguous(),
            "rows": _indices(device, [*range(rows)]),
            "lengths": _indices(device, [context] * rows),
        }

    def run(context: int, inputs: dict[str, Any], rows: slice = slice(None)) -> Tensor:
        sequences = inputs["sequences"]
        return decode_attention(
            inputs["query"][rows], sequences.cache, sequences.tables, inputs["rows"][rows], inputs["lengths"][rows],
            scale_log2=shape.scale_log2, max_length=context, tile=tile,
        )  # fmt: skip

    def expected(context: int, inputs: dict[str, Any]) -> Tensor:
        sequences, query = inputs["sequences"], inputs["query"]
        return torch.cat([sequences.expected(query[i : i + 1], i, context - 1, None) for i in range(len(query))])

    for rows, context in sizes.decode:
        num_bytes = 2 * rows * context * shape.kv_heads * shape.head_dim * size
        yield Work(
            f"decode attention, blocks of {block_tokens}",
            f"{rows} x {context}",
            partial(make, rows, context),
            partial(run, context),
            _sdpa_peers(is_causal=False) if block_tokens == sizes.block_tokens[0] else {},
            partial(expected, context),
            TOLERANCE[sizes.dtype],
            alone=lambda x, context=context: (run(context, x, slice(0, 1)), run(context, x)[:1]),
            bytes=num_bytes,
            input_bytes=2 * num_bytes,
        )


def prefill_works(sizes: Sizes, tuning: Tuning, device: Device, block_tokens: int) -> Iterator[Work]:
    shape = sizes.shape
    tile = tuning.prefill_tile(shape.head_dim, sizes.dtype, is_windowed=False)
    group = shape.heads // shape.kv_heads

    def make(num: int, tokens: int, before: int, seed: int) -> dict[str, Any]:
        sequences = PagedSequences(shape, [before + tokens] * num, block_tokens, sizes.dtype, device.torch, seed)
        query = sequences.query(num * tokens)
        chunks = [Chunk(i * tokens, before, tokens, i) for i in range(num)]
        tail = [Chunk(tokens // 2, before + tokens // 2, tokens - tokens // 2, 0)]
        return {
            "sequences": sequences,
            "query": query,
            "q4": query.view(num, tokens, shape.heads, shape.head_dim).transpose(1, 2),
            "k4": torch.stack(sequences.keys).transpose(1, 2),
            "v4": torch.stack(sequences.values).transpose(1, 2),
            "key": torch.cat(sequences.keys),
            "value": torch.cat(sequences.values),
            "first": _indices(device, [i * (before + tokens) for i in range(num)]).view(-1, 1),
            "tiles": tiles_on(torch.device(device.torch), list_tiles(chunks, group, tile.block_m)),
            "tail": tiles_on(torch.device(device.torch), list_tiles(tail, group, tile.block_m)),
        }

    def paged(inputs: dict[str, Any], tiles: str = "tiles") -> Tensor:
        sequences = inputs["sequences"]
        return paged_prefill_attention(
            inputs["query"], sequences.cache, sequences.tables, inputs[tiles], scale_log2=shape.scale_log2, tile=tile
        )

    def contiguous(inputs: dict[str, Any]) -> Tensor:
        return contiguous_prefill_attention(
            inputs["query"], inputs["key"], inputs["value"], inputs["first"], inputs["tiles"],
            scale_log2=shape.scale_log2, tile=tile,
        )  # fmt: skip

    def expected(tokens: int, before: int, inputs: dict[str, Any]) -> Tensor:
        # In float64 a whole matrix of scores would not fit: some tokens, from both ends.
        part = min(64, tokens)
        query, sequences = inputs["query"], inputs["sequences"]
        first = sequences.expected(query[:part], 0, before, None)
        last = sequences.expected(query[-part:], len(sequences.lengths) - 1, before + tokens - part, None)
        return torch.cat((first, last))

    def ends(tokens: int, found: Tensor) -> Tensor:
        part = min(64, tokens)
        return torch.cat((found[:part], found[-part:]))

    def alone(tokens: int, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # The second half of the first prompt as a chunk of its own.
        part = slice(tokens // 2, tokens)
        return paged(inputs, "tail")[part], paged(inputs)[part]

    shapes = [(num, tokens, 0) for num, tokens in sizes.prefill]
    shapes += [(1, tokens, before) for tokens, before in sizes.chunked]
    for num, tokens, before in shapes:
        pairs = num * (tokens * before + tokens * (tokens + 1) / 2)
        is_first = block_tokens == sizes.block_tokens[0]
        label = f"{num} x {tokens}" + (f" after {before}" if before else "")
        common = Work(
            f"prefill attention, blocks of {block_tokens}",
            label,
            partial(make, num, tokens, before),
            paged,
            {"own_contiguous": contiguous, **(_sdpa_peers(is_causal=True) if is_first and not before else {})},
            partial(expected, tokens, before),
            TOLERANCE[sizes.dtype],
            compared=partial(ends, tokens),
            alone=partial(alone, tokens),
            flops=4 * shape.heads * shape.head_dim * pairs,
        )
        yield common
        if is_first:
            yield dataclasses.replace(
                common, kernel="prefill attention, contiguous", ours=contiguous, alone=None,
                peers=_sdpa_peers(is_causal=True) if not before else {},
            )  # fmt: skip


class Product(NamedTuple):
    """A layer's weights, [out, inner]; gated: gate and up, which meet."""

    name: str
    out: int
    inner: int
    is_gated: bool


def products(sizes: Sizes) -> list[Product]:
    shape = sizes.shape
    heads = shape.heads * shape.head_dim
    return [
        Product("qkv", heads + 2 * shape.kv_heads * shape.head_dim, sizes.hidden, False),
        Product("output", sizes.hidden, heads, False),
        Product("gate and up", 2 * sizes.inner, sizes.hidden, True),
        Product("down", sizes.hidden, sizes.inner, False),
        Product("head", sizes.vocabulary, sizes.hidden, False),
    ]


def gemm_works(sizes: Sizes, tuning: Tuning, device: Device, layers: Sequence[Product]) -> Iterator[Work]:
    size = sizes.dtype.itemsize
    for name, out, inner, is_gated in layers:
        plan = tuning.gemm_plan(out, inner, sizes.dtype)

        def make(rows: int, seed: int, out: int = out, inner: int = inner) -> tuple[Tensor, Tensor]:
            x = _randn(device, sizes.dtype, rows, inner, seed=seed)
            return x, _randn(device, sizes.dtype, out, inner, seed=seed + 1000) / math.sqrt(inner)

        def ours(inputs: tuple[Tensor, Tensor], plan: Any = plan, is_gated: bool = is_gated) -> Tensor:
            return linear(*inputs, None, plan, is_gated=is_gated)

        def vendor(inputs: tuple[Tensor, Tensor], is_gated: bool = is_gated) -> Tensor:
            return _gated(functional.linear(*inputs)) if is_gated else functional.linear(*inputs)

        def expected(inputs: tuple[Tensor, Tensor], is_gated: bool = is_gated) -> Tensor:
            wide = functional.linear(inputs[0].float(), inputs[1].float())
            return _gated(wide) if is_gated else wide

        def alone(inputs: tuple[Tensor, Tensor], ours: Any = ours, plan: Any = plan) -> tuple[Tensor, Tensor]:
            agrees = torch.tensor([probe(inputs[1], plan)])
            whole = ours(inputs)
            same = torch.equal(ours((inputs[0][:1].clone(), inputs[1])), whole[:1])
            return torch.stack((agrees, torch.tensor([same]))), torch.ones(2, 1, dtype=torch.bool)

        for rows in sizes.rows:
            if name == "head" and rows > 128:
                continue
            yield Work(
                f"product, {name} {out} x {inner}",
                f"{rows} rows",
                partial(make, rows),
                ours,
                {"cublas": vendor},
                expected,
                TOLERANCE[sizes.dtype],
                alone=alone,
                bytes=out * inner * size if rows <= 128 else 0,
                flops=2 * rows * out * inner if rows > 128 else 0,
                input_bytes=(out * inner + rows * inner) * size,
            )


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return functional.silu(gate) * up


def _shared(sizes: Sizes, tuning: Tuning, device: Device) -> Iterator[Work]:
    shape = sizes.shape
    tile = tuning.decode_tile(shape.head_dim, sizes.dtype)
    block_tokens = sizes.block_tokens[0]

    def make(rows: int, prefix: int, suffix: int, seed: int) -> dict[str, Any]:
        sequences = PagedSequences(shape, [prefix + suffix] * rows, block_tokens, sizes.dtype, device.torch, seed)
        sequences.tables[:, : prefix // block_tokens] = sequences.tables[0, : prefix // block_tokens]
        plan = plan_prefixes(
            [Group(tuple(range(rows)), prefix // tile.split_tokens)], range(rows), tile.split_tokens,
            rows_per_tile(shape.heads // shape.kv_heads, tile), torch.device(device.torch),
        )  # fmt: skip
        return {
            "query": sequences.query(rows),
            "arguments": (
                sequences.cache, sequences.tables, _indices(device, [*range(rows)]),
                _indices(device, [prefix + suffix] * rows),
            ),
            "plan": plan,
            "options": {"scale_log2": shape.scale_log2, "max_length": prefix + suffix, "tile": tile},
        }  # fmt: skip

    def plain(inputs: dict[str, Any]) -> Tensor:
        return decode_attention(inputs["query"], *inputs["arguments"], **inputs["options"])

    def ours(inputs: dict[str, Any]) -> Tensor:
        return shared_decode_attention(inputs["query"], *inputs["arguments"], inputs["plan"], **inputs["options"])

    for rows, prefix, suffix in sizes.prefixes:
        yield Work(
            "shared prefix",
            f"{rows} rows, prefix {prefix}, suffix {suffix}",
            partial(make, rows, prefix, suffix),
            ours,
            {"own_plain": plain},
            plain,
            TOLERANCE[sizes.dtype],
            bytes=2 * (prefix + rows * suffix) * shape.kv_heads * shape.head_dim * sizes.dtype.itemsize,
        )


def _compiled(device: Device, function: Any) -> Any:
    """torch.compile where it makes GPU kernels; elsewhere its front end alone, for the same path through the bench."""
    return torch.compile(function, backend="inductor" if device.is_gpu else "eager", dynamic=False)


def _pointwise(sizes: Sizes, device: Device) -> Iterator[Work]:
    size, shape, tolerance = sizes.dtype.itemsize, sizes.shape, TOLERANCE[sizes.dtype]
    weight = _randn(device, sizes.dtype, sizes.hidden)

    def torch_norm(x: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, 1e-5)

    def wide_norm(x: Tensor) -> Tensor:
        return functional.rms_norm(x.double(), weight.shape, weight.double(), 1e-5)

    def torch_add_norm(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        total = inputs[0] + inputs[1]
        return total, functional.rms_norm(total, weight.shape, weight, 1e-5)

    rows_of = (1, 64, 16384) if device.is_gpu else (3,)
    for rows in rows_of:
        one = rows * sizes.hidden * size

        def make(seed: int, rows: int = rows) -> Tensor:
            return _randn(device, sizes.dtype, rows, sizes.hidden, seed=seed)

        yield Work(
            "RMSNorm", f"{rows} x {sizes.hidden}", make, lambda x: rms_norm(x, weight, 1e-5),
            {"compiled": _compiled(device, torch_norm)}, wide_norm, tolerance,
            alone=lambda x: (rms_norm(x[:1].clone(), weight, 1e-5), rms_norm(x, weight, 1e-5)[:1]),
            bytes=2 * one, input_bytes=one,
        )  # fmt: skip
        yield Work(
            "add and RMSNorm", f"{rows} x {sizes.hidden}", lambda seed, make=make: (make(seed), make(seed + 99)),
            lambda x: add_rms_norm(x[0], x[1], weight, 1e-5), {"compiled": _compiled(device, torch_add_norm)},
            # The sum was left where x was.
            lambda x: wide_norm(x[0]), tolerance,
            alone=lambda x: (
                add_rms_norm(x[0][:1].clone(), x[1][:1], weight, 1e-5),
                add_rms_norm(x[0].clone(), x[1], weight, 1e-5)[:1],
            ),
            bytes=4 * one, input_bytes=2 * one,
        )  # fmt: skip
        wide = rows * sizes.inner * size
        yield Work(
            "SwiGLU", f"{rows} x {sizes.inner}",
            lambda seed, rows=rows: _randn(device, sizes.dtype, rows, 2 * sizes.inner, seed=seed), silu_mul,
            {"compiled": _compiled(device, _gated)}, lambda x: _gated(x.double()), tolerance,
            alone=lambda x: (silu_mul(x[:1].clone()), silu_mul(x)[:1]), bytes=3 * wide, input_bytes=2 * wide,
        )  # fmt: skip
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        yield Work(
            "RoPE and KV write", f"{rows} rows", partial(_rope_inputs, sizes, device, rows),
            lambda x: rope_store(x[0], None, 1e-5, *x[1:]), expected=_rope_expected, tolerance=tolerance,
            alone=lambda x: (_first_row_of_rope(x, 1), _first_row_of_rope(x, len(x[0]))),
            bytes=2 * rows * width * size, input_bytes=2 * rows * width * size,
        )  # fmt: skip
        table = _randn(device, sizes.dtype, sizes.vocabulary, sizes.hidden)
        yield Work(
            "embedding", f"{rows} rows",
            lambda seed, rows=rows: torch.arange(seed, seed + rows, device=device.torch) % sizes.vocabulary,
            lambda ids, table=table: embed(table, ids), {"torch": lambda ids, table=table: table[ids]},
            lambda ids, table=table: table[ids].double(), bytes=2 * one,
        )  # fmt: skip


def _rope_inputs(sizes: Sizes, device: Device, rows: int, seed: int) -> tuple[Tensor, ...]:
    shape = sizes.shape
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    angle = _randn(device, torch.float32, rows, shape.head_dim // 2, seed=seed)
    blocks = rows // 64 + 1
    cache = torch.zeros(blocks, shape.kv_heads, 2, 64, shape.head_dim, dtype=sizes.dtype, device=device.torch)
    slots = torch.randperm(blocks * 64, device=device.torch)[:rows]
    return _randn(device, sizes.dtype, rows, width, seed=seed), angle.cos(), angle.sin(), cache, slots


def _first_row_of_rope(inputs: tuple[Tensor, ...], rows: int) -> Tensor:
    """What becomes of the first of so many rows: its query, and what is written for it."""
    qkv, cos, sin, cache, slots = inputs
    cache = cache.clone()
    query = rope_store(qkv[:rows].clone(), None, 1e-5, cos[:rows], sin[:rows], cache, slots[:rows])
    block, place = divmod(int(slots[0]), cache.shape[3])
    return torch.cat((query[0].flatten(), cache[block, :, :, place].flatten()))


def _rope_expected(inputs: tuple[Tensor, ...]) -> Tensor:
    qkv, cos, sin, cache, _ = inputs
    kv_heads, head_dim = cache.shape[1], cache.shape[4]
    query = qkv.view(len(qkv), -1, head_dim)[:, : -2 * kv_heads].double()
    first, second = query.chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def _copies(sizes: Sizes, device: Device) -> Iterator[Work]:
    shape = sizes.shape
    layers = 32 if device.is_gpu else 2
    for block_tokens in sizes.block_tokens:
        for tokens in sizes.copied_tokens:
            count = -(-tokens // block_tokens)
            ids = _indices(device, torch.randperm(2 * count)[:count].tolist())
            size = (layers, 2 * count, shape.kv_heads, 2, block_tokens, shape.head_dim)
            cache = torch.zeros(size, dtype=sizes.dtype, device=device.torch)
            staging = _randn(device, sizes.dtype, layers, count, *size[2:])

            def out(_: int, cache: Tensor = cache, ids: Tensor = ids, staging: Tensor = staging) -> Tensor:
                gather_blocks(cache, ids, staging)
                return staging

            def back(_: int, cache: Tensor = cache, ids: Tensor = ids, staging: Tensor = staging) -> Tensor:
                scatter_blocks(staging, ids, cache)
                return cache[:, ids.long()]

            label, num_bytes = f"{tokens} tokens in blocks of {block_tokens}", 2 * staging.nbytes
            yield Work(
                "blocks in", label, lambda seed: seed, back, expected=lambda _, s=staging: s.double(), bytes=num_bytes
            )
            yield Work(
                "blocks out", label, lambda seed: seed, out,
                expected=lambda _, c=cache, i=ids: c[:, i.long()].double(), bytes=num_bytes,
            )  # fmt: skip
