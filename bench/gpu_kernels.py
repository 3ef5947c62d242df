"""The kernel cases of `bench.gpu`: the kernels on the layer shapes of a model, beside their peers.

Inputs are created on demand: a case allocates memory only in ``make``, so that a failure there belongs to that case.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import gpu_sampling
from bench.gpu_measure import Device, Peer, Work
from bench.gpu_sizes import Sizes
from engine.kernels.cases import TOLERANCE, PagedSequences, generator_on
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
    """The first shape of every kernel, then the second: the run may be cut off."""
    kinds = [
        *(decode_works(sizes, tuning, device, block_tokens) for block_tokens in sizes.block_tokens[:1]),
        gemm_works(sizes, tuning, device, products(sizes)),
        *(prefill_works(sizes, tuning, device, block_tokens) for block_tokens in sizes.block_tokens[:1]),
        _norms(sizes, device),
        _activations(sizes, device),
        _ropes(sizes, device),
        gpu_sampling.works(sizes.vocabulary, device, (2,) if sizes.name == "tiny" else (1, 64, 256)),
        _shared(sizes, tuning, device),
        _copies(sizes, device),
        _embeddings(sizes, device),
        *(decode_works(sizes, tuning, device, block_tokens) for block_tokens in sizes.block_tokens[1:]),
        *(prefill_works(sizes, tuning, device, block_tokens) for block_tokens in sizes.block_tokens[1:]),
    ]
    for work in _in_turns(kinds):
        yield dataclasses.replace(work, dtype=work.dtype or sizes.dtype_name)


def _in_turns(kinds: Sequence[Iterator[Work]]) -> Iterator[Work]:
    for turn in itertools.zip_longest(*kinds):
        yield from (work for work in turn if work is not None)


def _randn(device: Device, dtype: torch.dtype, *size: int, seed: int = 0) -> Tensor:
    generator = generator_on(device.torch, seed)
    return torch.randn(size, generator=generator, device=device.torch, dtype=torch.float32).to(dtype)


def _indices(device: Device, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device.torch)


def _sdpa(backend: SDPBackend, inputs: dict[str, Any], *, is_causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(
            inputs["q4"], inputs["k4"], inputs["v4"], is_causal=is_causal, enable_gqa=True
        )


def _sdpa_peers(device: Device, *, is_causal: bool) -> dict[str, Peer]:
    backends = {"sdpa_flash": SDPBackend.FLASH_ATTENTION}
    if device.is_gpu:
        backends["sdpa_cudnn"] = SDPBackend.CUDNN_ATTENTION
    return {name: Peer(partial(_sdpa, backend, is_causal=is_causal)) for name, backend in backends.items()}


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
            _sdpa_peers(device, is_causal=False) if block_tokens == sizes.block_tokens[0] else {},
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
        # A whole score matrix in float64 would not fit: some tokens from both ends are compared.
        part = min(64, tokens)
        query, sequences = inputs["query"], inputs["sequences"]
        first = sequences.expected(query[:part], 0, before, None)
        last = sequences.expected(query[-part:], len(sequences.lengths) - 1, before + tokens - part, None)
        return torch.cat((first, last))

    def ends(tokens: int, found: Tensor) -> Tensor:
        part = min(64, tokens)
        return torch.cat((found[:part], found[-part:]))

    def alone(tokens: int, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # The second half of the first prompt, as a chunk of its own.
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
            # A chunk's queries are the last positions: torch's causal mask would align them with the first.
            {
                "own_contiguous": Peer(contiguous),
                **(_sdpa_peers(device, is_causal=True) if is_first and not before else {}),
            },
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
                peers=_sdpa_peers(device, is_causal=True) if not before else {},
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

        def alone(
            inputs: tuple[Tensor, Tensor], ours: Any = ours, plan: Any = plan, is_gated: bool = is_gated
        ) -> tuple[Tensor, Tensor]:
            same = torch.equal(ours((inputs[0][:1].clone(), inputs[1])), ours(inputs)[:1])
            agrees = probe(inputs[1], plan, is_gated=is_gated)
            return torch.tensor([agrees, same]), torch.ones(2, dtype=torch.bool)

        for rows in sizes.rows:
            if name == "head" and rows > 128:
                continue
            yield Work(
                f"product, {name} {out} x {inner}",
                f"{rows} rows",
                partial(make, rows),
                ours,
                {"cublas": Peer(vendor)},
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
            {"own_plain": Peer(plain)},
            plain,
            TOLERANCE[sizes.dtype],
            bytes=2 * (prefix + rows * suffix) * shape.kv_heads * shape.head_dim * sizes.dtype.itemsize,
        )


def _norms(sizes: Sizes, device: Device) -> Iterator[Work]:
    weight_of = partial(_randn, device, sizes.dtype, sizes.hidden)

    def make(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        x, delta = (_randn(device, sizes.dtype, rows, sizes.hidden, seed=seed + i) for i in (0, 99))
        return x, delta, weight_of()

    def norm(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return rms_norm(inputs[0], inputs[2], 1e-5)

    def torch_norm(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional.rms_norm(inputs[0], inputs[2].shape, inputs[2], 1e-5)

    def wide_norm(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional.rms_norm(inputs[0].double(), inputs[2].shape, inputs[2].double(), 1e-5)

    def add_norm(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return add_rms_norm(*inputs, 1e-5)

    def torch_add_norm(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional.rms_norm(inputs[0] + inputs[1], inputs[2].shape, inputs[2], 1e-5)

    for rows in sizes.pointwise_rows:
        one = rows * sizes.hidden * sizes.dtype.itemsize
        yield Work(
            "RMSNorm", f"{rows} x {sizes.hidden}", partial(make, rows), norm, {"torch": Peer(torch_norm)}, wide_norm,
            TOLERANCE[sizes.dtype], alone=lambda x: (norm((x[0][:1].clone(), *x[1:])), norm(x)[:1]),
            bytes=2 * one, input_bytes=2 * one,
        )  # fmt: skip
        yield Work(
            "add and RMSNorm", f"{rows} x {sizes.hidden}", partial(make, rows), add_norm,
            # The expected result: the kernel writes the sum in place of x.
            {"torch": Peer(torch_add_norm)}, wide_norm, TOLERANCE[sizes.dtype],
            alone=lambda x: (
                add_norm((x[0][:1].clone(), x[1][:1], x[2])), add_norm((x[0].clone(), *x[1:]))[:1],
            ),
            bytes=4 * one, input_bytes=2 * one,
        )  # fmt: skip


def _activations(sizes: Sizes, device: Device) -> Iterator[Work]:
    for rows in sizes.pointwise_rows:
        wide = rows * sizes.inner * sizes.dtype.itemsize
        yield Work(
            "SwiGLU", f"{rows} x {sizes.inner}",
            lambda seed, rows=rows: _randn(device, sizes.dtype, rows, 2 * sizes.inner, seed=seed), silu_mul,
            {"torch": Peer(_gated)}, lambda x: _gated(x.double()), TOLERANCE[sizes.dtype],
            alone=lambda x: (silu_mul(x[:1].clone()), silu_mul(x)[:1]), bytes=3 * wide, input_bytes=2 * wide,
        )  # fmt: skip


def _ropes(sizes: Sizes, device: Device) -> Iterator[Work]:
    width = (sizes.shape.heads + 2 * sizes.shape.kv_heads) * sizes.shape.head_dim
    for rows in sizes.pointwise_rows:
        num_bytes = 2 * rows * width * sizes.dtype.itemsize
        yield Work(
            "RoPE and KV write", f"{rows} rows", partial(_rope_inputs, sizes, device, rows),
            lambda x: rope_store(x[0], None, 1e-5, *x[1:]), expected=_rope_expected, tolerance=TOLERANCE[sizes.dtype],
            alone=lambda x: (_first_row_of_rope(x, 1), _first_row_of_rope(x, len(x[0]))),
            bytes=num_bytes, input_bytes=num_bytes,
        )  # fmt: skip


def _embeddings(sizes: Sizes, device: Device) -> Iterator[Work]:
    table_bytes = sizes.vocabulary * sizes.hidden * sizes.dtype.itemsize

    def make(rows: int, seed: int) -> tuple[Tensor, Tensor]:
        ids = torch.arange(seed, seed + rows, device=device.torch) % sizes.vocabulary
        return _randn(device, sizes.dtype, sizes.vocabulary, sizes.hidden), ids

    for rows in sizes.pointwise_rows:
        yield Work(
            "embedding", f"{rows} rows", partial(make, rows), lambda x: embed(*x),
            {"torch": Peer(lambda x: x[0][x[1]])}, lambda x: x[0][x[1]].double(),
            bytes=2 * rows * sizes.hidden * sizes.dtype.itemsize,
            # Random numbers in float32. A table is larger than the cache, so one is enough.
            needs_bytes=4 * table_bytes,
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
    """The first row of a batch of this size: its query, and the cache bytes written for it."""
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

    def make(tokens: int, block_tokens: int, _: int) -> tuple[Tensor, Tensor, Tensor]:
        """(cache, ids, staging)"""
        count = -(-tokens // block_tokens)
        ids = _indices(device, torch.randperm(2 * count, generator=generator_on("cpu", 0))[:count].tolist())
        block = (shape.kv_heads, 2, block_tokens, shape.head_dim)
        cache = torch.zeros(sizes.num_layers, 2 * count, *block, dtype=sizes.dtype, device=device.torch)
        return cache, ids, _randn(device, sizes.dtype, sizes.num_layers, count, *block)

    def out(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        gather_blocks(*inputs)
        return inputs[2]

    def back(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        cache, ids, staging = inputs
        scatter_blocks(staging, ids, cache)
        return inputs

    def torch_copy(inputs: tuple[Tensor, Tensor, Tensor]) -> object:
        cache, _, staging = inputs
        return staging.copy_(cache[:, : staging.shape[1]])

    for block_tokens, tokens in itertools.product(sizes.block_tokens, sizes.copied_tokens):
        block_bytes = sizes.num_layers * shape.kv_heads * 2 * block_tokens * shape.head_dim * sizes.dtype.itemsize
        num_bytes = -(-tokens // block_tokens) * block_bytes
        common = Work(
            "blocks in", f"{tokens} tokens in blocks of {block_tokens}", partial(make, tokens, block_tokens), back,
            {"torch_copy": Peer(torch_copy)}, expected=lambda x: x[2], compared=lambda x: x[0][:, x[1].long()],
            # The check runs in float64.
            bytes=2 * num_bytes, needs_bytes=16 * num_bytes,
        )  # fmt: skip
        yield common
        yield dataclasses.replace(
            common, kernel="blocks out", ours=out, expected=lambda x: x[0][:, x[1].long()], compared=lambda found: found
        )
