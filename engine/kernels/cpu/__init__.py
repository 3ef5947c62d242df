"""Fast kernels for CPUs, written for Baton and compiled at start-up; bitwise independent of batch, chunking and phase.

No product, no softmax and no sum here depends on how many rows stand beside a row: see linear.py and attention.py, and
docs/decisions/0002-exact-on-cpu.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.types import KvLayout
from engine.batch import Span
from engine.config import ModelConfig
from engine.kernels.cpu.attention import CpuAttention, query_scale
from engine.kernels.cpu.linear import CpuLinear
from engine.kernels.cpu.llvm import Isa
from engine.kernels.cpu.pointwise import rms_norm, rope_store, silu_mul
from engine.kernels.interface import Attention, Linear


class CpuKernels:
    """``isa`` other than the host's is for tests."""

    device = torch.device("cpu")

    def __init__(self, isa: Isa | None = None) -> None:
        self._isa = isa or Isa.of_host()
        # Vector widths decide how some sums are rounded, so nodes with other vectors are told apart by name.
        self.name = f"cpu-{self._isa.name}"

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return CpuLinear(self._isa, weight, bias)

    def embed(self, table: Tensor, token_ids: Tensor, drawn: Tensor | None) -> Tensor:
        assert drawn is None, "the host draws"
        return table[token_ids]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(self._isa, x, None, weight, eps)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(self._isa, x, delta, weight, eps)

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
        return rope_store(self._isa, qkv, norms, eps, cos, sin, cache, slot_mapping, query_scale(cache.shape[4]))

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(self._isa, gate_up)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        linear = self.linear(weight, bias)
        return lambda x: self.silu_mul(linear(x))

    def attention(self, config: ModelConfig, layout: KvLayout, spans: tuple[Span, ...]) -> Attention:
        return CpuAttention(self._isa, config, layout, spans)
