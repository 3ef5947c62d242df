"""The model's operations behind one interface; `reference` is the truth, the others are measured against it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from baton.errors import BadConfig
from engine.kernels.interface import Kernels

# Older ones have no bfloat16 in their tensor cores and no asynchronous copies.
_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What there is beside the processor. ``gpu``: the one that torch would use, None if there is none."""

    gpu: str | None = None
    capability: tuple[int, int] = (0, 0)
    # Torch calls GPUs of AMD cuda as well.
    is_nvidia: bool = True
    has_triton: bool = True


class Choice(NamedTuple):
    kernels: str
    why: str


def probe() -> Accelerator:
    """Looks, and takes no memory on the GPU."""
    import torch

    has_triton = importlib.util.find_spec("triton") is not None
    if not torch.cuda.is_available():
        return Accelerator(has_triton=has_triton)
    device = torch.cuda.current_device()
    return Accelerator(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        torch.version.cuda is not None,
        has_triton,
    )


def choose(has: Accelerator) -> Choice:
    """What ``auto`` means."""
    if has.gpu is None:
        return Choice("cpu", "torch sees no GPU")
    if not has.is_nvidia:
        return Choice("cpu", f"{has.gpu} is no NVIDIA GPU")
    level = "sm_{}{}".format(*has.capability)
    if has.capability < _MIN_CAPABILITY:
        return Choice("cpu", f"{has.gpu} is {level}, the kernels need sm_80 or newer")
    if not has.has_triton:
        return Choice("cpu", f"{has.gpu} is there, Triton is not installed")
    return Choice("triton", f"{has.gpu}, {level}")


def select_kernels(name: str, *, is_batch_invariant: bool = True, look: Callable[[], Accelerator] = probe) -> Kernels:
    """Kernels by name; ``auto`` is triton where there is a GPU for it, else cpu.

    ``is_batch_invariant`` False allows kernels whose bits depend on the batch; only triton has any.
    """
    if name == "auto":
        name, why = choose(look())
        logging.getLogger(__name__).info("kernels auto: %s (%s)", name, why)
    # Imported on choice: a GPU worker needs no compiler for CPUs.
    if name == "reference":
        from engine.kernels.reference import ReferenceKernels

        return ReferenceKernels()
    if name == "triton":
        try:
            from engine.kernels.triton.kernels import TritonKernels
        except ImportError as error:
            raise BadConfig(
                f"kernels triton need the package triton: {error}; install Baton with its extra cuda", param="kernels"
            ) from error

        return TritonKernels.on_this_machine(is_batch_invariant=is_batch_invariant)
    if name == "cpu":
        from engine.kernels.cpu import CpuKernels

        return CpuKernels()
    raise BadConfig(f"kernels {name!r} are not known; expected auto, cpu, triton or reference", param="kernels")
