"""Compiles and runs one small kernel of the kind that a worker would use, for `baton doctor`.

It runs in a process of its own: a missing instruction of the processor, or a driver that hangs, ends only that process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from baton.errors import InternalError
from cli.machine import Finding

if TYPE_CHECKING:
    from engine.kernels.interface import Kernels

_SUBJECT = "kernel trial"
# Triton compiles one in seconds, its first in a process in more.
_TIMEOUT_S = 180.0
# Results are rounded to float32, in another order than the reference's.
_MAX_ERROR = 1e-5
_ADVICE = "no worker can compute here with --kernels auto: mend what it says, or reinstall torch, triton and llvmlite"


def run(device: str) -> str:
    """In the child: what was compiled, and in which time."""
    from engine.devices import TorchDevices
    from engine.kernels import select_kernels

    devices = TorchDevices()
    kernels = select_kernels("auto", device=device, devices=devices)
    devices.enter(kernels.device)
    return check(kernels)


def check(kernels: Kernels) -> str:
    """Raises InternalError if they compute something else than the reference."""
    import torch

    from engine.kernels.reference import ReferenceKernels

    x, weight = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) for shape in ((3, 64), (64,)))
    began_s = time.monotonic()
    found = kernels.rms_norm(x.to(kernels.device), weight.to(kernels.device), 1e-6).cpu()
    took_s = time.monotonic() - began_s
    error = float((found - ReferenceKernels().rms_norm(x, weight, 1e-6)).abs().max())
    if not error <= _MAX_ERROR:
        raise InternalError(
            f"{kernels.name} on {kernels.device} is {error:g} from the reference, expected {_MAX_ERROR:g}"
        )
    return f"{kernels.name} on {kernels.device}: compiled, run and right in {took_s:.1f} s"


def command(device: str) -> tuple[str, ...]:
    program = str(Path(__file__).resolve().with_name("__main__.py"))
    return (sys.executable, "-P", program, "try-kernels", "--device", device)


def kernel(child: Sequence[str], *, timeout_s: float = _TIMEOUT_S) -> Finding:
    """``child`` is `command` of a device."""
    try:
        done = subprocess.run(child, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Finding(_SUBJECT, False, f"a kernel was not compiled and run in {timeout_s:.0f} s", _ADVICE)
    if done.returncode == 0:
        return Finding(_SUBJECT, True, done.stdout.strip().splitlines()[-1])
    if done.returncode < 0:
        return Finding(_SUBJECT, False, f"ended by {signal.Signals(-done.returncode).name}", _ADVICE)
    said = done.stderr.strip().splitlines() or ["nothing"]
    return Finding(_SUBJECT, False, said[-1], _ADVICE)


def tools(environment: Mapping[str, str] = os.environ, include: Path | None = None) -> Iterator[Finding]:
    """What Triton builds the launchers of its kernels with; LLVM's kernels for processors need none of it."""
    named = environment.get("CC")
    compiler = shutil.which(named or "gcc", path=environment.get("PATH")) or (
        None if named else shutil.which("clang", path=environment.get("PATH"))
    )
    advice = "apt-get install gcc, or set CC: Triton builds the launchers of its kernels with it"
    missing = f"CC is {named}, which is not there" if named else "no gcc, no clang"
    yield Finding("C compiler", compiler is not None, compiler or missing, advice)
    header = (include or _include()) / "Python.h"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    advice = f"apt-get install python{version}-dev (elsewhere python{version}-devel): Triton's launchers include it"
    yield Finding("Python.h", header.is_file(), str(header) if header.is_file() else f"no {header}", advice)


def _include() -> Path:
    """Where Triton looks: Debian's scheme of its own has no headers."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
