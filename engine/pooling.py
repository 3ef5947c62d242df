"""Makes the embedding of a prompt: the mean of the model's last hidden states, or the last of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from baton.errors import BadLogits

if TYPE_CHECKING:
    # A scheduler without a model needs no NumPy.
    import numpy as np
    from numpy.typing import NDArray


class Pool:
    """Adds up rows by rising position, in float64: the same bits however the prompt is cut."""

    __slots__ = ("_num_rows", "_total")

    def __init__(self) -> None:
        self._total: NDArray[np.float64] | None = None
        self._num_rows = 0

    def add(self, rows: NDArray[np.float32]) -> None:
        """[positions, features], those that follow."""
        for row in rows:
            self._total = row.astype("float64") if self._total is None else self._total + row
        self._num_rows += len(rows)

    def values(self) -> bytes:
        """The mean, float32 in little-endian order. Raises BadLogits."""
        assert self._total is not None, "rows were added"
        mean = (self._total / self._num_rows).astype("<f4")
        if not bool((abs(mean) < math.inf).all()):
            raise BadLogits("the prompt's embedding holds NaN or infinity, expected finite numbers: check the weights")
        return mean.tobytes()
