"""Benchmarks whole models on the device: recorded steps must have the bits of unrecorded ones; decode steps are
compared with transformers, prompts with the measured product rate. Weights are random."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor

from baton.types import KvLayout, SamplingParams, SequenceSpec
from bench.gpu_cases import tuning_for
from bench.gpu_child import Context
from bench.gpu_measure import CaptureFailedError, Case, Device, Peer, Task, Work
from bench.gpu_sizes import LLAMA_8B, QWEN_06B, TINY, Sizes
from engine.batch import build_batch
from engine.decode_graph import DecodeGraph, DecodeRow
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.tuning import Tuning
from engine.kv_cache import KvCache
from engine.model import Model
from engine.model_config import ModelConfig, RopeConfig
from engine.step import Piece, StepPlan
from engine.step import Sequence as Running
from engine.tensors import expected_shapes
from engine.weights import Checkpoint

_BLOCK_TOKENS = 64


class RandomCheckpoint:
    """Weights by name, random, generated on the device when requested: nothing is read and nothing is kept."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        self._shapes = expected_shapes(config)
        self._device = device

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self._device)
        generator = torch.Generator(self._device).manual_seed(sum(map(ord, name)))
        return torch.randn(shape, generator=generator, device=self._device) / math.sqrt(shape[1])


def model_config(sizes: Sizes, max_tokens: int) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen3ForCausalLM" if sizes.has_qk_norm else "LlamaForCausalLM",
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_layers=sizes.num_layers,
        num_heads=sizes.shape.heads,
        num_kv_heads=sizes.shape.kv_heads,
        head_dim=sizes.shape.head_dim,
        rms_norm_eps=1e-5,
        rope=RopeConfig("default", 500_000.0),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=sizes.has_qk_norm,
        tied_embeddings=False,
        windows=(None,) * sizes.num_layers,
        max_model_tokens=max_tokens,
        dtype=sizes.dtype_name,
    )


class WholeModel:
    """A model and a cache on the device, without scheduler and sampler."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        tuning: Tuning,
        device: Device,
        tokens: int,
    ) -> None:
        self.config = config
        self.kernels = TritonKernels(tuning, torch.device(device.torch), is_probing=False)
        self.model = Model(config, checkpoint, self.kernels, dtype)
        self.layout = KvLayout(
            config.num_layers, -(-tokens // _BLOCK_TOKENS) + 8, config.num_kv_heads, config.head_dim, _BLOCK_TOKENS,
            str(dtype).removeprefix("torch."),
        )  # fmt: skip
        self.cache = KvCache(self.layout, None, torch.device(device.torch))

    @classmethod
    def random(cls, sizes: Sizes, tuning: Tuning, device: Device, tokens: int) -> WholeModel:
        config = model_config(sizes, tokens)
        checkpoint = cast(Checkpoint, RandomCheckpoint(config, device.torch))
        whole = cls(config, checkpoint, sizes.dtype, tuning, device, tokens)
        for layer in range(config.num_layers):
            whole.cache.layer(layer).normal_()
        return whole

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits of the pieces that sample, through the runner's code."""
        return self.model.forward(
            build_batch(StepPlan(tuple(pieces)), self.layout), self.cache, self.layout, None
        ).values

    def rows(self, rows: int, context: int) -> list[DecodeRow]:
        """Sequences that all hold ``context`` tokens, of which the newest is not computed yet."""
        blocks = self.layout.blocks_for(context)
        return [DecodeRow(i + 1, context - 1, 1, range(i * blocks, (i + 1) * blocks)) for i in range(rows)]

    def decode(self, rows: int, context: int) -> DecodeGraph:
        """A recorded step of such sequences, with its inputs filled in."""
        try:
            graph = DecodeGraph(self.model, self.cache, self.config, self.kernels, num_rows=rows, max_length=context)
        except Exception as error:
            if self.kernels.device.type != "cuda":
                raise
            # It records at once, and a failure may have left the allocator capturing.
            raise CaptureFailedError(f"{type(error).__name__}: {error}") from error
        graph.step(self.rows(rows, context))
        return graph

    def unrecorded(self, rows: int, context: int) -> Tensor:
        """Logits of the same step through the runner's code: its own index tensors, the same cache."""
        pieces = []
        for i, row in enumerate(self.rows(rows, context)):
            known = (0,) * (context - 2) + (row.token_id,)
            running = Running(SequenceSpec(f"{i}", (1,), SamplingParams(max_tokens=context, seed=0), known))
            running.block_ids = [*row.block_ids]
            pieces.append(Piece(running, context - 1, 1, samples=True))
        return self.forward(pieces)

    def prefill(self, num_tokens: int) -> Tensor:
        """Logits of the last token of one prompt."""
        prompt = tuple(i % self.config.vocab_size for i in range(num_tokens))
        running = Running(SequenceSpec("r", prompt, SamplingParams(max_tokens=1, seed=0)))
        running.block_ids = [*range(self.layout.blocks_for(num_tokens))]
        return self.forward([Piece(running, 0, num_tokens, samples=True)])


class Bench:
    """Whole steps of one size; the model is created for the first case that needs it."""

    def __init__(self, sizes: Sizes, device: Device) -> None:
        self._sizes = sizes
        self._device = device
        self._tokens = max(sizes.prompt, *(rows * context for rows, context in sizes.steps))
        self._config = model_config(sizes, self._tokens)

    @cached_property
    def whole(self) -> WholeModel:
        return WholeModel.random(self._sizes, tuning_for(self._device), self._device, self._tokens)

    @property
    def weight_bytes(self) -> int:
        """Bytes that a decode step reads: all weights but the input embedding."""
        shapes = expected_shapes(self._config)
        numbers = sum(math.prod(shape) for name, shape in shapes.items() if name != "model.embed_tokens.weight")
        return numbers * self._sizes.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        c = self._config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * self._sizes.dtype.itemsize

    def cases(self) -> Iterator[Work]:
        """Cases that need a minute of torch's compiler come last, as further peers of cases that have run before."""
        for rows, context in self._sizes.steps:
            yield self._beside("eager", rows, context)
        yield self._prefill()
        yield from (self._with_inputs(rows, context) for rows, context in self._sizes.steps)
        for rows, context in self._sizes.steps:
            yield self._beside("static", rows, context)

    def _beside(self, kind: str, rows: int, context: int) -> Work:
        peers = transformers_peers(self._sizes, self._config, self._device, rows, context)
        return dataclasses.replace(self.decode(rows, context), peers={f"transformers_{kind}": peers[kind]})

    def decode(self, rows: int, context: int) -> Work:
        return Work(
            f"decode step, {self._sizes.name}",
            f"{rows} x {context}",
            lambda _: self.whole.decode(rows, context),
            lambda graph: graph.replay().logits,
            expected=lambda _: self.whole.unrecorded(rows, context),
            # The same kernels on the same inputs must give the same bits.
            tolerance=0.0,
            compared=lambda logits: logits.float(),
            is_recorded=False,
            bytes=self.weight_bytes + rows * context * self.kv_bytes_per_token,
            needs_bytes=self._model_bytes(),
            dtype=self._sizes.dtype_name,
        )

    def _with_inputs(self, rows: int, context: int) -> Work:
        """Steps whose inputs come from the host: the GPU is idle for the time that this exceeds the replay."""

        def make(_: int) -> tuple[DecodeGraph, list[DecodeRow]]:
            return self.whole.decode(rows, context), self.whole.rows(rows, context)

        return Work(
            f"decode step with its inputs, {self._sizes.name}", f"{rows} x {context}", make,
            lambda x: x[0].step(x[1]), {"own_replay": Peer(lambda x: x[0].replay(), is_recorded=False)},
            is_recorded=False, needs_bytes=self._model_bytes(), dtype=self._sizes.dtype_name,
        )  # fmt: skip

    def _prefill(self) -> Work:
        config, tokens = self._config, self._sizes.prompt
        products = 2 * (self.weight_bytes / self._sizes.dtype.itemsize) * tokens
        pairs = 4 * config.num_heads * config.head_dim * config.num_layers * tokens * tokens / 2
        return Work(
            f"prefill, {self._sizes.name}", f"1 x {tokens}", lambda _: tokens, lambda n: self.whole.prefill(n),
            is_recorded=False, flops=products + pairs, needs_bytes=self._model_bytes(), dtype=self._sizes.dtype_name,
        )  # fmt: skip

    def _model_bytes(self) -> float:
        """Memory that must be free if the model does not exist yet."""
        is_made = "whole" in self.__dict__
        return 0.0 if is_made else 1.3 * self.weight_bytes + self._tokens * self.kv_bytes_per_token


def small(context: Context) -> Iterator[Case]:
    yield from Bench(TINY[0] if context.is_tiny else QWEN_06B, context.device).cases()


def large(context: Context) -> Iterator[Case]:
    yield from Bench(TINY[2] if context.is_tiny else LLAMA_8B, context.device).cases()


def graphs(context: Context) -> Iterator[Case]:
    """Two layers of each dtype: recording is tested on small models first."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        base = TINY[0] if context.is_tiny else QWEN_06B
        sizes = dataclasses.replace(
            base, name=f"{base.name}, 2 layers", dtype=dtype, num_layers=2, prompt=1, steps=((1, 40), (3, 600))
        )
        bench = Bench(sizes, context.device)
        for rows, length in sizes.steps:
            yield dataclasses.replace(bench.decode(rows, length), is_timed=False)
            yield Task(
                f"tokens of a decode step, {sizes.name}", f"{rows} x {length}", partial(_tokens, bench, rows, length),
                sizes.dtype_name,
            )  # fmt: skip


def _tokens(bench: Bench, rows: int, context: int) -> dict[str, Any]:
    """Greedy tokens, drawn in the recorded step."""
    graph = bench.whole.decode(rows, context)
    first = graph.step(bench.whole.rows(rows, context))
    drawn, best = first.token_ids.clone(), first.logits.argmax(-1)
    again = graph.replay()
    return {"is_right": torch.equal(drawn, best) and torch.equal(again.token_ids[:rows], drawn)}


def transformers_peers(sizes: Sizes, config: ModelConfig, device: Device, rows: int, context: int) -> dict[str, Peer]:
    """One decode step of transformers on a model of the same shape: eager, and a static cache with torch.compile."""
    held = _Transformers(sizes, config, device, rows, context)
    weights = 1.1 * sum(math.prod(shape) for shape in expected_shapes(config).values()) * sizes.dtype.itemsize
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * sizes.dtype.itemsize * rows * context
    # An eager step copies the layer that it computes; a compiled static step may have copies of its own.
    return {
        "eager": Peer(held.eager, weights + 1.1 * cache, is_recorded=False, drop=held.drop),
        "static": Peer(held.static, weights + 1.3 * cache, is_recorded=False, drop=held.drop),
    }


class _Transformers:
    """A model of transformers and its cache, created on the first call and dropped together."""

    def __init__(self, sizes: Sizes, config: ModelConfig, device: Device, rows: int, context: int) -> None:
        self._sizes = sizes
        self._config = config
        self._device = device
        self._rows = rows
        self._context = context
        self._held: dict[str, Any] = {}

    def eager(self, _: object = None) -> Tensor:
        """One eager step. It grows the cache by a token, which is removed again."""
        cache = self._cache("eager")
        logits = self._step(self._model(), cache)
        cache.crop(-1)
        return logits

    def static(self, _: object = None) -> Tensor:
        """One step with a static cache, which counts its tokens on the device: a step begins where the context ends."""
        cache = self._cache("static")
        for layer in cache.layers:
            layer.cumulative_length.fill_(self._context - 1)
        if "compiled" not in self._held:
            # As its documentation recommends; without a GPU the front end only.
            options: dict[str, Any] = {"mode": "reduce-overhead"} if self._device.is_gpu else {"backend": "eager"}
            self._held["compiled"] = torch.compile(self._model().forward, dynamic=False, **options)
        return self._step(self._held["compiled"], cache)

    def drop(self) -> None:
        self._held.clear()
        self._device.forget()

    def _step(self, run: Callable[..., Any], cache: object) -> Tensor:
        token = torch.ones(self._rows, 1, dtype=torch.int64, device=self._device.torch)
        places = torch.full((self._rows, 1), self._context - 1, device=self._device.torch)
        # Newer versions warn about the old name, older ones require it.
        known = inspect.signature(self._model().forward).parameters
        held = {"cache" if "cache" in known else "past_key_values": cache}
        logits: Tensor = run(token, use_cache=True, position_ids=places, **held).logits
        return logits

    def _model(self) -> Any:
        if "model" not in self._held:
            import transformers

            config, family = self._config, "Qwen3" if self._config.qk_norm else "Llama"
            shape = getattr(transformers, f"{family}Config")(
                vocab_size=config.vocab_size, hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size, num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim, max_position_embeddings=config.max_model_tokens, tie_word_embeddings=False,
            )  # fmt: skip
            with torch.device(self._device.torch):
                auto: Any = transformers.AutoModelForCausalLM
                made = auto.from_config(shape, dtype=self._sizes.dtype)
            self._held["model"] = made.eval()
        return self._held["model"]

    def _cache(self, kind: str) -> Any:
        """A cache filled with random keys and values, as for Baton."""
        import transformers

        if kind not in self._held:
            shape = self._model().config
            if kind == "static":
                cache: Any = transformers.StaticCache(config=shape, max_cache_len=self._context)
            else:
                cache = transformers.DynamicCache(config=shape)
            generator = torch.Generator(self._device.torch).manual_seed(0)
            size = (self._rows, self._config.num_kv_heads, self._context - 1, self._config.head_dim)
            for layer in range(self._config.num_layers):
                both = (
                    torch.randn(size, generator=generator, device=self._device.torch, dtype=self._sizes.dtype)
                    for _ in range(2)
                )
                cache.update(*both, layer)
            self._held[kind] = cache
        return self._held[kind]
