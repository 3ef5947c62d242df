"""What kernels on a device have to know to draw a sequence's next token as engine.sampler would."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from engine.kernels.interface import Draws
from engine.step import Piece

_GREEDY = (0.0, 0, 1.0, 0.0, 0, 0)
_MAX_TOP_K = 2**31 - 1


def draws_of(pieces: Seq[Piece]) -> Draws:
    """On the host, a row per piece; where the sampler has to change or report logits, the row is greedy."""
    rows = [_row(p) if p.is_plain and not p.sequence.spec.sampling.is_greedy else _GREEDY for p in pieces]
    temperature, top_k, top_p, min_p, seed, position = zip(*rows, strict=True) if rows else ((),) * 6
    return Draws(
        temperature=_column(temperature, np.float64),
        top_k=_column(top_k, np.int32),
        top_p=_column(top_p, np.float64),
        min_p=_column(min_p, np.float64),
        seed=_column(seed, np.uint64),
        position=_column(position, np.int64),
    )


def _row(piece: Piece) -> tuple[float, int, float, float, int, int]:
    params = piece.sequence.spec.sampling
    top_k = min(params.top_k, _MAX_TOP_K)
    return params.temperature, top_k, params.top_p, params.min_p, params.seed or 0, piece.end


def _column(values: Iterable[float], dtype: type[np.generic]) -> Tensor:
    column = np.array(tuple(values), dtype=dtype)
    return torch.from_numpy(column.view(np.int64) if dtype is np.uint64 else column)
