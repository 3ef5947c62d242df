"""Baton's kernels for GPUs behind the engine's interface. Owns the choice of kernel and a step's index tensors.

Exact where GPUs can be: a token of the prompt goes through the prefill kernel whatever its chunk, a generated token
through the decode kernel, also when a sequence is taken up again after a failure (its generated tokens then are rows of
one decode launch). The two kernels add in different orders, so the phase, not the number of tokens, decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
from torch import Tensor

from baton.errors import BadConfig
from baton.types import KvLayout
from engine.batch import Span
from engine.config import ModelConfig
from engine.kernels.interface import Attention, Draws, Linear
from engine.kernels.triton.decode_attention import decode_attention
from engine.kernels.triton.gemm import linear, probe
from engine.kernels.triton.pointwise import add_rms_norm, embed, rms_norm, rope_store, silu_mul
from engine.kernels.triton.prefill_attention import Chunk, list_tiles, paged_prefill_attention, tiles_on
from engine.kernels.triton.sampling import sample
from engine.kernels.triton.tuning import GemmPlan, Tuning, load
from engine.kv_cache import TORCH_DTYPES
from engine.staging import to_device


class TritonKernels:
    """``is_probing``: ask the hardware, per shape of weights, whether both kernels of products agree bit for bit.

    Without ``is_batch_invariant`` products of many rows are the vendor's where the tuning says so, and a row's bits
    depend on the rows beside it: the interface's law does not hold.
    """

    def __init__(
        self, tuning: Tuning, device: torch.device, *, is_probing: bool = True, is_batch_invariant: bool = True
    ) -> None:
        self.device = device
        # Tiles decide how some sums are rounded, so nodes with other tiles are told apart by name.
        self.name = f"triton-{tuning.digest}" + ("" if is_batch_invariant else "-vendor")
        self._tuning = tuning
        self._is_batch_invariant = is_batch_invariant
        self._is_probing = is_probing
        self._plans: dict[tuple[int, int, torch.dtype], GemmPlan] = {}

    @classmethod
    def on_this_machine(cls, *, is_batch_invariant: bool = True) -> TritonKernels:
        """On the GPU, or under TRITON_INTERPRET=1 on the CPU. Raises BadConfig where neither is to be had."""
        if triton.knobs.runtime.interpret:
            tuning = load("interpreter", (8, 0), 1)
            return cls(tuning, torch.device("cpu"), is_batch_invariant=is_batch_invariant)
        if not torch.cuda.is_available():
            raise BadConfig(
                "kernels triton need an NVIDIA GPU, or TRITON_INTERPRET=1 to try them without", param="kernels"
            )
        device = torch.device("cuda", torch.cuda.current_device())
        has = torch.cuda.get_device_properties(device)
        tuning = load(has.name, (has.major, has.minor), has.multi_processor_count)
        return cls(tuning, device, is_batch_invariant=is_batch_invariant)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return TritonLinear(weight.contiguous(), bias, self._plan(weight), is_gated=False)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return TritonLinear(weight.contiguous(), bias, self._plan(weight), is_gated=True)

    def embed(self, table: Tensor, token_ids: Tensor, drawn: Tensor | None) -> Tensor:
        return embed(table, token_ids, drawn)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return add_rms_norm(x, delta, weight, eps)

    def rope_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        return rope_store(qkv, norms, eps, cos, sin, cache, slot_mapping)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)

    def attention(self, config: ModelConfig, layout: KvLayout, spans: tuple[Span, ...]) -> Attention:
        return TritonAttention(config, layout, spans, self._tuning, self.device)

    def device_decode(
        self, config: ModelConfig, layout: KvLayout, tables: Tensor, lengths: Tensor, max_length: int
    ) -> Attention:
        return DeviceDecode(config, layout, tables, lengths, max_length, self._tuning)

    def draw(self, logits: Tensor, draws: Draws) -> Tensor:
        return sample(logits, draws)

    def _plan(self, weight: Tensor) -> GemmPlan:
        key = (weight.shape[0], weight.shape[1], weight.dtype)
        if key not in self._plans:
            plan = self._tuning.gemm_plan(*key)
            if self._is_batch_invariant:
                plan = replace(plan, vendor_from_rows=None)
            agrees = not self._is_probing or probe(weight.contiguous(), plan)
            self._plans[key] = plan if agrees else plan.one_kernel()
        return self._plans[key]


@dataclass(frozen=True, slots=True)
class TritonLinear:
    """One layer: its weight as the checkpoint has it, and how it is multiplied."""

    weight: Tensor
    bias: Tensor | None
    plan: GemmPlan
    is_gated: bool

    def __call__(self, x: Tensor) -> Tensor:
        vendor_from_rows = self.plan.vendor_from_rows
        if vendor_from_rows is None or len(x) < vendor_from_rows:
            return linear(x, self.weight, self.bias, self.plan, is_gated=self.is_gated)
        product = torch.nn.functional.linear(x, self.weight, self.bias)
        return silu_mul(product) if self.is_gated else product


class DeviceDecode:
    """Decode attention of a step whose inputs stay where they are on the device while their values change."""

    def __init__(
        self, config: ModelConfig, layout: KvLayout, tables: Tensor, lengths: Tensor, max_length: int, tuning: Tuning
    ) -> None:
        self._tile = tuning.decode_tile(config.head_dim, TORCH_DTYPES[layout.dtype])
        self._scale_log2 = math.log2(math.e) / math.sqrt(config.head_dim)
        self._tables = tables
        self._lengths = lengths
        self._max_length = max_length
        self._table_rows = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)

    def __call__(self, queries: Tensor, cache: Tensor, window: int | None) -> Tensor:
        return decode_attention(
            queries, cache, self._tables, self._table_rows, self._lengths,
            scale_log2=self._scale_log2, max_length=self._max_length, window=window, tile=self._tile,
        ).flatten(1)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Rows that hold generated tokens."""

    rows: Tensor  # [decodes] int64
    table_rows: Tensor  # [decodes] int32
    lengths: Tensor  # [decodes] int32
    max_length: int
    # All rows of the step are decodes, in order.
    is_everything: bool


class TritonAttention:
    """One step: prompt tokens in tiles of the prefill kernel, generated tokens as rows of the decode kernel."""

    def __init__(
        self, config: ModelConfig, layout: KvLayout, spans: Sequence[Span], tuning: Tuning, device: torch.device
    ) -> None:
        self._config = config
        self._tuning = tuning
        self._device = device
        self._dtype = TORCH_DTYPES[layout.dtype]
        self._scale_log2 = math.log2(math.e) / math.sqrt(config.head_dim)
        self._tables = _block_tables(spans, device)
        self._chunks, self._decodes = _by_phase(spans, device)
        # By height of a tile: layers with and without a window may differ.
        self._tiles: dict[int, Tensor] = {}

    def __call__(self, queries: Tensor, cache: Tensor, window: int | None) -> Tensor:
        out = torch.empty_like(queries)
        if self._chunks:
            self._prefill(queries, cache, window, out)
        if self._decodes is not None:
            self._decode(self._decodes, queries, cache, window, out)
        return out.flatten(1)

    def _prefill(self, queries: Tensor, cache: Tensor, window: int | None, out: Tensor) -> None:
        tile = self._tuning.prefill_tile(self._config.head_dim, self._dtype, is_windowed=window is not None)
        if tile.block_m not in self._tiles:
            listed = list_tiles(self._chunks, self._config.group_size, tile.block_m)
            self._tiles[tile.block_m] = tiles_on(self._device, listed)
        paged_prefill_attention(
            queries, cache, self._tables, self._tiles[tile.block_m],
            scale_log2=self._scale_log2, tile=tile, window=window, out=out,
        )  # fmt: skip

    def _decode(self, rows: _Decodes, queries: Tensor, cache: Tensor, window: int | None, out: Tensor) -> None:
        found = decode_attention(
            queries if rows.is_everything else queries[rows.rows], cache, self._tables, rows.table_rows, rows.lengths,
            scale_log2=self._scale_log2, max_length=rows.max_length, window=window,
            tile=self._tuning.decode_tile(self._config.head_dim, self._dtype), out=out if rows.is_everything else None,
        )  # fmt: skip
        if not rows.is_everything:
            out[rows.rows] = found


def _block_tables(spans: Sequence[Span], device: torch.device) -> Tensor:
    """[spans, longest] int32; what a span lacks is never read."""
    table = np.zeros((len(spans), max(len(span.block_ids) for span in spans)), dtype=np.int32)
    for i, span in enumerate(spans):
        table[i, : len(span.block_ids)] = span.block_ids
    return to_device(torch.from_numpy(table), device)


def _by_phase(spans: Sequence[Span], device: torch.device) -> tuple[list[Chunk], _Decodes | None]:
    chunks: list[Chunk] = []
    rows: list[tuple[int, int, int]] = []
    for i, span in enumerate(spans):
        prompt = min(span.num_tokens, max(0, span.num_prompt_tokens - span.start))
        if prompt:
            chunks.append(Chunk(span.row, span.start, prompt, i))
        rows += [(span.row + j, i, span.start + j + 1) for j in range(prompt, span.num_tokens)]
    if not rows:
        return chunks, None
    listed = torch.tensor(rows).T
    return chunks, _Decodes(
        rows=to_device(listed[0], device),
        table_rows=to_device(listed[1].int(), device),
        lengths=to_device(listed[2].int(), device),
        max_length=max(length for _, _, length in rows),
        is_everything=not chunks and [row for row, _, _ in rows] == list(range(len(rows))),
    )
