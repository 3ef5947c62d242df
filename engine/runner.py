"""One model on one device: executes step plans. Owns weights, cache and sampler; never decides what runs when."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baton.errors import BadConfig
from baton.types import DTYPE_BYTES, KvLayout, ModelDescription, SamplingParams, SequenceSpec
from engine.batch import build_batch
from engine.config import EngineConfig, ModelConfig
from engine.cost import CostModel
from engine.decode_graph import DecodeGraphs, DecodeRow
from engine.draws import draws_of
from engine.kernels import select_kernels
from engine.kernels.interface import DeviceKernels, Draws, Kernels
from engine.kv_cache import TORCH_DTYPES, Allocate, DeviceBuffer, KvCache
from engine.model import Model
from engine.sampler import Sampler, is_plain
from engine.staging import new_event, to_device, to_host
from engine.step import Piece, Sampled, Sequence, StepPlan, StepResult
from engine.weights import Checkpoint, fingerprint


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way. Tensors on the host hold something once ``done`` has come."""

    # Those that sample, in the order of the pieces.
    sequences: tuple[Sequence, ...]
    # On the device, [sequences, vocabulary] float32; valid until the next launch.
    logits: Tensor
    # On the host, drawn by the device, [sequences]; those of ``host_rows`` mean nothing. Empty if the host draws all.
    token_ids: Tensor
    # Indices of the sequences whose tokens the host draws, and their logits, [host_rows, vocabulary] float32.
    host_rows: tuple[int, ...]
    host_logits: Tensor
    # None: nothing runs beside the host.
    done: torch.cuda.Event | None


class Runner:
    """Built by ``load``. ``launch`` is called by one thread at a time, ``result`` once for each, in the same order.

    Between the two the host waits for nothing, and sequences must not change.
    """

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        *,
        model_config: ModelConfig,
        description: ModelDescription,
        kernels: Kernels,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model_config = model_config
        self.description = description
        self.layout = cache.layout
        self.kernels = kernels.name
        self.device = str(kernels.device)
        self.cost = CostModel.of(model_config, cache.layout.dtype)
        self._kernels = kernels
        self._model = model
        self._cache = cache
        self._graphs = graphs
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
        kernels = select_kernels(config.kernels, is_batch_invariant=config.is_batch_invariant)
        with torch.inference_mode(), Checkpoint(folder) as checkpoint:
            checkpoint.check(model_config)
            model = Model(model_config, checkpoint, kernels, TORCH_DTYPES[dtype])
        layout = kv_layout(model_config, config, dtype)
        with torch.inference_mode():
            buffer = None if allocate is None else _allocated(allocate, layout.total_bytes, kernels.device)
            cache = KvCache(layout, buffer, kernels.device)
            graphs = _decode_graphs(model, cache, model_config, kernels, config)
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
            kernels=kernels,
            graphs=graphs,
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
        """Run one step. ``on_layer`` as in ``launch``."""
        return self.result(self.launch(plan, on_layer))

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> Launched:
        """Begin a step. ``on_layer(i)`` is called in this thread once layer i's keys and values are all written.

        On a GPU they are written once the stream that is this thread's current one has come to where it is now: who
        reads them from elsewhere records an event on it in the call, and waits for that.
        """
        sequences = tuple(p.sequence for p in plan.pieces if p.samples)
        with torch.inference_mode():
            logits, token_ids = self._step(plan, sequences, on_layer)
            is_ours = token_ids is not None
            host_rows = tuple(i for i, s in enumerate(sequences) if not (is_ours and is_plain(s)))
            host_logits = logits
            if is_ours:
                host_logits = to_host(logits[to_device(torch.tensor(host_rows, dtype=torch.int64), logits.device)])
            host_ids = torch.empty(0, dtype=torch.int64) if token_ids is None else to_host(token_ids)
            done = new_event(logits.device)
            if done is not None:
                done.record()
            return Launched(sequences, logits, host_ids, host_rows, host_logits, done)

    def result(self, launched: Launched) -> StepResult:
        """The tokens of a step: waits until the device is done with it."""
        if launched.done is not None:
            launched.done.synchronize()
        with torch.inference_mode():
            ids: list[int] = launched.token_ids.tolist()
            sampled = {s.sequence_id: Sampled(i) for s, i in zip(launched.sequences, ids, strict=False)}
            of_host = [launched.sequences[i] for i in launched.host_rows]
            return StepResult(sampled | self._sampler.sample(launched.host_logits, of_host))

    def _step(
        self, plan: StepPlan, sequences: Seq[Sequence], on_layer: Callable[[int], None] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits on the device, and tokens if it draws any."""
        assert plan.pieces, "a step has at least one piece"
        if not isinstance(self._kernels, DeviceKernels):
            return self._forward(plan, on_layer), None
        draws = draws_of(sequences)
        # A layer is told between layers, where a recorded step cannot stop.
        rows = decode_rows(plan) if on_layer is None else None
        if rows is not None and self._graphs is not None:
            graph = self._graphs.find(len(rows), 1 + max(row.position for row in rows))
            if graph is not None:
                return graph.step(rows, draws)
        logits = self._forward(plan, on_layer)
        device = self._kernels.device
        return logits, self._kernels.draw(logits, Draws(*(to_device(column, device) for column in draws)))

    def _forward(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Tensor:
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


def decode_rows(plan: StepPlan) -> list[DecodeRow] | None:
    """The rows of a step in which every sequence computes its newest token, and generated that itself; else None."""
    for p in plan.pieces:
        # A prompt's last token alone is no decode: the other kernel computes prompts.
        is_decode = p.num_tokens == 1 and p.samples and p.start >= len(p.sequence.spec.prompt_token_ids)
        if not is_decode:
            return None
    return [
        DecodeRow(s.token_ids[p.start], p.start, len(s.spec.prompt_token_ids), s.block_ids)
        for p in plan.pieces
        for s in (p.sequence,)
    ]


def _decode_graphs(
    model: Model, cache: KvCache, model_config: ModelConfig, kernels: Kernels, config: EngineConfig
) -> DecodeGraphs | None:
    max_rows = min(config.max_num_seqs, config.max_graph_seqs)
    if not isinstance(kernels, DeviceKernels) or max_rows == 0:
        return None
    max_length = min(model_config.max_model_tokens, cache.layout.num_blocks * cache.layout.block_tokens)
    return DecodeGraphs(model, cache, model_config, kernels, max_rows=max_rows, max_length=max_length)


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
