"""Baton's own kernels for NVIDIA GPUs, one operation per file: plain functions on tensors. `reference` is the truth."""

from __future__ import annotations

import os

# Fused multiply-add is part of the numerics; its default changes between versions of Triton.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
