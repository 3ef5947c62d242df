"""What the model asks of a set of kernels. Activations are [rows, features] in the model's dtype."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from baton.types import KvLayout
from engine.batch import Batch, Span
from engine.config import ModelConfig


class Linear(Protocol):
    """x [rows, in] -> x W^T + b, [rows, out]; rows are a multiple of 8."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Attention(Protocol):
    """One step's attention; built once per step, called once per layer."""

    def __call__(self, queries: Tensor, cache: Tensor, window: int | None) -> Tensor:
        """queries [rows, num_heads, head_dim], rotated and scaled; cache: one layer, this step's keys and values in it.

        Returns [rows, num_heads * head_dim]. Cache rows at positions a query does not see never reach its result,
        whatever they hold. Rows of padding come back finite.
        """
        ...


class Kernels(Protocol):
    """Law: a row of every result depends on that row's inputs alone, bit for bit."""

    name: str

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare a layer for repeated use; weight [out, in], not kept if the kernel holds its own copy."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, accumulated in float32."""
        ...

    def query_scale(self, head_dim: int) -> float:
        """What attention expects queries to be multiplied by; the model does it while it rotates them in float32."""
        ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [rows, heads, head_dim], cos and sin [rows, head_dim / 2] float32: each half-split pair turned."""
        ...

    def store(self, keys: Tensor, values: Tensor, cache: Tensor, batch: Batch) -> None:
        """Write keys and values [num_tokens, num_kv_heads, head_dim] to their cache rows."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 * features] -> silu(first half) * second half."""
        ...

    def attention(self, config: ModelConfig, layout: KvLayout, spans: tuple[Span, ...]) -> Attention: ...
