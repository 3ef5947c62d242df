"""Computes the floating-point operations and bytes of a step from its shape. No torch, no measurement.

These are the needs of the model, whatever the kernels do: weights are read once per step, each token's KV once per
layer, and a product of [m, k] and [k, n] is 2 m k n operations. Norms, rotary embedding and sampling are omitted: below
1 % for any practical model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from baton.types import DTYPE_BYTES
from engine.model_config import ModelConfig
from engine.step import Piece, StepPlan

# Of 8-bit weights, with the float32 scale of each group (kernels/int8.py).
_INT8_BYTES = 1 + 4 / 128


class StepCost(NamedTuple):
    flops: float
    num_bytes: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Per token, per row of logits, and per (query, key) pair; ``windows`` says how many layers see how far."""

    flops_per_token: float
    flops_per_sample: float
    # One query with one key in one layer: the product and the weighted sum.
    flops_per_pair: float
    layer_weight_bytes: float
    head_weight_bytes: float
    # Keys and values of one token in one layer.
    kv_bytes_per_layer: float
    # (positions a token sees, None is all; number of such layers)
    windows: tuple[tuple[int | None, int], ...]

    @classmethod
    def of(cls, config: ModelConfig, dtype: str, quantization: str) -> CostModel:
        size = DTYPE_BYTES[dtype]
        weight_size = _INT8_BYTES if quantization == "int8" else size
        heads = config.num_heads * config.head_dim
        qkv = config.hidden_size * (heads + 2 * config.num_kv_heads * config.head_dim)
        layer = qkv + heads * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
        head = config.hidden_size * config.vocab_size
        return cls(
            flops_per_token=2.0 * layer * config.num_layers,
            flops_per_sample=2.0 * head,
            flops_per_pair=4.0 * heads,
            layer_weight_bytes=float(layer * config.num_layers * weight_size),
            head_weight_bytes=float(head * weight_size),
            kv_bytes_per_layer=2.0 * config.num_kv_heads * config.head_dim * size,
            windows=tuple(sorted(Counter(config.windows).items(), key=lambda item: item[0] or 0)),
        )

    def step(self, plan: StepPlan) -> StepCost:
        num_tokens = num_samples = num_keys = num_halves = 0
        for piece in plan.pieces:
            count, start = piece.num_tokens, piece.start
            num_tokens += count
            num_samples += piece.samples + len(piece.scored)
            # Token at position p sees p + 1 positions; counted in halves to stay with integers.
            num_keys += start + count
            num_halves += count * (2 * start + count + 1)
        pairs = kv_reads = 0.0
        for window, num_layers in self.windows:
            if window is None:
                pairs += num_layers * num_halves / 2
                kv_reads += num_layers * num_keys
            else:
                pairs += num_layers * sum(_pairs_inside(piece, window) for piece in plan.pieces)
                kv_reads += num_layers * sum(_keys_inside(piece, window) for piece in plan.pieces)
        return StepCost(
            flops=num_tokens * self.flops_per_token + num_samples * self.flops_per_sample + pairs * self.flops_per_pair,
            num_bytes=self.layer_weight_bytes
            + (self.head_weight_bytes if num_samples else 0.0)
            + self.kv_bytes_per_layer * (kv_reads + self._num_layers * num_tokens),
        )

    @property
    def _num_layers(self) -> int:
        return sum(num_layers for _, num_layers in self.windows)


def _pairs_inside(piece: Piece, window: int) -> float:
    """(query, key) pairs when a token sees the last ``window`` positions, its own included."""
    count, start = piece.num_tokens, piece.start
    # So many of the tokens still see everything before them.
    num_whole = min(count, max(0, window - start))
    return num_whole * (start + (num_whole + 1) / 2) + (count - num_whole) * window


def _keys_inside(piece: Piece, window: int) -> int:
    """Positions that some token of the piece sees."""
    return min(piece.start + piece.num_tokens, window + piece.num_tokens - 1)
