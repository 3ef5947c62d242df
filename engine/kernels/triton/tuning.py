"""Which tile each kernel uses on which GPU: data, looked up at run time. Nothing is measured while serving."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """``split_tokens`` is part of the numerics: changing it changes bits, so it is one value per GPU, not per shape."""

    split_tokens: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """``num_programs`` 0: one program per tile, which the hardware hands out; otherwise programs that loop."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_programs: int = 0
