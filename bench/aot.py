"""Compiles kernels for GPUs that are not there, as a launch would: `python -m bench.aot`.

A driver stands in for the GPU's: kernels are launched on tensors without memory, Triton specializes and compiles them
for the driver's target, and what would be loaded is looked at instead: registers, stack (spills), shared memory and
the instructions that the tiles are meant to become.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

# Bytes of shared memory one program may have.
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448}
_COUNTED = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in one specialization."""

    kernel: str
    case: str
    arch: int
    triton: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    # Instructions of the kinds that matter, by their SASS name without modifiers.
    instructions: dict[str, int] = field(default_factory=dict)


class _Utils:
    """What Triton asks a driver for when it loads a kernel."""

    def __init__(self, arch: int, loaded: Callable[[str, bytes, int], None]) -> None:
        self._arch = arch
        self._loaded = loaded

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT_BYTES[self._arch], "multiprocessor_count": 132}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self._loaded(name, binary, shared)
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""


class CompileOnlyDriver:
    """Stands where Triton's driver of a GPU stands; a launch compiles and does nothing else."""

    def __init__(self, arch: int) -> None:
        self.case = ""
        self.compiled: list[Compiled] = []
        self._arch = arch
        self._metadata: Any = None
        self.utils = _Utils(arch, self._load)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: one number per target.
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self._metadata = metadata
        return lambda *_args, **_options: None

    def _load(self, name: str, binary: bytes, shared: int) -> None:
        registers, stack, counts = inspect_binary(binary)
        self.compiled.append(
            Compiled(
                name, self.case, self._arch, triton.__version__, self._metadata.num_warps, self._metadata.num_stages,
                registers, stack, shared, counts,
            )
        )  # fmt: skip


@contextmanager
def compiling(arch: int) -> Iterator[CompileOnlyDriver]:
    """Within it, launches on meta tensors compile for ``sm_<arch>``. Not under the interpreter."""
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
    stand_in = CompileOnlyDriver(arch)
    driver.set_active(stand_in)
    try:
        yield stand_in
    finally:
        driver._active = None  # noqa: SLF001 - reset_active() asks for a real driver


def inspect_binary(binary: bytes) -> tuple[int, int, dict[str, int]]:
    """(registers, stack bytes, counts of instructions) of a cubin with one kernel."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", sass, re.MULTILINE)
    return int(found[1]), int(found[2]), {name: names.count(name) for name in _COUNTED}
