"""What ``--kernels auto`` takes, on machines that are made up."""

from __future__ import annotations

import pytest

from baton.errors import BadConfig
from cli import machine
from engine.kernels import Accelerator, choose, probe, select_kernels
from engine.kernels.cpu import CpuKernels

HOPPER = Accelerator("NVIDIA H200", (9, 0))
OTHERS = {
    "torch sees no GPU": Accelerator(),
    "is no NVIDIA GPU": Accelerator("AMD Instinct MI300X", (9, 4), is_nvidia=False),
    "is sm_75, the kernels need sm_80": Accelerator("NVIDIA T4", (7, 5)),
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
    assert isinstance(select_kernels("auto", look=lambda: has), CpuKernels)


def test_auto_is_the_choice_and_a_name_is_not_looked_into() -> None:
    with pytest.raises(BadConfig, match="kernels triton need an NVIDIA GPU"):
        select_kernels("auto", look=lambda: HOPPER)
    assert isinstance(select_kernels("cpu", look=lambda: HOPPER), CpuKernels)


def test_the_machine_at_hand_is_looked_at() -> None:
    assert choose(probe()).kernels == "cpu", "tests hide GPUs"
