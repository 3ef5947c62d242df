"""The transformer: weights in, logits of the wanted rows out. Defines the order of operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.types import KvLayout
from engine.batch import Batch, logit_pieces
from engine.kernels.interface import Attention, Kernels, Linear, Logits, Recorder, RecordingKernels, StepInputs
from engine.kv_cache import KvCache
from engine.model_config import ModelConfig
from engine.rope import RopeTable
from engine.staging import to_device
from engine.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; q, k, v and gate, up are single products."""

    input_norm: Tensor
    qkv: Linear
    head_norms: tuple[Tensor, Tensor] | None  # of q and k, [head_dim]
    output: Linear
    mlp_norm: Tensor
    gated: Linear
    down: Linear
    window: int | None


class Model:
    """A loaded model; ``forward`` is one step."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, kernels: Kernels, dtype: torch.dtype) -> None:
        self._config = config
        self._kernels = kernels
        self._rope = RopeTable(config.rope, config.head_dim)
        loader = _Loader(checkpoint, kernels, dtype)
        self._embedding = loader.tensor("model.embed_tokens.weight")
        self._layers = [_load_layer(loader, config, i) for i in range(config.num_layers)]
        self._norm = loader.tensor("model.norm.weight")
        head = "model.embed_tokens" if config.tied_embeddings else "lm_head"
        self._head = loader.linear([head], bias=False)
        self._recording = kernels if isinstance(kernels, RecordingKernels) else None
        # Of the steps over one cache.
        self._recorder: tuple[KvCache, Recorder] | None = None

    def forward(
        self,
        batch: Batch,
        cache: KvCache,
        layout: KvLayout,
        on_layer: Callable[[int], None] | None,
        drawn: Tensor | None = None,
    ) -> Logits:
        """Of the batch's ``logit_rows``, valid until the next step; the host waits for no device.

        ``drawn``: on the device, what the step before drew, for ids that the host does not know.

        ``on_layer(i)``: layer i's keys and values are in the cache, on a GPU once this thread's stream has come here.
        """
        if self._recording is not None:
            return self._forward_recorded(self._recording, batch, cache, on_layer)
        kernels, device = self._kernels, self._kernels.device
        cos, sin = (to_device(part, device) for part in self._rope.rows(batch.positions, batch.prompt_lengths))
        slots, token_ids = to_device(batch.slot_mapping, device), to_device(batch.token_ids, device)
        attention = kernels.attention(self._config, layout, batch.pieces)

        def choose(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Attention] | None:
            if not batch.logit_rows:
                return None
            rows = to_device(torch.tensor(batch.logit_rows), device)
            return x[rows], q[rows], kernels.attention(self._config, layout, logit_pieces(batch))

        found = self._run(token_ids, drawn, cos, sin, slots, attention, cache, on_layer, choose)
        if found is None:
            return Logits(torch.empty(0, self._config.vocab_size, device=device), None, torch.empty(0, device=device))
        return Logits(found[1].float(), None, found[0])

    def _forward_recorded(
        self, kernels: RecordingKernels, batch: Batch, cache: KvCache, on_layer: Callable[[int], None] | None
    ) -> Logits:
        if self._recorder is None or self._recorder[0] is not cache:
            self._recorder = cache, kernels.recorder(self._config, cache)

        def order(i: StepInputs) -> tuple[Tensor, Tensor]:
            found = self._run(i.token_ids, None, i.cos, i.sin, i.slots, i.attention, cache, i.on_layer, i.choose)
            assert found is not None
            return found

        cos, sin = self._rope.rows(batch.positions, batch.prompt_lengths)
        return self._recorder[1].run(batch, cos, sin, on_layer, order)

    def decode(
        self,
        token_ids: Tensor,
        drawn: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        attention: Attention,
        cache: KvCache,
    ) -> Tensor:
        """Logits of every row, [rows, vocabulary], in the model's dtype, from inputs on the device: no work of the host
        depends on their values, so the whole step can be recorded once and replayed."""
        found = self._run(token_ids, drawn, cos, sin, slots, attention, cache, None, lambda x, q: (x, q, attention))
        assert found is not None
        return found[1]

    def rope_rows(self, positions: Tensor, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self._rope.rows(positions, prompt_lengths)

    def _run(
        self,
        token_ids: Tensor,
        drawn: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        attention: Attention,
        cache: KvCache,
        on_layer: Callable[[int], None] | None,
        choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Attention] | None],
    ) -> tuple[Tensor, Tensor] | None:
        """What the head reads, and the logits. ``choose`` leaves, in the last layer, the rows of (residual, queries)
        whose logits are wanted, and how they attend."""
        c, kernels = self._config, self._kernels
        x = kernels.embed(self._embedding, token_ids, drawn)
        normed = kernels.rms_norm(x, self._layers[0].input_norm, c.rms_norm_eps)
        next_norms = [layer.input_norm for layer in self._layers[1:]] + [self._norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, next_norms, strict=True)):
            arena = cache.layer(index)
            q = kernels.rope_store(layer.qkv(normed), layer.head_norms, c.rms_norm_eps, cos, sin, arena, slots)
            if on_layer is not None:
                on_layer(index)
            if index == c.num_layers - 1:
                # Nothing reads the last layer's output but the rows whose logits are wanted.
                chosen = choose(x, q)
                if chosen is None:
                    return None
                x, q, attention = chosen
            delta = layer.output(attention(q, arena, layer.window))
            normed = kernels.add_rms_norm(x, delta, layer.mlp_norm, c.rms_norm_eps)
            delta = layer.down(layer.gated(normed))
            normed = kernels.add_rms_norm(x, delta, next_norm, c.rms_norm_eps)
        return normed, self._head(normed)


class _Loader:
    """Tensors of a checkpoint in the dtype the model runs in."""

    def __init__(self, checkpoint: Checkpoint, kernels: Kernels, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._kernels = kernels
        self._dtype = dtype

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name).to(self._kernels.device, self._dtype)

    def linear(self, names: list[str], *, bias: bool) -> Linear:
        """Several layers that read the same input, as one."""
        return self._kernels.linear(*self._joined(names, bias=bias))

    def gated_linear(self, names: list[str], *, bias: bool) -> Linear:
        return self._kernels.gated_linear(*self._joined(names, bias=bias))

    def _joined(self, names: list[str], *, bias: bool) -> tuple[Tensor, Tensor | None]:
        weight = torch.cat([self.tensor(f"{name}.weight") for name in names])
        return weight, torch.cat([self.tensor(f"{name}.bias") for name in names]) if bias else None


def _load_layer(loader: _Loader, c: ModelConfig, index: int) -> Layer:
    at = f"model.layers.{index}."
    attn, mlp = f"{at}self_attn.", f"{at}mlp."
    return Layer(
        input_norm=loader.tensor(f"{at}input_layernorm.weight"),
        qkv=loader.linear([f"{attn}q_proj", f"{attn}k_proj", f"{attn}v_proj"], bias=c.qkv_bias),
        head_norms=(loader.tensor(f"{attn}q_norm.weight"), loader.tensor(f"{attn}k_norm.weight"))
        if c.qk_norm
        else None,
        output=loader.linear([f"{attn}o_proj"], bias=c.output_bias),
        mlp_norm=loader.tensor(f"{at}post_attention_layernorm.weight"),
        gated=loader.gated_linear([f"{mlp}gate_proj", f"{mlp}up_proj"], bias=c.mlp_bias),
        down=loader.linear([f"{mlp}down_proj"], bias=c.mlp_bias),
        window=c.windows[index],
    )
