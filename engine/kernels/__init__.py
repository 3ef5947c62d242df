"""The model's operations behind one interface; `reference` is the truth, the others are measured against it."""

from __future__ import annotations

from baton.errors import BadConfig
from engine.kernels.interface import Kernels


def select_kernels(name: str) -> Kernels:
    """Kernels by name; ``auto`` is the fastest set for the device at hand."""
    # Imported on choice: a GPU worker needs no compiler for CPUs.
    if name == "reference":
        from engine.kernels.reference import ReferenceKernels

        return ReferenceKernels()
    if name in ("auto", "cpu"):
        from engine.kernels.cpu import CpuKernels

        return CpuKernels()
    raise BadConfig(f"kernels {name!r} are not known; expected auto, cpu or reference", param="kernels")
