"""The model's operations behind one interface; `reference` is the truth, the others are measured against it."""

from __future__ import annotations

from baton.errors import BadConfig
from engine.kernels.interface import Kernels


def select_kernels(name: str, *, is_batch_invariant: bool = True) -> Kernels:
    """Kernels by name; ``auto`` is the fastest set for the device at hand.

    ``is_batch_invariant`` False allows products whose bits depend on the batch; only triton has any.
    """
    # Imported on choice: a GPU worker needs no compiler for CPUs. `auto` takes a GPU once all has run on one.
    if name == "reference":
        from engine.kernels.reference import ReferenceKernels

        return ReferenceKernels()
    if name == "triton":
        try:
            from engine.kernels.triton.kernels import TritonKernels
        except ImportError as error:
            raise BadConfig(f"kernels triton need the package triton: {error}", param="kernels") from error

        return TritonKernels.on_this_machine(is_batch_invariant=is_batch_invariant)
    if name in ("auto", "cpu"):
        from engine.kernels.cpu import CpuKernels

        return CpuKernels()
    raise BadConfig(f"kernels {name!r} are not known; expected auto, cpu, triton or reference", param="kernels")
