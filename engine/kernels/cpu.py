"""Fast kernels for CPUs, bitwise independent of batch, chunking and phase. Attention is in cpu_attention.py.

What that rests on (torch 2.13, see docs/decisions/0002-exact-on-cpu.md): products of a multiple of 8 rows, elementwise
operations whose vector and scalar paths agree, reductions over the last dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from baton.types import KvLayout
from engine.batch import Batch, Span
from engine.config import ModelConfig
from engine.kernels.cpu_attention import CpuAttention, Workspace
from engine.kernels.interface import Attention, Linear

# Rows probed for bitwise equality: each class of shapes that the product could treat differently.
_PROBE_ROWS = (8, 16, 32, 64, 256)
# Elements of the MLP's activations worked on at a time, so that float32 intermediates stay in cache.
_SILU_ELEMENTS = 1 << 18


class CpuKernels:
    name = "cpu"

    def __init__(self) -> None:
        self._space = Workspace()
        # By (out, in, dtype): whether packed weights exist here and pass the probe.
        self._can_pack: dict[tuple[int, int, torch.dtype], bool] = {}

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        key = (*weight.shape, weight.dtype)
        if key not in self._can_pack:
            self._can_pack[key] = can_pack(weight)
        return PackedLinear(weight, bias) if self._can_pack[key] else PlainLinear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, eps)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        cos, sin = cos[:, None], sin[:, None]
        wide = x.float()
        first, second = wide[..., :half], wide[..., half:]
        out = torch.empty_like(wide)
        torch.mul(first, cos, out=out[..., :half]).sub_(second * sin)
        torch.mul(second, cos, out=out[..., half:]).add_(first * sin)
        return out.to(x.dtype)

    def store(self, keys: Tensor, values: Tensor, cache: Tensor, batch: Batch) -> None:
        head_dim, block_tokens = cache.shape[4], cache.shape[3]
        rows = cache.view(-1, head_dim)
        rows.index_copy_(0, batch.key_rows, keys.reshape(-1, head_dim))
        rows.index_copy_(0, batch.key_rows + block_tokens, values.reshape(-1, head_dim))

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, features = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, features)
        step = max(1, _SILU_ELEMENTS // features)
        for at in range(0, rows, step):
            gate, up = gate_up[at : at + step, :features].float(), gate_up[at : at + step, features:]
            # silu's scalar tail differs from its vector body; each of these operations has one result everywhere.
            scale = gate.neg().exp_().add_(1)
            out[at : at + step] = torch.div(gate, scale, out=scale).mul_(up)
        return out

    def attention(self, config: ModelConfig, layout: KvLayout, spans: tuple[Span, ...]) -> Attention:
        return CpuAttention(config, layout, spans, self._space)


class PlainLinear:
    """torch's own product; the fallback."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)


class PackedLinear:
    """oneDNN's product with the weight laid out once: 1.4 to 2.7 times as fast. Uses private operators of torch."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)  # noqa: SLF001
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")  # noqa: SLF001
        return out


def can_pack(weight: Tensor) -> bool:
    """Whether packed products exist for this shape and dtype here and give a row the same bits in every batch size."""
    try:
        packed = PackedLinear(weight, None)
        x = torch.linspace(-1, 1, _PROBE_ROWS[-1] * weight.shape[1]).view(-1, weight.shape[1]).to(weight.dtype)
        whole = packed(x)
        parts = [packed(x[:rows].contiguous()) for rows in _PROBE_ROWS]
    except (RuntimeError, AttributeError):
        # Absent in this build of torch, or not for this dtype on this processor; the plain product takes over.
        return False
    return all(torch.equal(part, whole[: len(part)]) for part in parts)
