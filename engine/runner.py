"""One model on one device: executes step plans. Owns weights, cache and sampler; never decides what runs when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from baton.errors import BadConfig
from baton.types import DTYPE_BYTES, KvLayout, ModelDescription, SamplingParams, SequenceSpec
from engine.batch import build_batch
from engine.config import EngineConfig, ModelConfig
from engine.cost import CostModel
from engine.kernels import select_kernels
from engine.kv_cache import TORCH_DTYPES, Allocate, DeviceBuffer, KvCache
from engine.model import Model
from engine.sampler import Sampler
from engine.step import Piece, Sequence, StepPlan, StepResult
from engine.weights import Checkpoint, fingerprint


class Runner:
    """Built by ``load``. ``execute`` is called by one thread at a time."""

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        *,
        model_config: ModelConfig,
        description: ModelDescription,
        kernels: str,
        device: str = "cpu",
    ) -> None:
        self.model_config = model_config
        self.description = description
        self.layout = cache.layout
        self.kernels = kernels
        self.device = device
        self.cost = CostModel.of(model_config, cache.layout.dtype)
        self._model = model
        self._cache = cache
        self._sampler = Sampler(model_config.vocab_size)

    @classmethod
    def load(
        cls,
        folder: Path,
        config: EngineConfig,
        *,
        allocate: Allocate | None = None,
    ) -> Runner:
        """Load a Hugging Face folder; ``allocate`` gives the memory of the KV arena.

        Raises UnsupportedModel, naming what and why, and BadConfig.
        """
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        model_config = ModelConfig.from_folder(folder)
        dtype = model_config.dtype if config.dtype == "auto" else config.dtype
        kernels = select_kernels(config.kernels)
        with torch.inference_mode(), Checkpoint(folder) as checkpoint:
            checkpoint.check(model_config)
            model = Model(model_config, checkpoint, kernels, TORCH_DTYPES[dtype])
        layout = kv_layout(model_config, config, dtype)
        with torch.inference_mode():
            buffer = None if allocate is None else _allocated(allocate, layout.total_bytes, kernels.device)
            cache = KvCache(layout, buffer, kernels.device)
        description = ModelDescription(
            name=folder.resolve().name,
            fingerprint=fingerprint(folder),
            dtype=dtype,
            max_model_tokens=model_config.max_model_tokens,
            vocab_size=model_config.vocab_size,
        )
        runner = cls(
            model,
            cache,
            model_config=model_config,
            description=description,
            kernels=kernels.name,
            device=str(kernels.device),
        )
        runner._warm_up()
        return runner

    def _warm_up(self) -> None:
        """A prompt and a generated token through block 0, so that no kernel is compiled while serving."""
        spec = SequenceSpec("warm-up", (0, 0), SamplingParams(temperature=0.0, max_tokens=2, seed=0))
        sequence = Sequence(spec)
        sequence.block_ids = [0]
        self.execute(StepPlan((Piece(sequence, 0, 2, samples=True),)))
        sequence.token_ids.append(0)
        self.execute(StepPlan((Piece(sequence, 2, 1, samples=True),)))
        self.forget("warm-up")

    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Run one step. ``on_layer(i)`` is called in this thread once layer i's keys and values are all written."""
        return self.sample(self.execute_logits(plan, on_layer), plan)

    def sample(self, logits: Tensor, plan: StepPlan) -> StepResult:
        """Draw the tokens of a plan from what ``execute_logits`` returned for it."""
        with torch.inference_mode():
            return StepResult(self._sampler.sample(logits, [p.sequence for p in plan.pieces if p.samples]))

    def execute_logits(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Run one step up to the raw logits, [pieces that sample, vocabulary] float32."""
        assert plan.pieces, "a step has at least one piece"
        with torch.inference_mode():
            return self._model.forward(build_batch(plan, self.layout), self._cache, self.layout, on_layer)

    def forget(self, sequence_id: str) -> None:
        """Drop what is kept for a sequence that has ended; unknown ids are fine."""
        self._sampler.forget(sequence_id)


def _allocated(allocate: Allocate, num_bytes: int, device: torch.device) -> memoryview | DeviceBuffer:
    """Transfers know memory of the processor and of CUDA's devices. Raises BadConfig for any other."""
    if device.type == "cpu":
        return allocate(num_bytes)
    if device.type == "cuda":
        return allocate(num_bytes, str(device))
    raise BadConfig(
        f"the KV cache lies on {device}, which no transport reaches; expected kernels for cpu or cuda", param="kernels"
    )


def kv_layout(model: ModelConfig, config: EngineConfig, dtype: str) -> KvLayout:
    """Cache geometry: as many blocks as asked for, or as fit into ``kv_bytes``."""
    per_block = model.num_layers * model.num_kv_heads * 2 * config.block_tokens * model.head_dim * DTYPE_BYTES[dtype]
    num_blocks = config.kv_bytes // per_block if config.num_blocks is None else config.num_blocks
    if num_blocks < 1:
        raise BadConfig(
            f"engine.kv_bytes {config.kv_bytes} holds no block of {per_block} bytes; give more", param="kv_bytes"
        )
    return KvLayout(
        num_layers=model.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_tokens=config.block_tokens,
        dtype=dtype,
    )
