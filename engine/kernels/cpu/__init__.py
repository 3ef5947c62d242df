"""CPU kernels, compiled at start-up: a row's result is bitwise independent of batch, chunking and phase.

No product, softmax or sum depends on the number of rows beside a row: see linear.py, attention.py and
docs/decisions/0002-exact-on-cpu.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.types import KvLayout
from engine.batch import PieceRows
from engine.kernels.cpu.attention import CpuAttention, query_scale, tables_of, tiles_of
from engine.kernels.cpu.linear import CpuLinear
from engine.kernels.cpu.linear_int8 import CpuLinearInt8
from engine.kernels.cpu.llvm import Isa
from engine.kernels.cpu.logits import summarize
from engine.kernels.cpu.long_attention import LongAttention
from engine.kernels.cpu.onednn import OneDnnLinear, has_matrix_units, is_exact
from engine.kernels.cpu.pointwise import rms_norm, rope_store, silu_mul, take_rows
from engine.kernels.cpu.program import Tape
from engine.kernels.cpu.slabs import Slabs
from engine.kernels.cpu.step import StepRecorder
from engine.kernels.int8 import MODE
from engine.kernels.interface import Attention, Linear, Recorder
from engine.kv_cache import KvCache
from engine.model_config import ModelConfig


class CpuKernels:
    """``isa`` other than the host's, and ``uses_onednn`` other than None (decide by the processor), are for tests.
    With oneDNN, bfloat16 products use it where they are exact."""

    device = torch.device("cpu")
    phases_agree = True

    def __init__(self, isa: Isa | None = None, *, uses_onednn: bool | None = None, quantization: str = "none") -> None:
        self._isa = isa or Isa.of_host()
        self.quantization = quantization
        wants_onednn = has_matrix_units() if uses_onednn is None else uses_onednn
        self._uses_onednn = quantization == "none" and wants_onednn and is_exact()
        # Runs operations at once, or records them (step.py).
        self.tape = Tape()
        self._slabs = Slabs()
        # The rounding of some sums depends on the vector width, so it is part of the name: nodes with other widths
        # refuse each other.
        products = f"-{MODE}" if quantization == "int8" else "-onednn" if self._uses_onednn else ""
        self.name = f"cpu-{self._isa.name}{products}"

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if self._uses_onednn and weight.dtype == torch.bfloat16:
            return OneDnnLinear(self.tape, weight, bias)
        kind = CpuLinearInt8 if self.quantization == "int8" else CpuLinear
        return kind(self._isa, self.tape, self._slabs, weight, bias)

    def embed(self, table: Tensor, token_ids: Tensor, drawn: Tensor | None) -> Tensor:
        assert drawn is None, "the host draws"
        return self.take_rows(table, token_ids)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """x[rows], rows int64."""
        return take_rows(self._isa, self.tape, x, rows)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(self._isa, self.tape, x, None, weight, eps)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(self._isa, self.tape, x, delta, weight, eps)

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
        scale = query_scale(cache.shape[4])
        return rope_store(self._isa, self.tape, qkv, norms, eps, cos, sin, cache, slot_mapping, scale)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(self._isa, self.tape, gate_up)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        linear = self.linear(weight, bias)
        return lambda x: self.silu_mul(linear(x))

    def attention(self, config: ModelConfig, layout: KvLayout, pieces: tuple[PieceRows, ...]) -> Attention:
        block_ids, begins = tables_of(pieces)
        tiles = tiles_of(pieces, begins, config.group_size)
        return self.tiled_attention(config, layout, torch.tensor(tiles), torch.tensor(block_ids), len(tiles))

    def tiled_attention(
        self,
        config: ModelConfig,
        layout: KvLayout,
        tiles: Tensor,
        block_ids: Tensor,
        count: int,
        long: LongAttention | None = None,
    ) -> Attention:
        return CpuAttention(self._isa, self.tape, config, layout, tiles, block_ids, count, long)

    def long_attention(
        self, config: ModelConfig, layout: KvLayout, tiles: Tensor, pieces: Tensor, block_ids: Tensor, room: int
    ) -> LongAttention:
        return LongAttention(self._isa, layout, config.group_size, tiles, pieces, block_ids, room)

    def summarize(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """In float32, and what ``peaks_of`` reads."""
        return summarize(self._isa, self.tape, logits)

    def recorder(self, config: ModelConfig, cache: KvCache) -> Recorder:
        return StepRecorder(self, config, cache)
