"""Runs the tests of Triton's kernels on the GPU, or under Triton's interpreter, which must be chosen before the
kernels are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.support.root import ROOT

FOLDER = Path(__file__).parent / "triton_interpreter"
# Whole models; in the short suite the cluster on Triton's kernels stands for them.
LONG = ("test_model", "test_runner", "test_sampling_large", "test_shared_runner", "test_tune", "test_warm_up")
SHORT = [name for path in sorted(FOLDER.glob("test_*.py")) if (name := path.stem) not in LONG]
# What torch asks for before cuBLAS counts as deterministic.
_ON_GPU = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
_INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Minutes alone, several times that on a machine that does other work as well.
LONG_LIMIT_S = 900
SHORT_LIMIT_S = 100


def run(names: Sequence[str], test_limit_s: float, limit_s: float) -> None:
    pytest.importorskip("triton", reason="triton is only for Linux")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--timeout={test_limit_s}"),
            *(str(FOLDER / f"{name}.py") for name in names),
        ],
        env={**os.environ, **(_ON_GPU if torch.cuda.is_available() else _INTERPRETED)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# Several files in a process: to start one and to import torch and triton takes longer than most files. Two of them, so
# that they run beside each other.
@pytest.mark.timeout(LONG_LIMIT_S + 40)
@pytest.mark.parametrize("names", [SHORT[::2], SHORT[1::2]], ids=" ".join)
def test_kernels(names: list[str]) -> None:
    run(names, SHORT_LIMIT_S, LONG_LIMIT_S)


@pytest.mark.long
@pytest.mark.timeout(LONG_LIMIT_S + 40)
@pytest.mark.parametrize("name", LONG)
def test_whole_models(name: str) -> None:
    run([name], LONG_LIMIT_S, LONG_LIMIT_S + 10)
