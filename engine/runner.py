"""Executes step plans of one model on one device. Owns weights, cache and sampler; the scheduler decides what runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from baton.errors import BadConfig
from baton.types import KvLayout, ModelDescription, PrefixCaching
from engine.batch import build_batch, token_ids_of
from engine.config import EngineConfig
from engine.cost import CostModel
from engine.decode_graph import DecodeGraphs, DecodeRow, graph_shapes
from engine.devices import Devices, GpuMemory, TorchDevices
from engine.draws import DeviceDraws, Prepared, drawn_results, scored_tokens, take_scored
from engine.kernels import select_kernels
from engine.kernels.interface import DeviceKernels, Draws, Kernels, Logits, Peaks
from engine.kv_cache import TORCH_DTYPES, Allocate, DeviceBuffer, KvCache
from engine.memory import Memory, gpu_kv_bytes, kv_layout, layout_before_loading, shown
from engine.model import Model
from engine.model_config import ModelConfig
from engine.sampler import Sampler
from engine.sizing import measure
from engine.staging import new_event, to_device, to_host
from engine.step import Piece, Sequence, StepPlan, StepResult
from engine.warm_up import MINIMAL, largest_step, warm_up_plans
from engine.weights import Checkpoint, quantized_fingerprint

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostDrawn:
    """A step whose tokens the host draws, from logits that are there."""

    sampler: Sampler
    # Those that sample, in the order of the pieces.
    sequences: tuple[Sequence, ...]
    # Pieces that score positions.
    scored: tuple[Piece, ...]
    # [sequences, then scored positions; vocabulary] float32; valid until the next launch.
    logits: Tensor
    # Of these, where the kernels find them.
    peaks: Peaks | None
    # As in StepResult.
    hidden: Mapping[str, Tensor]

    def result(self) -> StepResult:
        with torch.inference_mode():
            result = self.sampler.sample(self.logits, self.sequences, self.peaks, self.scored)
        result.hidden.update({name: rows.numpy() for name, rows in self.hidden.items()})
        return result


@dataclass(frozen=True, slots=True)
class DeviceDrawn:
    """A step under way on a device that draws its tokens. Tensors on the host hold something once ``done`` has come."""

    sequences: tuple[Sequence, ...]
    # On the device, [sequences, then scored positions; vocabulary] float32; valid until the next launch.
    logits: Tensor
    # On the host, [sequences]; negative where there is none.
    token_ids: Tensor
    # Rows whose log-probabilities are reported, and the reports of all up to the last of them, on the host.
    reported: tuple[int, ...]
    reports: Tensor
    # Pieces that score positions, and the reports of these, on the host; None if there are none.
    scored: tuple[Piece, ...]
    scores: Tensor | None
    # As in StepResult, on the host.
    hidden: Mapping[str, Tensor]
    # Sequences that get no token, even if one was drawn.
    failed: Mapping[str, Exception]
    # None: nothing runs beside the host.
    done: torch.cuda.Event | None

    def result(self) -> StepResult:
        """The tokens: waits until the device is done with the step, not with one that was launched after it."""
        if self.done is not None:
            self.done.synchronize()
        ids: list[int] = self.token_ids.tolist()
        result = drawn_results(self.sequences, ids, {row: self.reports[row].numpy() for row in self.reported})
        for sequence_id, error in self.failed.items():
            result.sampled.pop(sequence_id, None)
            result.failed[sequence_id] = error
        if self.scores is not None:
            take_scored(self.scored, self.scores.numpy(), result)
        result.hidden.update({name: rows.numpy() for name, rows in self.hidden.items()})
        return result


Launched = HostDrawn | DeviceDrawn


class Runner:
    """Built by ``load``. ``launch`` is called by one thread at a time, results are taken in the order of launches.

    Between the two the host waits for nothing. On kernels of a device (``overlaps``) the next step may be launched
    before the result is taken, with pieces whose token this one draws on the device: they are read there.
    """

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        *,
        model_config: ModelConfig,
        description: ModelDescription,
        kernels: Kernels,
        devices: Devices,
        graphs: DecodeGraphs | None = None,
        draws: DeviceDraws | None = None,
    ) -> None:
        self.model_config = model_config
        self.description = description
        self.layout = cache.layout
        self.kernels = kernels.name
        self.device = str(kernels.device)
        self.prefix_caching = PrefixCaching(kernels.phases_agree, model_config.rope.regimes)
        self.cost = CostModel.of(model_config, cache.layout.dtype, kernels.quantization)
        self._kernels = kernels
        self._devices = devices
        self._model = model
        self._cache = cache
        self._graphs = graphs
        # None: the host draws.
        self._draws = draws
        # Row of each sequence whose token the latest launched step draws.
        self._drawn_rows: dict[str, int] = {}
        self._sampler = Sampler(model_config.vocab_size)

    @classmethod
    def load(
        cls,
        folder: Path,
        config: EngineConfig,
        *,
        allocate: Allocate | None = None,
        devices: Devices | None = None,
    ) -> Runner:
        """Load a Hugging Face folder; ``allocate`` gives the memory of the KV arena.

        The calling thread's device is then the runner's. Raises UnsupportedModel, naming what and why, and BadConfig.
        """
        devices = devices or TorchDevices()
        invariant = config.is_batch_invariant
        kernels = select_kernels(
            config.kernels, is_batch_invariant=invariant, quantization=config.quantization, device=config.device,
            devices=devices,
        )  # fmt: skip
        return cls.load_on(kernels, folder, config, allocate=allocate, devices=devices)

    @classmethod
    def load_on(
        cls, kernels: Kernels, folder: Path, config: EngineConfig, *, allocate: Allocate | None, devices: Devices
    ) -> Runner:
        """``load`` with kernels that are there."""
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        device = kernels.device
        devices.enter(device)
        devices.settle(device)
        before = devices.gpu_memory(device)
        whole_config = ModelConfig.from_folder(folder)
        model_config = whole_config.within(config.max_model_tokens)
        dtype = model_config.dtype if config.dtype == "auto" else config.dtype
        # Before anything is read: a machine out of memory kills processes, not always the one that used most.
        name = _shown(device, devices)
        memory = devices.host_memory() if before is None else Memory(before.free_bytes, f"what is free on {name}")
        layout = layout_before_loading(model_config, config, dtype, memory, is_measured=before is not None)
        with torch.inference_mode(), Checkpoint(folder) as checkpoint:
            whole_config = checkpoint.check(whole_config)
            model_config = whole_config.within(config.max_model_tokens)
            model = Model(model_config, checkpoint, kernels, TORCH_DTYPES[dtype])
            description = ModelDescription(
                name=folder.resolve().name,
                fingerprint=quantized_fingerprint(checkpoint.fingerprint(whole_config), kernels.quantization),
                dtype=dtype,
                max_model_tokens=model_config.max_model_tokens,
                vocab_size=model_config.vocab_size,
            )
        draws = None
        if isinstance(kernels, DeviceKernels):
            with torch.inference_mode():
                draws = DeviceDraws(kernels.sampler(config.scheduler.max_num_seqs, model_config.vocab_size))
        parts = _Parts(model, model_config, description, kernels, config, devices, draws)
        if layout is None:
            assert before is not None, "what a processor has is reckoned"
            layout = parts.measured_layout(before, name)
        _log.info("%s", shown(layout))
        buffer = None if allocate is None else _allocated(allocate, layout.total_bytes, device)
        with torch.inference_mode():
            runner = parts.runner(KvCache(layout, buffer, device))
        is_compiled = isinstance(kernels, DeviceKernels) and kernels.is_compiled
        runner.warm_up(config, is_whole=is_compiled)
        return runner

    def enter_thread(self) -> None:
        """To be called once by the thread that will launch: a thread of its own starts on GPU 0."""
        self._devices.enter(self._kernels.device)

    def warm_up(self, config: EngineConfig, *, is_whole: bool) -> None:
        """Take steps, so that no kernel is compiled while serving: ``is_whole``, one of every kind that ``config``
        allows; else a prompt and a generated token. To be called while there are no sequences."""
        shapes = MINIMAL
        if is_whole and isinstance(self._kernels, DeviceKernels):
            shapes = self._kernels.launch_shapes(self.model_config, self.layout)
        limits = config.scheduler
        plans = warm_up_plans(
            shapes, self.layout, max_batch_tokens=limits.max_batch_tokens, max_num_seqs=limits.max_num_seqs,
            max_model_tokens=self.model_config.max_model_tokens,
        )  # fmt: skip
        for plan in plans:
            # Told of layers a step is not replayed: those that are were recorded, which compiled them.
            self.execute(plan, lambda _: None)

    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Run one step. ``on_layer`` as in ``launch``."""
        return self.launch(plan, on_layer).result()

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched while one runs."""
        return self._draws is not None

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> Launched:
        """Begin a step. ``on_layer(i)`` is called in this thread once layer i's keys and values are all written.

        On a GPU that call says that the writing is queued on this thread's current stream: a reader on another stream
        records an event on this one during the call, and waits for it.
        """
        assert plan.pieces, "a step has at least one piece"
        # Nothing is in its row if this step fails.
        drawn_rows, self._drawn_rows = self._drawn_rows, {}
        sampling = tuple(p for p in plan.pieces if p.samples)
        sequences = tuple(p.sequence for p in sampling)
        scored = tuple(p for p in plan.pieces if p.scored)
        with torch.inference_mode():
            draws = self._draws
            if draws is None:
                logits, peaks, hidden = self._forward(plan, drawn_rows, on_layer)
                return HostDrawn(self._sampler, sequences, scored, logits, peaks, _pooled(plan, hidden))
            prepared = draws.prepare(sampling, drawn_rows)
            reports = self._step(plan, scored, draws, prepared.columns, drawn_rows, on_layer)
            launched = _fetch(draws, sequences, scored, reports, prepared)
        self._drawn_rows = {sequence.sequence_id: i for i, sequence in enumerate(sequences)}
        return launched

    def _step(
        self,
        plan: StepPlan,
        scored: tuple[Piece, ...],
        draws: DeviceDraws,
        columns: Draws,
        drawn_rows: Mapping[str, int],
        on_layer: Callable[[int], None] | None,
    ) -> _Reports:
        """The device draws the tokens of the pieces that sample."""
        # A layer is told between layers, where a recorded step cannot stop.
        rows = decode_rows(plan, drawn_rows) if on_layer is None else None
        if rows is not None and self._graphs is not None and not self._prefers_unrecorded(rows):
            graph = self._graphs.find(len(rows), 1 + max(row.position for row in rows))
            if graph is not None:
                return _Reports(graph.step(rows, columns).logits, None, {})
        logits, _, hidden = self._forward(plan, drawn_rows, on_layer)
        num_drawn = len(columns.slot)
        scores = None
        if scored:
            token_ids, num_top = (to_device(column, logits.device) for column in scored_tokens(scored))
            scores = to_host(draws.sampler.score(logits[num_drawn:], token_ids, num_top))
        on_device = Draws(*(to_device(column, logits.device) for column in columns))
        draws.sampler.draw(logits[:num_drawn], on_device, draws.drawn)
        return _Reports(logits, scores, _pooled(plan, hidden))

    def _prefers_unrecorded(self, rows: Seq[DecodeRow]) -> bool:
        assert isinstance(self._kernels, DeviceKernels)
        tables, lengths = [row.block_ids for row in rows], [row.position + 1 for row in rows]
        return self._kernels.prefers_unrecorded(self.model_config, self.layout, tables, lengths)

    def _forward(self, plan: StepPlan, drawn_rows: Mapping[str, int], on_layer: Callable[[int], None] | None) -> Logits:
        batch = build_batch(plan, self.layout, drawn_rows)
        drawn = None if self._draws is None else self._draws.drawn
        return self._model.forward(batch, self._cache, self.layout, on_layer, drawn)

    def forget(self, sequence_id: str) -> None:
        """Drop what is kept for a sequence that has ended; unknown ids are fine."""
        self._sampler.forget(sequence_id)
        if self._draws is not None:
            self._draws.forget(sequence_id)


class _Reports(NamedTuple):
    """Of a step on a device: its logits there, and what is on its way to the host beside the tokens."""

    logits: Tensor
    # Of the pieces that score positions; None if there are none.
    scores: Tensor | None
    # As in StepResult.
    hidden: Mapping[str, Tensor]


def _pooled(plan: StepPlan, hidden: Tensor) -> dict[str, Tensor]:
    """The hidden states of the sequences with a pool, as in StepResult, on their way to the host."""
    if all(p.sequence.pool is None for p in plan.pieces):
        return {}
    found: dict[str, Tensor] = {}
    at, sampled = sum([p.samples for p in plan.pieces]), 0
    for p in plan.pieces:
        rows = [*range(at, at + len(p.scored)), *[sampled] * p.samples]
        at, sampled = at + len(p.scored), sampled + p.samples
        if p.sequence.pool is not None and rows:
            index = to_device(torch.tensor(rows), hidden.device)
            found[p.sequence.sequence_id] = to_host(hidden[index].float())
    return found


def _fetch(
    draws: DeviceDraws,
    sequences: tuple[Sequence, ...],
    scored: tuple[Piece, ...],
    reports: _Reports,
    prepared: Prepared,
) -> DeviceDrawn:
    """Queue what the host wants to know of the step."""
    token_ids = to_host(draws.drawn[: len(sequences)])
    reported = tuple(i for i, n in enumerate(prepared.columns.num_logprobs.tolist()) if n >= 0)
    logprobs = to_host(draws.sampler.report[: 1 + max(reported, default=-1)])
    logits, scores, hidden = reports
    done = new_event(logits.device)
    if done is not None:
        done.record()
    return DeviceDrawn(
        sequences, logits, token_ids, reported, logprobs, scored, scores, hidden, prepared.failed, done
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a runner is made of, but for its cache."""

    model: Model
    model_config: ModelConfig
    description: ModelDescription
    kernels: Kernels
    config: EngineConfig
    devices: Devices
    draws: DeviceDraws | None

    def runner(self, cache: KvCache, *, is_trial: bool = False) -> Runner:
        """With recorded decode steps, unless it ``is_trial``."""
        max_length = min(self.model_config.max_model_tokens, cache.layout.num_blocks * cache.layout.block_tokens)
        return Runner(
            self.model,
            cache,
            model_config=self.model_config,
            description=self.description,
            kernels=self.kernels,
            devices=self.devices,
            graphs=None if is_trial else self._graphs(cache, max_length),
            draws=self.draws,
        )

    @property
    def _max_graph_rows(self) -> int:
        can_record = isinstance(self.kernels, DeviceKernels)
        return min(self.config.scheduler.max_num_seqs, self.config.max_graph_seqs) if can_record else 0

    def _graphs(self, cache: KvCache, max_length: int, most: int | None = None) -> DecodeGraphs | None:
        kernels, draws, max_rows = self.kernels, self.draws, self._max_graph_rows
        if not isinstance(kernels, DeviceKernels) or draws is None or max_rows == 0:
            return None
        return DecodeGraphs(
            self.model, cache, self.model_config, kernels,
            max_rows=max_rows, max_length=max_length, drawn=draws.drawn, sampler=draws.sampler, most=most,
        )  # fmt: skip

    def measured_layout(self, before: GpuMemory, name: str) -> KvLayout:
        """As large as the GPU allows. Raises BadConfig if that is no block."""
        config, device, model_config = self.config, self.kernels.device, self.model_config
        # On trial all of a step lies in one block, on top of each other, and what was never written is read too.
        trial = kv_layout(model_config, replace(config, num_blocks=1), self.description.dtype)
        longest = model_config.max_model_tokens
        with torch.inference_mode():
            cache = KvCache(trial, None, device)
            for layer in range(trial.num_layers):
                cache.layer(layer).zero_()
        runner = self.runner(cache, is_trial=True)
        limits = config.scheduler
        plan = largest_step(
            trial, max_batch_tokens=limits.max_batch_tokens, max_num_seqs=limits.max_num_seqs, max_model_tokens=longest
        )

        def record(count: int) -> object:
            with torch.inference_mode():
                return self._graphs(cache, longest, count)

        use = measure(
            self.devices, device, before, name=name, is_alone=config.gpu_workers == 1,
            run_largest_step=lambda: runner.execute(plan, lambda _: None),
            record=record, num_graphs=len(graph_shapes(self._max_graph_rows, longest)),
        )  # fmt: skip
        _log.info("%s", use)
        left_bytes = gpu_kv_bytes(
            use,
            utilization=config.gpu_memory_utilization,
            num_workers=config.gpu_workers,
            block_bytes=trial.total_bytes,
        )
        return kv_layout(model_config, config, self.description.dtype, kv_bytes=left_bytes)


def _shown(device: torch.device, devices: Devices) -> str:
    """For messages."""
    return str(device) if device.index is None else f"{device} ({devices.look(device.index).gpu})"


def _allocated(allocate: Allocate, num_bytes: int, device: torch.device) -> memoryview | DeviceBuffer:
    """Transfers know memory of the processor and of CUDA's devices. Raises BadConfig for any other."""
    if device.type == "cpu":
        return allocate(num_bytes)
    if device.type == "cuda":
        return allocate(num_bytes, str(device))
    raise BadConfig(
        f"the KV cache lies on {device}, which no transport reaches; expected kernels for cpu or cuda", param="kernels"
    )


def decode_rows(plan: StepPlan, drawn_rows: Mapping[str, int]) -> list[DecodeRow] | None:
    """The rows of a step in which every sequence computes its newest token, and generated that itself; else None."""
    for p in plan.pieces:
        # A prompt's last token alone is no decode: the other kernel computes prompts.
        is_decode = p.num_tokens == 1 and p.samples and p.start >= len(p.sequence.spec.prompt_token_ids)
        if not is_decode:
            return None
    return [
        DecodeRow(token_ids_of(p, drawn_rows)[0], p.start, len(s.spec.prompt_token_ids), s.block_ids)
        for p in plan.pieces
        for s in (p.sequence,)
    ]
