"""Kernels for NVIDIA GPUs in Triton, one operation per file: plain functions on tensors, tested against `reference`."""

from __future__ import annotations

import os

# Fused multiply-add is part of the numerics, and its default changes between versions of Triton.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
