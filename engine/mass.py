"""The probability of a token as an integer: sums have the same bits in any order, on any machine.

A mass is 2^y in units of 2^-bits, rounded to nearest; y <= 0 is a logit's distance to the best one in bits. The
polynomial is evaluated with single IEEE operations, none fused, in the dtype of y, so every processor that follows IEEE
754 gets the same number. Kernels do the same steps (engine/kernels/triton/sampling.py).
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Float = TypeVar("_Float", np.float32, np.float64)

LOG2E = math.log2(math.e)
# 2^f = exp(f ln 2), |f| <= 1/2, by Taylor's series: to 5e-9 where tokens are drawn, in float32, to 7e-12 where
# probabilities are reported, in float64.
DRAWN_TERMS = 8
REPORTED_TERMS = 10
COEFFICIENTS = tuple(math.log(2) ** k / math.factorial(k) for k in range(REPORTED_TERMS))
# A token that is 2^37 times less likely than the best one is never drawn. Masses of 2^25 tokens fit into int64.
DRAWN_BITS = 36
REPORTED_BITS = 44
# What is further from the best has no mass in either unit.
LEAST_EXPONENT = -64.0
# Values at a time: all that is made of them stays in the cache.
_BLOCK = 16384


def drawn_masses(values: NDArray[np.float32], best: np.float32, scale: np.float32) -> NDArray[np.int64]:
    """Of ``values`` [n], none of them above ``best``, at ``scale`` = log2(e) / temperature."""
    out = np.empty(len(values), dtype=np.int64)
    with np.errstate(over="ignore"):
        for at in range(0, len(values), _BLOCK):
            y = values[at : at + _BLOCK] - best
            y *= scale
            out[at : at + _BLOCK] = _units(y, DRAWN_TERMS, DRAWN_BITS)
    return out


def reported_mass(values: NDArray[np.float32], best: np.float32) -> int:
    """Of all ``values`` [n] together, none of them above ``best``, at temperature 1, in units of 2^-REPORTED_BITS."""
    total = 0
    for at in range(0, len(values), _BLOCK):
        y = values[at : at + _BLOCK].astype(np.float64)
        y -= np.float64(best)
        y *= LOG2E
        total += int(_units(y, REPORTED_TERMS, REPORTED_BITS).sum())
    return total


def quantile(number: float, total: int) -> int:
    """The place in [0, total) of a random ``number`` in [0, 1)."""
    return min(int(number * float(total)), total - 1)


def share(part: float, total: int) -> int:
    """The least mass in [1, total] that counts as ``part``, in (0, 1], of it."""
    return max(1, min(math.ceil(part * float(total)), total))


def _units(y: NDArray[_Float], num_terms: int, bits: int) -> NDArray[np.int64]:
    """2^y in units of 2^-bits; y [n] is overwritten."""
    kind = y.dtype.type
    np.maximum(y, kind(LEAST_EXPONENT), out=y)
    whole = np.floor(y + kind(0.5))
    y -= whole
    out = y * kind(COEFFICIENTS[num_terms - 1])
    for coefficient in COEFFICIENTS[num_terms - 2 : 0 : -1]:
        out += kind(coefficient)
        out *= y
    out += kind(COEFFICIENTS[0])
    out *= _power_of_two(whole, bits)
    out += kind(0.5)
    return out.astype(np.int64)


def _power_of_two(whole: NDArray[_Float], bits: int) -> NDArray[_Float]:
    """2^(whole + bits) by its exponent's bits."""
    if whole.dtype == np.float32:
        narrow = whole.astype(np.int32)
        narrow += np.int32(127 + bits)
        narrow <<= np.int32(23)
        return narrow.view(whole.dtype)
    wide = whole.astype(np.int64)
    wide += np.int64(1023 + bits)
    wide <<= np.int64(52)
    return wide.view(whole.dtype)
