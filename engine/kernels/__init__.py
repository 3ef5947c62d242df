"""Selects a set of kernels: the model's operations behind one interface. `reference` is the one that the others are
tested against."""

from __future__ import annotations

import logging
from typing import NamedTuple

from baton.errors import BadConfig
from engine.devices import Accelerator, Devices, TorchDevices, gpu_index
from engine.kernels.interface import Kernels

# Older GPUs have no bfloat16 in their tensor cores and no asynchronous copies.
_MIN_CAPABILITY = (8, 0)


class Choice(NamedTuple):
    kernels: str
    why: str


def choose(has: Accelerator) -> Choice:
    """The kernels that ``auto`` selects."""
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


def select_kernels(
    name: str,
    *,
    is_batch_invariant: bool = True,
    quantization: str = "none",
    device: str = "auto",
    devices: Devices | None = None,
) -> Kernels:
    """Kernels by name on a device by name (``auto``, ``cpu``, ``cuda`` or ``cuda:N``). ``auto`` kernels are triton if
    there is a supported GPU, else cpu.

    ``is_batch_invariant`` False allows kernels whose bits depend on the batch; only triton has any. Raises BadConfig.
    """
    devices = devices or TorchDevices()
    # Torch's default is its first GPU.
    index = gpu_index(device, devices)
    if name == "auto":
        name, why = ("cpu", "device is cpu") if device == "cpu" else choose(devices.look(index or 0))
        if index is not None and name != "triton":
            raise BadConfig(
                f"device is {device}, which kernels auto do not use: {why}; expected another GPU, or device cpu",
                param="device",
            )
        logging.getLogger(__name__).info("kernels auto: %s (%s)", name, why)
    # Imported only when selected: a GPU worker does not need the CPU compiler.
    if name == "triton":
        if quantization != "none":
            raise BadConfig(
                f"quantization is {quantization}, which kernels triton do not have, it is not on a GPU yet; expected "
                "none, or kernels cpu",
                param="quantization",
            )
        try:
            from engine.kernels.triton.kernels import TritonKernels
        except ImportError as error:
            raise BadConfig(
                f"kernels triton need the package triton: {error}; install Baton with its extra cuda", param="kernels"
            ) from error

        where = None if device == "cpu" else index or 0
        return TritonKernels.on_this_machine(devices, where, is_batch_invariant=is_batch_invariant)
    if index is not None:
        raise BadConfig(
            f"device is {device}, kernels {name} compute on the processor; expected device cpu", param="device"
        )
    if name == "reference":
        from engine.kernels.reference import ReferenceKernels

        return ReferenceKernels(quantization=quantization)
    if name == "cpu":
        from engine.kernels.cpu import CpuKernels

        return CpuKernels(quantization=quantization)
    raise BadConfig(f"kernels {name!r} are not known; expected auto, cpu, triton or reference", param="kernels")
