"""What ``--kernels auto`` takes on which device, on machines that are made up."""

from __future__ import annotations

import pytest
import torch

from baton.errors import BadConfig
from cli import machine
from engine.devices import Accelerator, TorchDevices
from engine.fake_devices import FakeDevices
from engine.kernels import choose, select_kernels
from engine.kernels.cpu import CpuKernels
from engine.kernels.triton.kernels import TritonKernels

HOPPER = Accelerator("NVIDIA H200", (9, 0), num_multiprocessors=132)
OLD = Accelerator("NVIDIA T4", (7, 5))
OTHERS = {
    "torch sees no GPU": Accelerator(),
    "is no NVIDIA GPU": Accelerator("AMD Instinct MI300X", (9, 4), is_nvidia=False),
    "is sm_75, the kernels need sm_80": OLD,
    "Triton is not installed": Accelerator("NVIDIA A100", (8, 0), has_triton=False),
}


@pytest.mark.parametrize("has", [HOPPER, Accelerator("NVIDIA A100", (8, 0)), Accelerator("NVIDIA B200", (10, 0))])
def test_a_gpu_that_can_gets_the_kernels_for_gpus(has: Accelerator) -> None:
    assert choose(has) == ("triton", f"{has.gpu}, sm_{has.capability[0]}{has.capability[1]}")
    found = machine.auto_kernels(has)
    assert (found.is_ok, found.advice) == (True, "")
    assert found.found.startswith("triton: NVIDIA")


@pytest.mark.parametrize("why", OTHERS)
def test_everything_else_gets_the_processor_and_hears_why(why: str) -> None:
    has = OTHERS[why]
    kernels, reason = choose(has)
    assert kernels == "cpu"
    assert why in reason
    found = machine.auto_kernels(has)
    assert why in found.found
    # Something to act on where there is a GPU that stands idle.
    assert (found.is_ok is True) == (not found.advice) == (has.gpu is None)
    devices = FakeDevices([has] if has.gpu else [])
    assert isinstance(select_kernels("auto", devices=devices), CpuKernels)
    if has.gpu is not None:
        # Asked for by name it is not passed over in silence.
        with pytest.raises(BadConfig, match=f"device is cuda:0, which kernels auto do not use: .*{why}"):
            select_kernels("auto", device="cuda:0", devices=devices)


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_kernels_are_on_the_device_that_was_named(name: str, device: str, index: int) -> None:
    kernels = select_kernels(name, device=device, devices=FakeDevices([HOPPER, HOPPER]))
    assert isinstance(kernels, TritonKernels)
    assert kernels.device == torch.device("cuda", index)


def test_a_device_that_is_not_there_is_refused_with_those_that_are() -> None:
    devices = FakeDevices([HOPPER, OLD])
    with pytest.raises(BadConfig, match=r"device is cuda:2, but torch sees 2 GPUs \(0: NVIDIA H200; 1: NVIDIA T4\)"):
        select_kernels("auto", device="cuda:2", devices=devices)
    with pytest.raises(BadConfig, match=r"device is cuda:0, but torch sees no GPUs \(.*CUDA_VISIBLE_DEVICES"):
        select_kernels("triton", device="cuda:0", devices=FakeDevices())


def test_a_device_that_the_kernels_do_not_compute_on_is_refused() -> None:
    devices = FakeDevices([HOPPER])
    for name in ("cpu", "reference"):
        assert select_kernels(name, devices=devices).device == torch.device("cpu")
        with pytest.raises(BadConfig, match=f"device is cuda:0, kernels {name} compute on the processor"):
            select_kernels(name, device="cuda:0", devices=devices)
    assert isinstance(select_kernels("auto", device="cpu", devices=devices), CpuKernels)
    with pytest.raises(BadConfig, match="kernels triton need an NVIDIA GPU, and device is cpu"):
        select_kernels("triton", device="cpu", devices=devices)
    with pytest.raises(BadConfig, match="kernels triton need an NVIDIA GPU, and torch sees no GPUs"):
        select_kernels("triton", devices=FakeDevices())


def test_the_machine_at_hand_is_looked_at() -> None:
    assert choose(TorchDevices().look(0)).kernels == "cpu", "tests hide GPUs"
