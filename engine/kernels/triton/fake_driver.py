"""Stands where Triton's driver of a GPU stands, on machines without one: kernels are compiled and not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

_Fake = TypeVar("_Fake", bound="FakeDriver")
# Bytes of shared memory one program may have.
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448}


class Launch(NamedTuple):
    """What a binary was launched with."""

    # One object for each binary.
    binary: object
    grid: tuple[int, ...]
    stream: int
    hooks: tuple[object, ...]
    # Constexprs among them.
    arguments: tuple[object, ...]


class FakeDriver:
    """``on_load(name, binary, shared bytes, metadata)`` is told of what a GPU would load."""

    def __init__(self, arch: int, on_load: Callable[[str, bytes, int, Any], None] | None = None) -> None:
        self.num_loaded = 0
        self.launches: list[Launch] = []
        # Off where only the time of launches matters.
        self.is_recording = True
        self.utils = _Utils(self, arch)
        self._arch = arch
        self._on_load = on_load
        self._metadata: Any = None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: one number per target.
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 7

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self._metadata = metadata

        def launch(x: int, y: int, z: int, stream: int, function: object, packed: object, *rest: object) -> None:
            if self.is_recording:
                self.launches.append(Launch(launch, (x, y, z), stream, rest[:3], rest[3:]))

        return launch

    def load(self, name: str, binary: bytes, shared_bytes: int) -> None:
        self.num_loaded += 1
        if self._on_load is not None:
            self._on_load(name, binary, shared_bytes, self._metadata)


class _Utils:
    """What Triton asks a driver for when it loads a kernel."""

    def __init__(self, fake: FakeDriver, arch: int) -> None:
        self._fake = fake
        self._arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT_BYTES[self._arch], "multiprocessor_count": 132}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self._fake.load(name, binary, shared)
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""


@contextmanager
def standing_in(fake: _Fake) -> Iterator[_Fake]:
    """Within it, launches go to ``fake``; tensors may be meta tensors. Not under the interpreter."""
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
    driver.set_active(fake)
    try:
        yield fake
    finally:
        driver._active = None  # noqa: SLF001 - reset_active() asks for a real driver
