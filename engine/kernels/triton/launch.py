"""Launches with little work on the host: what stays the same between launches of a binary is looked up.

`JITFunction.run` binds arguments by name, reads settings and writes the options as text at every launch. Here a binary
is found by the device, what Triton specializes for in each argument (asked of Triton's own function), constexprs and
options. The first launch of each combination is Triton's, which compiles; later ones call what Triton loaded. Settings
of Triton are as they were at the first launch. Where Triton's inside is not as expected every launch is Triton's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from engine.kernels.triton.language import INTERPRET

_log = logging.getLogger(__name__)

# (argument, is constant, is specialized, is specialized by alignment) -> what a binary depends on of it.
Specialize = Callable[[object, bool, bool, bool], object]
# For a device; None: Triton's inside is unknown.
LookInside = Callable[[int], Specialize | None]


def kernel(function: Any = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """As ``triton.jit``, for kernels that are launched; constexprs are their last parameters and given by name."""
    if function is None:
        return functools.partial(kernel, do_not_specialize=do_not_specialize)
    jitted = triton.jit(function, do_not_specialize=list(do_not_specialize))
    return jitted if INTERPRET else Kernel(jitted)


class _Bound(NamedTuple):
    """A binary on its device, and what is the same in every launch of it."""

    run: Callable[..., None]
    function: object
    metadata: object
    constants: tuple[object, ...]
    # Unloads the binary when it is collected.
    compiled: object


class Kernel:
    """``kernel[grid](*arguments, **constants)``, as Triton's."""

    def __init__(self, function: JITFunction, look_inside: LookInside | None = None) -> None:
        arguments = [param for param in function.params if not param.is_constexpr]
        self._names = [param.name for param in function.params[len(arguments) :]]
        assert all(param.is_constexpr for param in function.params[len(arguments) :]), "constexprs come last"
        assert not any(param.annotation for param in arguments), "an annotation changes what is specialized"
        self._function = function
        self._is_specialized = [not param.do_not_specialize for param in arguments]
        self._look_inside = look_inside or _look_inside_once
        self._bound: dict[tuple[object, ...], _Bound] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        active, hooks = driver.active, knobs.runtime
        device = active.get_current_device()
        specialize = self._look_inside(device)
        # A profiler is told by Triton.
        if specialize is None or _calls(hooks.launch_enter_hook) or _calls(hooks.launch_exit_hook):
            self._function[grid](*arguments, **constants)
            return
        looked_at = map(specialize, arguments, repeat(False), self._is_specialized, repeat(True))
        key = (device, *looked_at, *constants, *constants.values())
        bound = self._bound.get(key)
        if bound is None:
            self._bind(key, grid, arguments, constants)
            return
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        bound.run(x, y, z, stream, bound.function, bound.metadata, None, None, None, *arguments, *bound.constants)

    def _bind(
        self,
        key: tuple[object, ...],
        grid: tuple[int, ...],
        arguments: tuple[object, ...],
        constants: dict[str, object],
    ) -> None:
        """Launch it Triton's way, and keep what it launched."""
        assert len(arguments) == len(self._is_specialized), "constexprs are given by name, all else by place"
        compiled = self._function[grid](*arguments, **constants)
        # None: a hook of Triton's compiles it elsewhere.
        if compiled is not None:
            values = tuple(constants[name] for name in self._names)
            self._bound[key] = _Bound(
                compiled.run, compiled.function, compiled.packed_metadata, values, compiled
            )  # fmt: skip


def _calls(hook: object) -> object:
    return getattr(hook, "calls", hook)


@triton.jit(do_not_specialize=["n_free"])
def _probe_kernel(p, n, n_free, C: tl.constexpr):
    pass


@functools.cache
def _look_inside_once(device: int) -> Specialize | None:
    return look_inside(device, _probe_kernel)


def look_inside(device: int, probe: JITFunction) -> Specialize | None:
    """What Triton specializes for on this device, if it specializes and launches as is expected here, which ``probe``
    (p, n, n_free not specialized, constexpr C) shows; else None, with a warning."""
    try:
        from triton._C.libtriton import native_specialize_impl

        caches = probe.device_caches[device]
        specialize = functools.partial(native_specialize_impl, caches[3])
        stand_in = _StandIn()
        probe.device_caches[device] = (_Holding(stand_in), *caches[1:])
        for value in (1, 5, 16, 1 << 40, 0.5, None):
            _, looked_at, _ = caches[4](None, value, value, C=7)
            found = [specialize(None, False, True, True), *(specialize(value, False, is_on, True) for is_on in (1, 0))]
            _check(f"{value} is specialized as", list(looked_at[:3]), found)
        _check("a launch gives", probe[(3, 2)](None, 5, 16, C=7), stand_in)
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        start = (3, 2, 1, driver.active.get_current_stream(device), stand_in.function, stand_in.packed_metadata)
        expected = (*start, stand_in, *hooks, None, 5, 16, 7)
        _check("a binary is launched with", stand_in.told, expected)
    except Exception as error:
        _log.warning(
            "Triton %s launches kernels in another way than is known here (%s: %s): every launch is Triton's own, "
            "which takes the host longer",
            triton.__version__, type(error).__name__, error,
        )  # fmt: skip
        return None
    finally:
        probe.device_caches.pop(device, None)
    return specialize


def _check(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise RuntimeError(f"{what} {found}, expected {expected}")


class _StandIn:
    """A binary that keeps what it was launched with."""

    function, packed_metadata = object(), object()

    def __init__(self) -> None:
        self.told: tuple[object, ...] = ()

    def launch_metadata(self, *_: object) -> _StandIn:
        return self

    def run(self, *arguments: object) -> None:
        self.told = arguments


class _Holding(dict[object, object]):
    """A cache of binaries that has one for everything."""

    def __init__(self, binary: object) -> None:
        super().__init__()
        self._binary = binary

    def get(self, key: object, default: object = None) -> object:
        return self._binary
