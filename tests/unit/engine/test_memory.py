"""How much memory there is, within every container's limit, and that what does not fit is refused with both numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from baton.errors import BadConfig
from baton.types import KvLayout
from engine.config import EngineConfig
from engine.fake_devices import FakeDevices
from engine.memory import (
    Memory,
    block_bytes,
    check_fits,
    host_kv_bytes,
    kv_layout,
    of_machine,
    shown,
    step_bytes,
    weight_bytes,
)
from engine.model_config import ModelConfig
from engine.runner import Runner
from engine.scheduler_config import SchedulerConfig
from engine.warm_up import largest_step
from tests.support.models import ORACLE_CASES, ModelCase

STEP_CASES = (
    ModelCase("odd-sizes", hidden=72, intermediate=100, heads=3, kv_heads=3, head_dim=24),
    ModelCase("wide-vocabulary", hidden=32, intermediate=32, options={"vocab_size": 5000}),
    ModelCase("wide-heads", hidden=32, intermediate=32, heads=8, kv_heads=8, head_dim=64),
)
CASE = next(case for case in ORACLE_CASES if case.name == "llama-gqa2-d32")
MIB = 1 << 20


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path / "proc" / "meminfo", f"MemTotal: {900 * 1024} kB\nMemAvailable: {800 * 1024} kB\n")
    return tmp_path / "proc"


def v2(group: Path, limit: str, used: int, cache: int = 0) -> None:
    write(group / "memory.max", f"{limit}\n")
    write(group / "memory.current", f"{used}\n")
    write(group / "memory.stat", f"anon 5\ninactive_file {cache}\nactive_file 7\n")


def test_without_limits_it_is_what_the_machine_has(proc: Path, tmp_path: Path) -> None:
    assert of_machine(proc, tmp_path / "none").available_bytes == 800 * MIB
    write(proc / "self" / "cgroup", "0::/user.slice\n")
    v2(tmp_path / "groups" / "user.slice", "max", 5)
    assert of_machine(proc, tmp_path / "groups").available_bytes == 800 * MIB


@pytest.mark.parametrize("place", ["", "system.slice", "system.slice/baton.service"])
def test_the_least_of_all_groups_on_the_way_counts(proc: Path, tmp_path: Path, place: str) -> None:
    groups = tmp_path / "groups"
    write(proc / "self" / "cgroup", "0::/system.slice/baton.service\n")
    v2(groups / "system.slice", str(700 * MIB), 10 * MIB)
    v2(groups / place, str(300 * MIB), 120 * MIB, cache=20 * MIB)
    found = of_machine(proc, groups)
    assert found.available_bytes == 200 * MIB
    assert str(groups / place / "memory.max") in found.bound
    assert "300 MiB" in found.bound


@pytest.mark.parametrize("place", ["", "docker/abc"], ids=["in the container", "on the host"])
def test_control_groups_of_version_1(proc: Path, tmp_path: Path, place: str) -> None:
    write(proc / "self" / "cgroup", "3:cpu,cpuacct:/x\n2:memory:/docker/abc\n1:name=systemd:/\n")
    group = tmp_path / "groups" / "memory" / place
    write(group / "memory.limit_in_bytes", f"{100 * MIB}\n")
    write(group / "memory.usage_in_bytes", f"{50 * MIB}\n")
    write(group / "memory.stat", f"inactive_file 1\ntotal_inactive_file {10 * MIB}\n")
    assert of_machine(proc, tmp_path / "groups").available_bytes == 60 * MIB


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    has = Memory(1000 * MIB, "what a test has")
    check_fits(has, kv_bytes=400 * MIB, weight_bytes=100 * MIB, num_workers=2)
    with pytest.raises(BadConfig) as caught:
        check_fits(has, kv_bytes=400 * MIB, weight_bytes=101 * MIB, num_workers=2)
    message = caught.value.message
    assert "2 workers, each with a KV cache of 400 MiB and weights of 101 MiB: 1002 MiB in all" in message
    assert "at most 1000 MiB, what a test has" in message
    assert "--kv-mib" in message


@pytest.mark.parametrize(
    "config", [EngineConfig(kv_bytes=9_000_000 * MIB), EngineConfig(num_blocks=2**31 - 1)], ids=str
)
def test_a_cache_beyond_the_machine_is_refused_before_it_is_allocated(tmp_path: Path, config: EngineConfig) -> None:
    def allocate(num_bytes: int, device: str = "cpu") -> memoryview:
        raise AssertionError(f"{num_bytes} bytes were asked for")

    with pytest.raises(BadConfig, match=r"MiB in all, expected at most \d+ MiB"):
        Runner.load(CASE.save(tmp_path / "model"), config, allocate=allocate)


def test_weights_and_a_step_count_beside_the_cache(tmp_path: Path) -> None:
    folder, config = CASE.save(tmp_path / "model"), EngineConfig(num_blocks=4)
    model = ModelConfig.from_folder(folder)
    kv, step = kv_layout(model, config, "float32").total_bytes, step_bytes(model, config, "float32")
    need = kv + weight_bytes(model, "float32", "none") + step
    with pytest.raises(BadConfig, match=rf"and tensors of a step of {-(-step // MIB)} MiB: .* a small machine"):
        Runner.load(folder, config, devices=FakeDevices(host=Memory(need - 1, "a small machine")))
    Runner.load(folder, config, devices=FakeDevices(host=Memory(need, "just enough")))


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-gqa2-d32", "odd-sizes", "wide-vocabulary", "wide-heads"])
def test_a_recorded_step_keeps_no_more_than_is_counted(
    tmp_path: Path, name: str, dtype: str, quantization: str
) -> None:
    """Its largest step, whose tensors stay: limits that are no powers of two, so that there is room for more rows."""
    case = next(case for case in (*ORACLE_CASES, *STEP_CASES) if case.name == name)
    limits = SchedulerConfig(max_batch_tokens=300, max_num_seqs=20)
    config = EngineConfig(num_blocks=400, kernels="cpu", dtype=dtype, quantization=quantization, scheduler=limits)
    runner = Runner.load(case.save(tmp_path / "model"), config)
    plan = largest_step(runner.layout, max_batch_tokens=300, max_num_seqs=20, max_model_tokens=300)
    runner.execute(plan)
    recorder = runner._model._recorder
    assert recorder is not None
    counted = step_bytes(runner.model_config, config, dtype)
    assert counted / 4 < recorder[1].num_bytes <= counted


def test_without_a_size_the_cache_is_half_of_what_is_left(tmp_path: Path) -> None:
    folder, config = (
        CASE.save(tmp_path / "model"),
        EngineConfig(kernels="reference", scheduler=SchedulerConfig(max_num_seqs=1 << 16)),
    )
    model = ModelConfig.from_folder(folder)
    per_block = block_bytes(model, config, "float32")
    # For one worker, and in equal parts for several that start together.
    own = weight_bytes(model, "float32", "none") + step_bytes(model, config, "float32") + (512 << 20)
    for num_workers in (1, 3):
        has = Memory(num_workers * (own + 20 * per_block), "a test")
        assert host_kv_bytes(has, model, config, "float32", num_workers=num_workers) == 10 * per_block
        less = Memory(num_workers * (own + 2 * per_block - 2), "a test")
        with pytest.raises(BadConfig, match=r"leave no KV block of 1 MiB in \d+ MiB, a test; .*--kv-mib"):
            host_kv_bytes(less, model, config, "float32", num_workers=num_workers)
    runner = Runner.load(folder, config, devices=FakeDevices(host=Memory(own + 20 * per_block, "a test")))
    assert runner.layout.num_blocks == 10


def test_a_cache_is_no_larger_than_its_sequences(tmp_path: Path) -> None:
    """Whatever memory there is: the rest could not be used."""
    model = ModelConfig.from_folder(CASE.save(tmp_path / "model"))
    config = EngineConfig(scheduler=SchedulerConfig(max_num_seqs=3))
    assert model.max_model_tokens % config.block_tokens == 0
    size = host_kv_bytes(Memory(1 << 50, "a test"), model, config, "float32")
    assert kv_layout(model, config, "float32", kv_bytes=size).num_blocks * config.block_tokens == 3 * 2048


@pytest.mark.parametrize(
    ("num_blocks", "text"),
    [(12_345, "KV cache: 12,345 blocks, 197,520 tokens, 24.1 GiB"), (3, "KV cache: 3 blocks, 48 tokens, 6 MiB")],
)
def test_the_pool_is_told_in_every_unit(num_blocks: int, text: str) -> None:
    assert shown(KvLayout(32, num_blocks, 8, 128, 16, "bfloat16")) == text


@pytest.mark.parametrize("command", ["worker", "up"])
def test_two_sizes_of_the_cache_are_refused_before_anything_starts(tmp_path: Path, command: str) -> None:
    folder = CASE.save(tmp_path / "model")
    arguments = ["--model", str(folder), "--kv-mib", "64", "--num-blocks", "8"]
    role = ["--role", "mixed"] if command == "worker" else []
    done = subprocess.run(
        [sys.executable, "-m", "cli", command, *role, *arguments],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--kv-mib (64 MiB) and --num-blocks (8) both say how large" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_cannot_have_its_cache_ends_with_one_line(tmp_path: Path) -> None:
    folder = CASE.save(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-m", "cli", "worker", "--model", str(folder), "--role", "mixed", "--kv-mib", "9000000"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "KV cache of 9000000 MiB" in line


def test_the_workers_of_one_host_count_together(tmp_path: Path) -> None:
    """Each alone would fit, and nothing is started."""
    folder = CASE.save(tmp_path / "model")
    # Four shares of 40 % are more than there is.
    share_mib = int(of_machine().available_bytes * 0.4) >> 20
    done = subprocess.run(
        [sys.executable, "-m", "cli", "up", "--model", str(folder), "--kernels", "cpu", "--kv-mib", str(share_mib),
         "--prefill", "2", "--decode", "2", "--http-port", "0", "--grpc-port", "0"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"4 workers, each with a KV cache of {share_mib} MiB" in done.stderr
    assert "starting" not in done.stderr
