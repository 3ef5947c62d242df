"""The KV cache on a GPU: what its memory leaves after weights, the largest step and recorded steps, on a fake one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baton.errors import BadConfig
from baton.types import KvLayout
from engine.config import EngineConfig
from engine.decode_graph import graph_shapes
from engine.fake_devices import FakeDevices, FakeGpuMemory
from engine.kernels.interface import Attention, LaunchShapes, Linear
from engine.kernels.reference import ReferenceKernels
from engine.memory import GpuUse, gpu_kv_bytes, kv_layout, weight_bytes
from engine.model_config import ModelConfig
from engine.runner import Runner
from engine.scheduler_config import SchedulerConfig
from tests.support.device_sampler import BestSampler
from tests.support.models import ORACLE_CASES

CASE = next(case for case in ORACLE_CASES if case.name == "llama-gqa2-d32")
MIB, GIB = 1 << 20, 1 << 30
ROW_BYTES, GRAPH_BYTES, MORE_BYTES = 64 << 10, 40 << 20, 3 << 20
USE = GpuUse("cuda:0", 100 * GIB, 5 * GIB, 30 * GIB, 2 * GIB, 1 * GIB, free_bytes=70 * GIB, taken_bytes=20 * GIB)


class _Taken:
    """Memory of a recorded step, until it is let go of."""

    def __init__(self, gpu: FakeGpuMemory, num_bytes: int) -> None:
        self._gpu, self._num_bytes = gpu, num_bytes
        gpu.take(num_bytes)

    def __call__(self, queries: Tensor, cache: Tensor, window: int | None) -> Tensor:
        raise AssertionError("nothing is computed by a recorded step here")

    def __del__(self) -> None:
        self._gpu.take(-self._num_bytes)


class GpuKernels(ReferenceKernels):
    """Computes on the processor and tells the fake GPU what it would take there."""

    is_compiled = False

    def __init__(self, gpu: FakeGpuMemory) -> None:
        self.gpu = gpu
        self.max_rows = 0

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        self.gpu.take(weight.nbytes)
        # What a loader needs for a moment, far more than any step.
        self.gpu.pass_through(500 * MIB)
        return super().linear(weight, bias)

    def embed(self, table: Tensor, token_ids: Tensor, drawn: Tensor | None) -> Tensor:
        return table[token_ids]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.max_rows = max(self.max_rows, len(x))
        self.gpu.pass_through(len(x) * ROW_BYTES)
        return super().rms_norm(x, weight, eps)

    def launch_shapes(self, config: ModelConfig, layout: KvLayout) -> LaunchShapes:
        raise AssertionError("nothing is compiled")

    def device_decode(
        self, config: ModelConfig, layout: KvLayout, tables: Tensor, lengths: Tensor, max_length: int
    ) -> Attention:
        # The others fit into what the largest left, but for what the driver keeps of each.
        is_largest = (len(lengths), max_length) == graph_shapes(8, 2048)[0]
        return _Taken(self.gpu, GRAPH_BYTES if is_largest else MORE_BYTES)

    def prefers_unrecorded(
        self, config: ModelConfig, layout: KvLayout, tables: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> bool:
        return True

    def sampler(self, max_rows: int, vocab_size: int) -> BestSampler:
        return BestSampler(max_rows, vocab_size)


def load(folder: Path, gpu: FakeGpuMemory, config: EngineConfig) -> tuple[Runner, GpuKernels, FakeDevices]:
    kernels, devices = GpuKernels(gpu), FakeDevices(memory=gpu)
    return Runner.load_on(kernels, folder, config, allocate=None, devices=devices), kernels, devices


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASE.save(tmp_path_factory.mktemp("gpu") / "model")


SCHEDULER = SchedulerConfig(max_batch_tokens=300, max_num_seqs=16)
CONFIG = EngineConfig(scheduler=SCHEDULER, max_graph_seqs=8)


@pytest.mark.parametrize("utilization", [0.9, 0.5])
def test_the_cache_is_what_weights_the_largest_step_and_recorded_steps_leave(
    folder: Path, utilization: float, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = FakeGpuMemory(total_bytes=GIB, others_bytes=100 * MIB)
    config = EngineConfig(scheduler=SCHEDULER, max_graph_seqs=8, gpu_memory_utilization=utilization)
    with caplog.at_level(logging.INFO):
        runner, kernels, devices = load(folder, gpu, config)
    graphs = GRAPH_BYTES + (len(graph_shapes(8, 2048)) - 1) * MORE_BYTES
    weights = gpu.taken_bytes - graphs
    assert weights > 0
    expected = int(utilization * GIB - 100 * MIB - weights - 300 * ROW_BYTES - graphs)
    block = runner.layout.block_bytes * runner.layout.num_layers
    assert kernels.max_rows == 300, "the largest prompt has been there"
    assert runner.layout.num_blocks == expected // block
    tokens = runner.layout.num_blocks * runner.layout.block_tokens
    assert f"KV cache: {runner.layout.num_blocks:,} blocks, {tokens:,} tokens, " in caplog.text
    # What is really taken then is within the share, the cache included.
    assert gpu.taken_bytes + 300 * ROW_BYTES + runner.layout.total_bytes + 100 * MIB <= utilization * GIB
    assert devices.entered[0][1] == "cpu", "the thread that loads is on the device first"


@pytest.mark.parametrize(("setting", "value"), [("num_blocks", 7), ("kv_bytes", 9 * 2**20)])
def test_a_size_that_was_given_wins_and_nothing_is_tried(folder: Path, setting: str, value: int) -> None:
    gpu = FakeGpuMemory(total_bytes=GIB)
    config = EngineConfig(scheduler=SCHEDULER, max_graph_seqs=8, **{setting: value})
    runner, kernels, _ = load(folder, gpu, config)
    expected = kv_layout(ModelConfig.from_folder(folder), config, "float32")
    assert runner.layout == expected
    assert kernels.max_rows < 10


def test_weights_that_do_not_fit_are_refused_before_they_are_read(folder: Path) -> None:
    need = weight_bytes(ModelConfig.from_folder(folder), "float32", "none")
    gpu = FakeGpuMemory(GIB, others_bytes=GIB - need + 1)
    kernels, devices = GpuKernels(gpu), FakeDevices(memory=gpu)
    with pytest.raises(BadConfig, match="what is free on cpu"):
        Runner.load_on(kernels, folder, CONFIG, allocate=None, devices=devices)
    assert gpu.peak_bytes == 0


def test_a_gpu_without_room_for_a_block_is_told_with_all_numbers(folder: Path) -> None:
    with pytest.raises(BadConfig) as caught:
        load(folder, FakeGpuMemory(total_bytes=GIB, others_bytes=890 * MIB), CONFIG)
    message = caught.value.message
    assert "at 90% of its 1024 MiB: 890 MiB in use before this worker" in message
    assert "--gpu-memory-utilization" in message
    assert caught.value.param == "gpu_memory_utilization"


def kv(use: GpuUse, num_workers: int = 1, utilization: float = 0.9) -> int:
    return gpu_kv_bytes(use, utilization=utilization, num_workers=num_workers, block_bytes=MIB)


def test_a_worker_alone_counts_what_others_have() -> None:
    # 90 of 100, less others and CUDA, what is taken beside torch, the peak and recorded steps.
    assert kv(USE) == (90 - 5 - 2 - 30 - 1) * GIB
    # No more than is there: another process has come meanwhile.
    assert kv(replace(USE, free_bytes=20 * GIB)) == (20 - (30 + 1 - 20)) * GIB


def test_workers_that_share_a_gpu_share_the_budget() -> None:
    # What each finds in use may be the other's, so that it does not count; CUDA's own part is allowed for.
    two = kv(USE, num_workers=2)
    assert two == (45 - 1 - 30 - 1) * GIB
    assert 2 * (two + (30 + 1 + 1) * GIB) <= 0.9 * USE.total_bytes
    with pytest.raises(BadConfig, match="shared by 4 workers"):
        kv(USE, num_workers=4)


def test_the_thread_that_launches_is_on_the_runners_device(folder: Path) -> None:
    runner, _, devices = load(folder, FakeGpuMemory(total_bytes=GIB), CONFIG)
    before = len(devices.entered)
    runner.enter_thread()
    assert len(devices.entered) == before + 1
    assert devices.entered[-1][1] == str(torch.device("cpu"))
