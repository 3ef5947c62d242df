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
from engine.kernels.cpu_attention import CpuAttention, Workspace, can_turn, loop_length, query_scale
from engine.kernels.interface import Attention, Linear
from engine.kv_cache import TORCH_DTYPES

# Rows probed for bitwise equality: each class of shapes that the product could treat differently.
_PROBE_ROWS = (8, 16, 32, 64, 256)
# Elements worked on at a time, so that float32 intermediates stay in cache.
_CACHED_ELEMENTS = 1 << 18


class CpuKernels:
    name = "cpu"

    def __init__(self) -> None:
        self._space = Workspace()
        # By (head_dim, block_tokens, dtype): whether products of keys and queries may be turned round.
        self._can_turn: dict[tuple[int, int, str], bool] = {}
        # By (out, in, dtype): whether packed weights exist here and pass the probe.
        self._can_pack: dict[tuple[int, int, torch.dtype], bool] = {}

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        key = (*weight.shape, weight.dtype)
        if key not in self._can_pack:
            self._can_pack[key] = can_pack(weight)
        return PackedLinear(weight, bias) if self._can_pack[key] else PlainLinear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, eps)

    def query_scale(self, head_dim: int) -> float:
        return query_scale(head_dim)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, heads, half = len(x), x.shape[1], x.shape[2] // 2
        out = x.new_empty(x.shape)
        step = max(1, _CACHED_ELEMENTS // (heads * half))
        for at in range(0, rows, step):
            part = slice(at, at + step)
            c, s = cos[part, None], sin[part, None]
            first, second = x[part, :, :half].float(), x[part, :, half:].float()
            out[part, :, :half] = (first * c).sub_(second * s)
            out[part, :, half:] = second.mul(c).add_(first * s)
        return out

    def store(self, keys: Tensor, values: Tensor, cache: Tensor, batch: Batch) -> None:
        head_dim, block_tokens = cache.shape[4], cache.shape[3]
        rows = cache.view(-1, head_dim)
        rows.index_copy_(0, batch.key_rows, keys.reshape(-1, head_dim))
        rows.index_copy_(0, batch.key_rows + block_tokens, values.reshape(-1, head_dim))

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, features = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, features)
        step = max(1, _CACHED_ELEMENTS // features)
        for at in range(0, rows, step):
            part = gate_up[at : at + step]
            size = len(part) * features
            # silu of a scalar remainder differs in the last bit; of this length there is none.
            whole = self._space.take("gate", torch.float32, loop_length(size, torch.get_num_threads()))
            gate = whole[:size].view(-1, features)
            gate.copy_(part[:, :features])
            functional.silu(whole, inplace=True)
            out[at : at + step] = gate.mul_(part[:, features:])
        return out

    def attention(self, config: ModelConfig, layout: KvLayout, spans: tuple[Span, ...]) -> Attention:
        key = (layout.head_dim, layout.block_tokens, layout.dtype)
        if key not in self._can_turn:
            self._can_turn[key] = can_turn(layout.head_dim, layout.block_tokens, TORCH_DTYPES[layout.dtype])
        return CpuAttention(config, layout, spans, self._space, turns=self._can_turn[key])


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
