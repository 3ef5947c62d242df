"""The int8 format of weights: symmetric, with a scale for every output and group of inputs. All kernels use this
formula."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Number of inputs that share a scale, in weights and activations.
GROUP = 128
# Part of the kernels' names: weights of 8 bits, activations of 8 bits, inputs of a group.
MODE = f"w8a8g{GROUP}"
LARGEST = 127
# The smallest scale: negligible, and its inverse is finite.
SMALLEST_SCALE = 2.0**-100


class Int8(NamedTuple):
    """scale * level; rows are padded with zeros to whole groups. A value that is not finite makes its scale NaN."""

    levels: Tensor  # [rows, groups, GROUP] int8
    scales: Tensor  # [rows, groups] float32


def quantized(weight: Tensor) -> Int8:
    """weight [out, in] of any float dtype, rounded to the nearest level."""
    grouped, scales = _groups(weight)
    return _rounded(grouped, grouped / scales[:, :, None], scales)


def quantized_rows(x: Tensor) -> Int8:
    """Activations [rows, in], quantized as weights, with one division for a group."""
    grouped, scales = _groups(x)
    return _rounded(grouped, grouped * (1 / scales)[:, :, None], scales)


def _groups(x: Tensor) -> tuple[Tensor, Tensor]:
    grouped = functional.pad(x.float(), (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    return grouped, (grouped.abs().amax(-1) / LARGEST).clamp_min(SMALLEST_SCALE)


def _rounded(grouped: Tensor, levels: Tensor, scales: Tensor) -> Int8:
    return Int8(levels.round().nan_to_num(0.0).to(torch.int8), scales + (grouped * 0).sum(-1))
