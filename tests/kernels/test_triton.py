"""Runs the tests of Triton's kernels on the GPU, or under Triton's interpreter, which must be chosen before the
kernels are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "triton_interpreter"
# Whole models; in the short suite the cluster on Triton's kernels stands for them.
LONG = ("test_model", "test_runner", "test_sampling_large", "test_shared_runner", "test_tune", "test_warm_up")
# Minutes alone, several times that on a machine that does other work as well.
LONG_LIMIT_S = 900
LONG_MARKS = (pytest.mark.long, pytest.mark.timeout(LONG_LIMIT_S + 40))
NAMES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


# What torch asks for before cuBLAS counts as deterministic.
_ON_GPU = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
_INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=LONG_MARKS) if n in LONG else n for n in NAMES])
def test_kernels(name: str) -> None:
    pytest.importorskip("triton", reason="triton is only for Linux")
    limit_s = LONG_LIMIT_S if name in LONG else 100
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--timeout={limit_s}"),
            str(FOLDER / f"{name}.py"),
        ],
        env={**os.environ, **(_ON_GPU if torch.cuda.is_available() else _INTERPRETED)},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        timeout=limit_s + 10,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
