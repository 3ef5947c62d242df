"""The Triton kernels behind the engine's interface: chooses the kernel for each call and builds a step's index tensors.

Exact where GPUs can be: a token of the prompt goes through the prefill kernel whatever its chunk, a generated token
through the decode kernel, also when a sequence is computed again after a failure (its generated tokens are then rows of
one decode launch). The two kernels add in different orders, so the phase, not the number of tokens, selects the kernel.
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
from engine.batch import PieceRows
from engine.cost import CostModel
from engine.devices import Devices, seen_gpus
from engine.kernels.interface import Attention, LaunchShapes, Linear
from engine.kernels.triton.decode_attention import decode_attention
from engine.kernels.triton.gemm import first_rows, linear, probe
from engine.kernels.triton.pointwise import add_rms_norm, embed, rms_norm, rope_store, silu_mul
from engine.kernels.triton.prefill_attention import Chunk, list_tiles, paged_prefill_attention, tiles_on
from engine.kernels.triton.sampling import TritonSampler
from engine.kernels.triton.shared_prefix import (
    MIN_SAVED_BYTES,
    Group,
    SharedPlan,
    find_groups,
    is_worth_queueing,
    plan_prefixes,
    rows_per_tile,
    saved_bytes,
    shared_decode_attention,
)
from engine.kernels.triton.tuning import DecodeTile, GemmPlan, Tuning, load
from engine.kv_cache import TORCH_DTYPES
from engine.model_config import ModelConfig
from engine.staging import to_device


class TritonKernels:
    """``is_probing``: test on the hardware, per shape of weights, whether both product kernels agree bit for bit.

    Without ``is_batch_invariant``, products of many rows are the vendor's where the tuning says so, and prefixes that
    rows share are read once where a gain is predicted. Then a row's bits depend on the other rows: the interface's law
    does not hold.
    """

    quantization = "none"
    # Prefill and decode kernels add in different orders.
    phases_agree = False

    def __init__(
        self, tuning: Tuning, device: torch.device, *, is_probing: bool = True, is_batch_invariant: bool = True
    ) -> None:
        self.device = device
        self.is_compiled = not triton.knobs.runtime.interpret
        # The rounding of some sums depends on the tiles, so they are part of the name: nodes with other tiles refuse
        # each other.
        self.name = f"triton-{tuning.digest}" + ("" if is_batch_invariant else "-vendor")
        self._tuning = tuning
        self._is_batch_invariant = is_batch_invariant
        self._is_probing = is_probing
        self._plans: dict[tuple[int, int, torch.dtype, bool], GemmPlan] = {}

    @classmethod
    def on_this_machine(
        cls, devices: Devices, index: int | None = 0, *, is_batch_invariant: bool = True
    ) -> TritonKernels:
        """On the GPU with this index, or under TRITON_INTERPRET=1 on the CPU. Raises BadConfig if neither is
        available; ``index`` None means the CPU."""
        if triton.knobs.runtime.interpret:
            tuning = load("interpreter", (8, 0), 1)
            return cls(tuning, torch.device("cpu"), is_batch_invariant=is_batch_invariant)
        if index is None or index >= devices.num_gpus:
            raise BadConfig(
                f"kernels triton need an NVIDIA GPU, and {'device is cpu' if index is None else seen_gpus(devices)}; "
                "TRITON_INTERPRET=1 tries them without",
                param="kernels",
            )
        has = devices.look(index)
        tuning = load(has.gpu or "", has.capability, has.num_multiprocessors)
        return cls(tuning, torch.device("cuda", index), is_batch_invariant=is_batch_invariant)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return TritonLinear(weight.contiguous(), bias, self._plan(weight, is_gated=False), is_gated=False)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return TritonLinear(weight.contiguous(), bias, self._plan(weight, is_gated=True), is_gated=True)

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

    def attention(self, config: ModelConfig, layout: KvLayout, pieces: tuple[PieceRows, ...]) -> Attention:
        return TritonAttention(
            config, layout, pieces, self._tuning, self.device, can_share_prefixes=not self._is_batch_invariant
        )

    def device_decode(
        self, config: ModelConfig, layout: KvLayout, tables: Tensor, lengths: Tensor, max_length: int
    ) -> Attention:
        return DeviceDecode(config, layout, tables, lengths, max_length, self._tuning)

    def sampler(self, max_rows: int, vocab_size: int) -> TritonSampler:
        return TritonSampler(max_rows, vocab_size, self.device)

    def launch_shapes(self, config: ModelConfig, layout: KvLayout) -> LaunchShapes:
        """Numbers that change from step to step are not specialized, so the kinds are: tiles of products by rows,
        and decode attention with and without parts to combine."""
        rows = sorted({1, *(size for plan in self._plans.values() for size in first_rows(plan))})
        split = self._tuning.decode_tile(config.head_dim, TORCH_DTYPES[layout.dtype]).split_tokens
        decodes = [*((size, 2) for size in rows), (1, split + 1)]
        if self._can_share(config):
            # Few rows that share much, and many that share little: some of them fit into the limits.
            wanted = -(-MIN_SAVED_BYTES // (_token_bytes(layout) * split))
            decodes += [(n, split * -(-wanted // (n // 2)) + 1) for n in (2, 4, 8, 16, 32, 64, 128, 256)]
        return LaunchShapes(tuple(rows), tuple(decodes))

    def prefers_unrecorded(
        self, config: ModelConfig, layout: KvLayout, tables: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> bool:
        """Recorded steps read a shared prefix once for every row."""
        if not self._can_share(config):
            return False
        tile = self._tuning.decode_tile(config.head_dim, TORCH_DTYPES[layout.dtype])
        groups, saved = _shared(tables, lengths, config, layout, tile)
        if not groups:
            return False
        cost = CostModel.of(config, layout.dtype, self.quantization)
        kv_tokens = sum(sum(min(length, window or length) for length in lengths) for window in config.windows)
        step_bytes = cost.layer_weight_bytes + cost.head_weight_bytes + kv_tokens * _token_bytes(layout)
        return is_worth_queueing(step_bytes, saved, config.num_layers, config.windows.count(None))

    def _can_share(self, config: ModelConfig) -> bool:
        return not self._is_batch_invariant and None in config.windows

    def _plan(self, weight: Tensor, *, is_gated: bool) -> GemmPlan:
        key = (weight.shape[0], weight.shape[1], weight.dtype, is_gated)
        if key not in self._plans:
            plan = self._tuning.gemm_plan(*key[:3])
            if self._is_batch_invariant:
                plan = replace(plan, vendor_from_rows=None)
            agrees = not self._is_probing or probe(weight.contiguous(), plan, is_gated=is_gated)
            self._plans[key] = plan if agrees else plan.one_kernel()
        return self._plans[key]


@dataclass(frozen=True, slots=True)
class TritonLinear:
    """One layer: its weight as in the checkpoint, and the plan for its product."""

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
    """Decode attention of a step whose inputs stay at their addresses on the device while their values change."""

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


def _token_bytes(layout: KvLayout) -> int:
    """Bytes of keys and values of one token in one layer."""
    return layout.block_bytes // layout.block_tokens


def _shared(
    tables: Sequence[Sequence[int]], lengths: Sequence[int], config: ModelConfig, layout: KvLayout, tile: DecodeTile
) -> tuple[list[Group], int]:
    """PieceRows that share prefixes, and the bytes of a layer that need not be read; none if it does not pay."""
    tile_rows = rows_per_tile(config.group_size, tile)
    groups = find_groups(tables, lengths, layout.block_tokens, tile.split_tokens, tile_rows)
    saved = saved_bytes(groups, _token_bytes(layout), tile.split_tokens, tile_rows)
    return (groups, saved) if saved >= MIN_SAVED_BYTES else ([], 0)


@dataclass(frozen=True, slots=True)
class _Decodes:
    """PieceRows that hold generated tokens."""

    rows: Tensor  # [decodes] int64
    table_rows: Tensor  # [decodes] int32
    lengths: Tensor  # [decodes] int32
    max_length: int
    # All rows of the step are decodes, in order.
    is_everything: bool


class TritonAttention:
    """One step: prompt tokens in tiles of the prefill kernel, generated tokens as rows of the decode kernel."""

    def __init__(
        self,
        config: ModelConfig,
        layout: KvLayout,
        pieces: Sequence[PieceRows],
        tuning: Tuning,
        device: torch.device,
        *,
        can_share_prefixes: bool,
    ) -> None:
        self._config = config
        self._tuning = tuning
        self._device = device
        self._dtype = TORCH_DTYPES[layout.dtype]
        self._scale_log2 = math.log2(math.e) / math.sqrt(config.head_dim)
        self._tables = _block_tables(pieces, device)
        self._chunks, listed = _by_phase(pieces)
        self._decodes = _decodes_on(device, self._chunks, listed) if listed else None
        self._tile = tuning.decode_tile(config.head_dim, self._dtype)
        self._prefixes: SharedPlan | None = None
        if can_share_prefixes and listed and None in config.windows:
            table_rows = [sequence for _, sequence, _ in listed]
            tables = [pieces[sequence].block_ids for sequence in table_rows]
            groups, _ = _shared(tables, [length for *_, length in listed], config, layout, self._tile)
            if groups:
                rows = rows_per_tile(config.group_size, self._tile)
                self._prefixes = plan_prefixes(groups, table_rows, self._tile.split_tokens, rows, device)
        # By tile height: layers with and without a window may differ.
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
        chosen, to = (queries, out) if rows.is_everything else (queries[rows.rows], None)
        if self._prefixes is not None and window is None:
            found = shared_decode_attention(
                chosen, cache, self._tables, rows.table_rows, rows.lengths, self._prefixes,
                scale_log2=self._scale_log2, max_length=rows.max_length, tile=self._tile, out=to,
            )  # fmt: skip
        else:
            found = decode_attention(
                chosen, cache, self._tables, rows.table_rows, rows.lengths,
                scale_log2=self._scale_log2, max_length=rows.max_length, window=window, tile=self._tile, out=to,
            )  # fmt: skip
        if not rows.is_everything:
            out[rows.rows] = found


def _block_tables(pieces: Sequence[PieceRows], device: torch.device) -> Tensor:
    """[pieces, longest] int32; missing entries are never read."""
    table = np.zeros((len(pieces), max(len(piece.block_ids) for piece in pieces)), dtype=np.int32)
    for i, piece in enumerate(pieces):
        table[i, : len(piece.block_ids)] = piece.block_ids
    return to_device(torch.from_numpy(table), device)


def _by_phase(pieces: Sequence[PieceRows]) -> tuple[list[Chunk], list[tuple[int, int, int]]]:
    """Chunks of prompts, and of generated tokens (row, piece, positions that it sees)."""
    chunks: list[Chunk] = []
    rows: list[tuple[int, int, int]] = []
    for i, piece in enumerate(pieces):
        prompt = min(piece.num_tokens, max(0, piece.num_prompt_tokens - piece.start))
        if prompt:
            chunks.append(Chunk(piece.row, piece.start, prompt, i))
        rows += [(piece.row + j, i, piece.start + j + 1) for j in range(prompt, piece.num_tokens)]
    return chunks, rows


def _decodes_on(device: torch.device, chunks: list[Chunk], rows: list[tuple[int, int, int]]) -> _Decodes:
    listed = torch.tensor(rows).T
    return _Decodes(
        rows=to_device(listed[0], device),
        table_rows=to_device(listed[1].int(), device),
        lengths=to_device(listed[2].int(), device),
        max_length=max(length for _, _, length in rows),
        is_everything=not chunks and [row for row, _, _ in rows] == list(range(len(rows))),
    )
