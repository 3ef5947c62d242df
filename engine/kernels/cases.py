"""Random inputs for kernels and their expected results, shared by the tests under the interpreter and on a GPU.

Memory that a kernel must not read holds NaN. Expected results are plain torch in float64 on the device of the inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest error as a share of the largest expected magnitude, by the dtype of inputs and results.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; infinity if ``found`` is not finite."""
    if found.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(found).all()):
        return math.inf
    largest = float(expected.abs().max())
    error = float((found.double() - expected.double()).abs().max())
    return error / largest if largest else error


def generator_on(device: str, seed: int) -> torch.Generator | None:
    """None on the meta device, where no numbers are drawn and kernels are compiled without being run."""
    return None if device == "meta" else torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of an attention layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def scale_log2(self) -> float:
        return math.log2(math.e) / math.sqrt(self.head_dim)


class PagedSequences:
    """Keys and values of sequences of given lengths, in scattered blocks; every other position holds NaN."""

    def __init__(
        self, shape: Shape, lengths: list[int], block_tokens: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> None:
        generator = generator_on(device, seed)
        self.shape, self.lengths = shape, lengths
        counts = [-(-n // block_tokens) for n in lengths]
        free = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
        geometry = (len(free), shape.kv_heads, 2, block_tokens, shape.head_dim)
        self.cache = torch.full(geometry, math.nan, dtype=dtype, device=device)
        width = max(1, *counts) + 1
        # Ids behind a sequence's last block are far out of range: following one is a fault on a GPU.
        table = torch.full((len(lengths), width), 1 << 28, dtype=torch.int32)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            ids = [free.pop() for _ in range(count)]
            table[i, :count] = torch.tensor(ids, dtype=torch.int32)
            both = torch.randn(
                2, length, shape.kv_heads, shape.head_dim, generator=generator, device=device, dtype=torch.float32
            ).to(dtype)
            self.keys.append(both[0])
            self.values.append(both[1])
            for j, block in enumerate(ids):
                part = both[:, j * block_tokens : (j + 1) * block_tokens]
                self.cache[block, :, :, : part.shape[1]] = part.permute(2, 0, 1, 3)
        self.tables = table.to(device)

    def query(self, rows: int, seed: int = 1) -> Tensor:
        generator = generator_on(self.cache.device.type, seed)
        size = (rows, self.shape.heads, self.shape.head_dim)
        wide = torch.randn(size, generator=generator, device=self.cache.device, dtype=torch.float32)
        return (wide * 1.5).to(self.cache.dtype)

    def expected(self, query: Tensor, sequence: int, start: int, window: int | None) -> Tensor:
        """Results of ``query`` [tokens, heads, head_dim] at positions from ``start``; float64."""
        key, value = self.keys[sequence].double(), self.values[sequence].double()
        tokens = len(query)
        end = start + tokens
        grouped = query.double().view(tokens, self.shape.kv_heads, -1, self.shape.head_dim)
        scores = torch.einsum("thgd,nhd->hgtn", grouped, key[:end]) / math.sqrt(self.shape.head_dim)
        position = torch.arange(start, end, device=query.device)[:, None]
        column = torch.arange(end, device=query.device)
        hidden = column > position
        if window is not None:
            hidden |= column <= position - window
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("hgtn,nhd->thgd", weights, value[:end]).reshape(tokens, -1, self.shape.head_dim)
