"""Kernels compile for sm_80 and sm_90: no spills, within shared memory, to the products they are meant to use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
