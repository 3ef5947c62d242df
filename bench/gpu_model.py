"""Whole steps of a model with random weights: decode beside transformers eager and static cache, prefill beside its
own products at the measured rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from baton.types import KvLayout, SamplingParams, SequenceSpec
from bench.cases import TOLERANCE
from bench.gpu_kernels import Sizes
from bench.gpu_measure import Device, Work
from engine.batch import build_batch
from engine.config import ModelConfig, RopeConfig
from engine.decode_graph import DecodeGraph, DecodeRow
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.tuning import Tuning
from engine.kv_cache import KvCache
from engine.model import Model
from engine.step import Piece, Sequence, StepPlan
from engine.tensors import expected_shapes
from engine.weights import Checkpoint

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class RandomCheckpoint:
    """Weights by name, drawn on the device when asked for: nothing is read and nothing is kept."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        self._shapes = expected_shapes(config)
        self._device = device

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self._device)
        generator = torch.Generator(self._device).manual_seed(sum(map(ord, name)))
        return torch.randn(shape, generator=generator, device=self._device) / math.sqrt(shape[1])


def model_config(sizes: Sizes, num_layers: int, max_tokens: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_layers=num_layers,
        num_heads=sizes.shape.heads,
        num_kv_heads=sizes.shape.kv_heads,
        head_dim=sizes.shape.head_dim,
        rms_norm_eps=1e-5,
        rope=RopeConfig("default", 500_000.0),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied_embeddings=False,
        windows=(None,) * num_layers,
        max_model_tokens=max_tokens,
        dtype=_DTYPES[sizes.dtype],
    )


class WholeModel:
    """One model on the device, with room in its cache for the largest shape."""

    def __init__(self, sizes: Sizes, tuning: Tuning, device: Device, num_layers: int, cache_tokens: int) -> None:
        self.config = model_config(sizes, num_layers, cache_tokens)
        self.kernels = TritonKernels(tuning, torch.device(device.torch), is_probing=False)
        checkpoint = cast(Checkpoint, RandomCheckpoint(self.config, device.torch))
        self.model = Model(self.config, checkpoint, self.kernels, sizes.dtype)
        self.layout = KvLayout(
            num_layers, -(-cache_tokens // 64) + 8, self.config.num_kv_heads, self.config.head_dim, 64,
            _DTYPES[sizes.dtype],
        )  # fmt: skip
        self.cache = KvCache(self.layout, None, torch.device(device.torch))
        for layer in range(num_layers):
            self.cache.layer(layer).normal_()

    @property
    def step_bytes(self) -> int:
        """Weights that a decode step reads: all but the input embedding."""
        shapes = expected_shapes(self.config)
        numbers = sum(math.prod(shape) for name, shape in shapes.items() if name != "model.embed_tokens.weight")
        return numbers * (4 if self.config.dtype == "float32" else 2)

    def decode(self, rows: int, context: int) -> DecodeGraph:
        """A recorded step of ``rows`` sequences that all hold ``context`` tokens, filled in."""
        graph = DecodeGraph(self.model, self.cache, self.config, self.kernels, num_rows=rows, max_length=context)
        blocks = self.layout.blocks_for(context)
        graph.step([DecodeRow(i + 1, context - 1, 1, range(i * blocks, (i + 1) * blocks)) for i in range(rows)])
        return graph

    def unrecorded(self, rows: int, context: int) -> Tensor:
        """Logits of the same step by the runner's path: its own index tensors, the same cache."""
        blocks = self.layout.blocks_for(context)
        pieces = []
        for i in range(rows):
            known = (0,) * (context - 2) + (i + 1,)
            sequence = Sequence(SequenceSpec(f"{i}", (1,), SamplingParams(max_tokens=context, seed=0), known))
            sequence.block_ids = [*range(i * blocks, (i + 1) * blocks)]
            pieces.append(Piece(sequence, context - 1, 1, samples=True))
        batch = build_batch(StepPlan(tuple(pieces)), self.layout)
        return self.model.forward(batch, self.cache, self.layout, None).values

    def prefill(self, num_tokens: int) -> Tensor:
        """Logits of the last token of one prompt."""
        prompt = tuple(i % self.config.vocab_size for i in range(num_tokens))
        sequence = Sequence(SequenceSpec("r", prompt, SamplingParams(max_tokens=1, seed=0)))
        sequence.block_ids = [*range(self.layout.blocks_for(num_tokens))]
        plan = StepPlan((Piece(sequence, 0, num_tokens, samples=True),))
        return self.model.forward(build_batch(plan, self.layout), self.cache, self.layout, None).values


def works(whole: WholeModel, sizes: Sizes, device: Device) -> Iterator[Work]:
    kv_bytes = 2 * whole.config.num_layers * whole.config.num_kv_heads * whole.config.head_dim * sizes.dtype.itemsize
    shapes = ((1, 1024), (64, 4096)) if device.is_gpu else ((2, 40),)
    for rows, context in shapes:
        yield Work(
            "decode step, whole model",
            f"{rows} x {context}",
            lambda _, rows=rows, context=context: whole.decode(rows, context),
            lambda graph: graph.replay().logits,
            _transformers(sizes, whole.config, device, rows, context),
            lambda _, rows=rows, context=context: whole.unrecorded(rows, context),
            TOLERANCE[sizes.dtype],
            compared=lambda logits: logits.float(),
            bytes=whole.step_bytes + rows * context * kv_bytes,
        )
    tokens = 8192 if device.is_gpu else 30
    products = 2 * (whole.step_bytes / sizes.dtype.itemsize) * tokens
    pairs = 4 * whole.config.num_heads * whole.config.head_dim * whole.config.num_layers * tokens * tokens / 2
    yield Work("prefill, whole model", f"1 x {tokens}", lambda _: tokens, whole.prefill, flops=products + pairs)


def _transformers(sizes: Sizes, config: ModelConfig, device: Device, rows: int, context: int) -> dict[str, Any]:
    """One decode step of transformers on a model of the same shape, eager and with a static, compiled cache."""
    held: dict[str, Any] = {}

    def model() -> Any:
        if "model" not in held:
            import transformers

            shape = transformers.LlamaConfig(
                vocab_size=config.vocab_size, hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size, num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim, max_position_embeddings=config.max_model_tokens,
            )  # fmt: skip
            with torch.device(device.torch):
                made: Any = transformers.LlamaForCausalLM(shape)
                held["model"] = made.to(sizes.dtype).eval()
        return held["model"]

    def cache(kind: str) -> Any:
        import transformers

        if kind not in held:
            static = transformers.StaticCache(config=model().config, max_cache_len=context)
            held[kind] = transformers.DynamicCache(config=model().config) if kind == "eager" else static
            # The context is random, as ours is: prefilled once.
            prompt = torch.ones(rows, context - 1, dtype=torch.int64, device=device.torch)
            for at in range(0, context - 1, 512):
                part = prompt[:, at : at + 512]
                places = torch.arange(at, at + part.shape[1], device=device.torch)
                model().model(part, past_key_values=held[kind], use_cache=True, cache_position=places)
        return held[kind]

    def step(kind: str, _: object) -> Any:
        token = torch.ones(rows, 1, dtype=torch.int64, device=device.torch)
        places = torch.tensor([context - 1], device=device.torch)
        past = cache(kind)
        run = model()
        if kind == "static":
            if "compiled" not in held:
                held["compiled"] = torch.compile(
                    model().forward, backend="inductor" if device.is_gpu else "eager", dynamic=False
                )
            run = held["compiled"]
        with torch.inference_mode():
            out = run(token, past_key_values=past, use_cache=True, cache_position=places).logits
        if kind == "eager":
            past.crop(-1)
        return out

    return {"transformers_eager": partial(step, "eager"), "transformers_static": partial(step, "static")}
