"""Reference kernels in plain torch: one formula per operation, the definition that all other kernels are tested
against.

Attention computes each token over exactly its own context, without masks, so batch, chunks and phase cannot affect a
result. Slow by design.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from baton.types import KvLayout
from engine.batch import PieceRows
from engine.kernels.int8 import MODE, quantized, quantized_rows
from engine.kernels.interface import Attention, Linear
from engine.model_config import ModelConfig

# torch's product gives a row the same bits for any batch only if the number of rows is a multiple of this.
_ROW_MULTIPLE = 8


class ReferenceKernels:
    name = "reference"
    quantization = "none"
    phases_agree = True
    device = torch.device("cpu")

    def __init__(self, *, quantization: str = "none") -> None:
        if quantization == "int8":
            self.quantization, self.name = quantization, f"reference-{MODE}"

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if self.quantization == "int8":
            return _int8_linear(weight, bias)
        weight = weight.contiguous()

        def apply(x: Tensor) -> Tensor:
            padded = functional.pad(x, (0, 0, 0, -len(x) % _ROW_MULTIPLE))
            return functional.linear(padded, weight, bias)[: len(x)]

        return apply

    def embed(self, table: Tensor, token_ids: Tensor, drawn: Tensor | None) -> Tensor:
        assert drawn is None, "the host draws"
        return table[token_ids]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale).to(x.dtype) * weight

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(x.add_(delta), weight, eps)

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
        _, kv_heads, _, block_tokens, head_dim = cache.shape
        split = qkv.view(len(qkv), -1, head_dim)
        q, k, v = split[:, : -2 * kv_heads], split[:, -2 * kv_heads : -kv_heads], split[:, -kv_heads:]
        if norms is not None:
            q, k = self.rms_norm(q, norms[0], eps), self.rms_norm(k, norms[1], eps)
        blocks, offsets = slot_mapping // block_tokens, slot_mapping % block_tokens
        cache[blocks, :, 0, offsets] = rotate(k, cos, sin).to(cache.dtype)
        cache[blocks, :, 1, offsets] = v
        return (rotate(q, cos, sin) / math.sqrt(head_dim)).to(qkv.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        linear = self.linear(weight, bias)
        return lambda x: self.silu_mul(linear(x))

    def attention(self, config: ModelConfig, layout: KvLayout, pieces: tuple[PieceRows, ...]) -> Attention:
        def apply(queries: Tensor, cache: Tensor, window: int | None) -> Tensor:
            out = torch.zeros_like(queries)
            for piece in pieces:
                _attend_piece(queries, cache, window, piece, out)
            return out.flatten(1)

        return apply


def _int8_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Exact sums within a group of inputs; groups one after the other, each by a fused multiply-add."""
    levels, scales = quantized(weight)

    def apply(x: Tensor) -> Tensor:
        rows = quantized_rows(x)
        total = torch.zeros(len(x), len(weight))
        for group in range(levels.shape[1]):
            exact = rows.levels[:, group].double() @ levels[:, group].double().T
            share = exact.float() * rows.scales[:, group, None]
            total = (share.double() * scales[:, group].double() + total.double()).float()
        return (total if bias is None else total + bias.float()).to(x.dtype)

    return apply


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, head_dim], cos and sin [rows, head_dim / 2]: rotates each half-split pair, in float32."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _attend_piece(queries: Tensor, cache: Tensor, window: int | None, piece: PieceRows, out: Tensor) -> None:
    """softmax(q K^T) V per token, in float32; q comes scaled."""
    heads, head_dim = cache.shape[1], cache.shape[4]
    blocks = cache[list(piece.block_ids)]  # [blocks, heads, 2, block_tokens, head_dim]
    keys, values = blocks.permute(2, 1, 0, 3, 4).flatten(2, 3).float()
    for i in range(piece.num_tokens):
        position, row = piece.start + i, piece.row + i
        first = 0 if window is None else max(0, position + 1 - window)
        grouped = queries[row].float().view(heads, -1, head_dim)
        scores = torch.einsum("hgd,hnd->hgn", grouped, keys[:, first : position + 1])
        seen = torch.einsum("hgn,hnd->hgd", scores.softmax(-1), values[:, first : position + 1])
        out[row] = seen.reshape(-1, head_dim).to(out.dtype)
