"""Baton's own kernels for NVIDIA GPUs, one operation per file: plain functions on tensors. `reference` is the truth."""
