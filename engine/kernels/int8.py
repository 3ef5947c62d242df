"""Weights as 8-bit integers: symmetric, a scale for every output and group of inputs. One formula for all kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Inputs that share a scale, in the weights and in the activations.
GROUP = 128
# Part of the kernels' names: weights of 8 bits, activations of 8 bits, inputs of a group.
MODE = f"w8a8g{GROUP}"
LARGEST = 127
# Far below what matters; its inverse is finite.
SMALLEST_SCALE = 2.0**-100


class Int8(NamedTuple):
    """scale * level; rows are filled up to whole groups with zeros. What is not finite makes its scale NaN."""

    levels: Tensor  # [rows, groups, GROUP] int8
    scales: Tensor  # [rows, groups] float32


def quantized(weight: Tensor) -> Int8:
    """weight [out, in] of any float dtype, to the nearest level."""
    grouped, scales = _groups(weight)
    return _rounded(grouped, grouped / scales[:, :, None], scales)


def quantized_rows(x: Tensor) -> Int8:
    """Activations [rows, in]: as weights, with one division for a group."""
    grouped, scales = _groups(x)
    return _rounded(grouped, grouped * (1 / scales)[:, :, None], scales)


def _groups(x: Tensor) -> tuple[Tensor, Tensor]:
    grouped = functional.pad(x.float(), (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    return grouped, (grouped.abs().amax(-1) / LARGEST).clamp_min(SMALLEST_SCALE)


def _rounded(grouped: Tensor, levels: Tensor, scales: Tensor) -> Int8:
    return Int8(levels.round().nan_to_num(0.0).to(torch.int8), scales + (grouped * 0).sum(-1))
