"""A sampler of a device that there is not: its memory, and the best token of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.interface import REPORT_WORDS, Draws, SlotTables


class BestSampler:
    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self.tables = SlotTables.zeros(max_rows, vocab_size, torch.device("cpu"))
        self.masks = torch.zeros(max_rows, -(-vocab_size // 32), dtype=torch.int32)
        self.report = torch.zeros(max_rows, REPORT_WORDS, dtype=torch.int64)

    def draw(self, logits: Tensor, draws: Draws, drawn: Tensor) -> None:
        drawn[: len(logits)] = logits.argmax(-1)

    def score(self, logits: Tensor, token_ids: Tensor, num_top: Tensor) -> Tensor:
        raise NotImplementedError
