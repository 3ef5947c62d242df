"""Copies host tensors to a computing device and back through pinned memory, so that neither side waits."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The host's ``tensor`` on ``device``, there before what this thread queues next."""
    # Torch keeps pinned memory from reuse until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` on the host; of a device it is there once an event recorded after this call has come."""
    is_pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned).copy_(tensor, non_blocking=True)


def new_event(device: torch.device) -> torch.cuda.Event | None:
    """Not recorded yet, which counts as come; None where nothing runs beside the host."""
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
