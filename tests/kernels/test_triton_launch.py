"""A launch by `Kernel` is the launch that Triton would make: the same binary, the same arguments, less work."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no binaries", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton is only for Linux")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from engine.kernels.triton.fake_driver import FakeDriver, standing_in  # noqa: E402
from engine.kernels.triton.launch import Kernel, look_inside  # noqa: E402


@triton.jit(do_not_specialize=["n_free"])
def small(p_to, p_maybe, n, n_free, scale, C: tl.constexpr, HAS_MAYBE: tl.constexpr):  # noqa: N803
    value = n + n_free + C
    if HAS_MAYBE:
        value += tl.load(p_maybe).to(tl.int64)
    tl.store(p_to + tl.program_id(0), value * scale)


@triton.jit(do_not_specialize=["n_free"])
def probe(p, n, n_free, C: tl.constexpr):  # noqa: N803
    pass


@pytest.fixture(scope="module")
def driver() -> Iterator[FakeDriver]:
    """One for all: what Triton compiled tells the driver that loaded it of its launches."""
    with standing_in(FakeDriver(90)) as fake:
        yield fake


@pytest.fixture
def fake(driver: FakeDriver) -> FakeDriver:
    driver.launches.clear()
    return driver


def meta(dtype: torch.dtype, offset: int) -> torch.Tensor:
    """Its address is ``offset`` elements."""
    return torch.empty(64, dtype=dtype, device="meta")[offset:]


def is_quick(fake: FakeDriver, index: int = -1) -> bool:
    """Triton's own launch names its hooks."""
    return all(hook is None for hook in fake.launches[index].hooks)


# Ones, multiples of 16 and others, of 32 and of 64 bits.
_INTEGERS = st.sampled_from([1, 0, 16, -16, 2**31 - 16, 3, -1, 2**31 - 1, 2**31, 2**40, 2**31 + 1, -(2**31) - 1])
_ADDRESSES = st.tuples(st.sampled_from([torch.float16, torch.float32]), st.sampled_from([0, 1, 4, 8]))


@pytest.mark.timeout(300)
def test_the_binary_is_tritons_choice(fake: FakeDriver) -> None:
    ours = Kernel(small)

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        to=_ADDRESSES, maybe=st.none() | st.just((torch.float16, 1)), n=_INTEGERS, n_free=_INTEGERS,
        scale=st.just(0.5), constant=st.sampled_from([1, 16]), num_warps=st.just(1),
        grid=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    )  # fmt: skip
    def check(
        to: Any, maybe: Any, n: int, n_free: int, scale: float, constant: int, num_warps: int, grid: tuple[int, ...]
    ) -> None:
        arguments = meta(*to), None if maybe is None else meta(*maybe), n, n_free, scale
        constants: dict[str, Any] = {"C": constant, "HAS_MAYBE": maybe is not None, "num_warps": num_warps}
        fake.launches.clear()
        for launch in (ours, ours, small):
            launch[grid](*arguments, **constants)
        first, second, own = fake.launches
        assert first.binary is second.binary is own.binary
        assert is_quick(fake, 1)
        assert not is_quick(fake, 2)
        for launched in (first, second):
            assert launched[1:3] == own[1:3] == ((*grid, 1, 1)[:3], 7)
            assert all(x is y or x == y for x, y in zip(launched.arguments, own.arguments, strict=True))

    check()


def test_a_changed_alignment_takes_another_binary(fake: FakeDriver) -> None:
    """Each was launched before, so that a wrong one could be found."""
    ours, kinds = Kernel(small), [(0, 16), (1, 16), (0, 17), (1, 17), (0, 1), (0, 2**31)]
    for _ in range(2):
        fake.launches.clear()
        for offset, n in kinds:
            ours[1,](meta(torch.float32, offset), None, n, 3, 0.5, C=5, HAS_MAYBE=False, num_warps=1)
    assert all(is_quick(fake, i) for i in range(len(kinds)))
    assert len({id(launched.binary) for launched in fake.launches}) == len(kinds)


def test_a_profiler_is_told_of_every_launch(fake: FakeDriver) -> None:
    ours = Kernel(small)

    def launch() -> None:
        ours[1,](meta(torch.float32, 0), None, 2, 3, 0.5, C=5, HAS_MAYBE=False, num_warps=1)

    def told(metadata: object) -> None:
        raise AssertionError("the fake driver calls no hooks")

    launch()
    knobs.runtime.launch_enter_hook.add(told)
    try:
        launch()
        assert not is_quick(fake)
    finally:
        knobs.runtime.launch_enter_hook.remove(told)
    launch()
    assert is_quick(fake)


class OtherLaunch(JITFunction):  # type: ignore[misc]
    """Of a Triton that gives binaries their arguments in another way."""

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = self.device_caches[90][0].get("any")
        binary.run(*grid, 1, 7, binary.function, *args)
        return binary


class OtherBinder(JITFunction):  # type: ignore[misc]
    """Of a Triton that keeps other things for a device."""

    def create_binder(self) -> Any:
        return ({},)


class OtherRules(JITFunction):  # type: ignore[misc]
    """Of a Triton that specializes for more than alignment."""

    def create_binder(self) -> Any:
        *kept, binder = super().create_binder()

        def other(*args: Any, **kwargs: Any) -> Any:
            params, specialization, options = binder(*args, **kwargs)
            return params, [(*found, "more") for found in specialization], options

        return (*kept, other)


@pytest.mark.parametrize("kind", [OtherLaunch, OtherBinder, OtherRules])
def test_where_tritons_inside_is_unknown_launches_are_its_own(
    kind: type[JITFunction], fake: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    other = kind(probe.fn, do_not_specialize=["n_free"])
    with caplog.at_level(logging.WARNING):
        assert look_inside(90, other) is None
    (record,) = caplog.records
    assert "every launch is Triton's own" in record.getMessage()
    assert look_inside(90, probe) is not None
    ours = Kernel(small, look_inside=lambda _: None)
    for _ in range(2):
        ours[1,](meta(torch.float32, 0), None, 2, 3, 0.5, C=5, HAS_MAYBE=False, num_warps=1)
        assert not is_quick(fake)


def test_constants_come_last_and_by_name(fake: FakeDriver) -> None:
    with pytest.raises(AssertionError, match="by name"):
        Kernel(small)[1,](meta(torch.float32, 0), None, 2, 3, 0.5, 5, HAS_MAYBE=False)
