"""These tests run in a process of their own, on a GPU or under Triton's interpreter: see test_triton.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.kernel_device import DEVICE, IS_INTERPRETED

# Whole models say themselves where their tensors lie.
_WHOLE = ("test_model", "test_runner", "test_shared_runner", "test_tune", "test_warm_up")

if not IS_INTERPRETED and DEVICE.type == "cpu":
    collect_ignore_glob = ["test_*.py"]
else:
    # What a kernel allocates and does not write is NaN, so reading it shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    if Path(str(request.node.path)).stem in _WHOLE:
        yield
        return
    with DEVICE:
        yield
