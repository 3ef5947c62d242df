"""These tests run in a process of their own, under Triton's interpreter: see tests/kernels/test_triton.py."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    # What a kernel allocates and does not write is NaN, so reading it shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
