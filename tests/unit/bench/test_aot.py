"""Kernels compile for sm_80 and sm_90 without spills, within shared memory, to the products they are meant to use; and
what the bench compiles ahead is what serving launches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.root import ROOT


def compile_for(arch: str, *arguments: str, timeout_s: float) -> str:
    triton = pytest.importorskip("triton", reason="triton is only for Linux")
    for tool in ("ptxas", "cuobjdump"):
        if not Path(getattr(triton.knobs.nvidia, tool).path).is_file():
            pytest.skip(f"this triton does not bundle {tool}")
    # In a process of its own: a driver stands in for the GPU's.
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--arch", arch, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("arch", "products"), [("80", "HMMA"), ("90", "HGMMA")])
def test_the_main_kernels_compile_well(arch: str, products: str) -> None:
    lines = compile_for(arch, "--fast", timeout_s=110).splitlines()
    for kernel in ("_prefill_kernel", "_grid_kernel", "_stream_kernel"):
        assert any(kernel in line and products in line for line in lines)
    # Descriptors where weights are streamed, on hardware that has them.
    assert any("UTMALDG" in line for line in lines) == (arch == "90")


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_configuration_compiles_well(arch: str, tmp_path: Path) -> None:
    compile_for(arch, "--results", str(tmp_path), timeout_s=1400)


_AHEAD = """
from bench import gpu_kernels
from bench.aot import CompileOnlyDriver, Meta
from bench.gpu_measure import Device
from bench.gpu_sizes import TINY
from engine.kernels.triton.fake_driver import standing_in
from engine.kernels.triton.tuning import load

tuning = load("A GPU", (9, 0), 132)
ahead, real = (list(gpu_kernels.works(TINY[2], tuning, device)) for device in (Meta(), Device()))
names = {"decode attention, blocks of 64", "product, gate and up 80 x 84", "prefill attention, contiguous", "RMSNorm"}
with standing_in(CompileOnlyDriver(90, inspects=False)) as stand_in:
    for made_up, work in zip(ahead, real, strict=True):
        if work.kernel not in names:
            continue
        names.remove(work.kernel)
        before = stand_in.num_loaded
        made_up.ours(made_up.make(0))
        compiled = stand_in.num_loaded
        work.ours(work.make(0))
        print(work.kernel, compiled - before, stand_in.num_loaded - compiled)
assert not names
"""


def test_what_is_compiled_ahead_is_what_is_launched() -> None:
    """On tensors without memory first; then nothing is left to compile for tensors that have some."""
    pytest.importorskip("triton", reason="triton is only for Linux")
    done = subprocess.run(
        [sys.executable, "-c", _AHEAD], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(int(line.split()[-2]) >= 1 and line.split()[-1] == "0" for line in lines), lines


_SERVED = """
import torch
from bench import gpu_kernels
from bench.aot import Meta
from bench.gpu_sizes import TINY
from engine.kernels.triton.fake_driver import FakeDriver, standing_in
from engine.kernels.triton.tuning import load

def shown(argument):
    base = getattr(argument, "base", argument)
    blocks = getattr(argument, "block_shape", None)
    return (base.dtype, base.shape, base.stride(), blocks) if isinstance(base, torch.Tensor) else argument

names = {"prefill attention, blocks of 64", "product, gate and up 80 x 84", "add and RMSNorm", "SwiGLU",
         "RoPE and KV write", "embedding", "blocks out", "decode attention, blocks of 64"}
with standing_in(FakeDriver(90)) as fake:
    for work in gpu_kernels.works(TINY[2], load("A GPU", (9, 0), 132), Meta()):
        if work.kernel not in names:
            continue
        names.remove(work.kernel)
        arguments = work.make(0)
        runs = []
        for _ in range(3):
            fake.launches.clear()
            work.ours(arguments)
            runs.append([(l.binary, l.grid, l.stream, [shown(a) for a in l.arguments]) for l in fake.launches])
            quick = sum(all(hook is None for hook in l.hooks) for l in fake.launches)
        assert runs[0] == runs[1] == runs[2], work.kernel
        assert quick == len(runs[2]) > 0, work.kernel
        print(work.kernel, quick)
assert not names, names
"""


def test_what_serving_launches_is_launched_alike_and_quickly() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SERVED], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 8
