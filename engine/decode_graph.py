"""A whole decode step recorded once and replayed: inputs are device tensors of a fixed number of rows.

Owns the tensors of one bucket of batch sizes. Without a GPU it runs the same step without recording it. Knows no
scheduler: who is in which row is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.triton.kernels import DeviceDecode, TritonKernels
from engine.kv_cache import KvCache
from engine.model import Model


class DecodeRow(NamedTuple):
    """One sequence that decodes: its newest token, which lies at ``position`` and whose keys are not yet written."""

    token_id: int
    position: int
    num_prompt_tokens: int
    block_ids: Sequence[int]


class DecodeGraph:
    """``num_rows`` and ``max_length`` bound what a step may hold; shorter ones leave rows of padding."""

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        config: ModelConfig,
        kernels: TritonKernels,
        *,
        num_rows: int,
        max_length: int,
    ) -> None:
        device = kernels.device
        self._model = model
        self._cache = cache
        self._block_tokens = cache.layout.block_tokens
        # One pinned staging tensor per input would cost a copy each; all integers travel in one.
        width = cache.layout.blocks_for(max_length)
        self._host = torch.zeros(num_rows, 3 + width, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._inputs = torch.zeros(num_rows, 3 + width, dtype=torch.int64, device=device)
        self._host_turns = torch.zeros(2, num_rows, config.head_dim // 2, pin_memory=device.type == "cuda")
        self._turns = torch.zeros(2, num_rows, config.head_dim // 2, device=device)
        self._lengths = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._tables = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
        self._attention = DeviceDecode(config, cache.layout, self._tables, self._lengths, max_length, kernels.tuning)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0, device=device)
        if device.type == "cuda":
            self._record()

    def step(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Logits [rows, vocabulary] on the device, valid until the next step."""
        self._fill(rows)
        self._inputs.copy_(self._host, non_blocking=True)
        self._turns.copy_(self._host_turns, non_blocking=True)
        return self.replay()[: len(rows)]

    def replay(self) -> Tensor:
        """The step again, on the inputs as they are: what a measurement times. Logits of all rows."""
        if self._graph is None:
            self._logits = self._compute()
        else:
            self._graph.replay()
        return self._logits

    def _fill(self, rows: Sequence[DecodeRow]) -> None:
        assert 0 < len(rows) <= len(self._host), "a step fits its bucket"
        # Columns: token, slot (negative: padding), length (0: padding), block ids.
        self._host.zero_()
        self._host[:, 1] = -1
        for i, row in enumerate(rows):
            block, offset = divmod(row.position, self._block_tokens)
            self._host[i, 0] = row.token_id
            self._host[i, 1] = row.block_ids[block] * self._block_tokens + offset
            self._host[i, 2] = row.position + 1
            self._host[i, 3 : 3 + len(row.block_ids)] = torch.tensor(row.block_ids)
        positions = torch.tensor([row.position for row in rows])
        prompts = torch.tensor([row.num_prompt_tokens for row in rows])
        for i, part in enumerate(self._model.rope_rows(positions, prompts)):
            self._host_turns[i, : len(rows)] = part

    def _compute(self) -> Tensor:
        self._lengths.copy_(self._inputs[:, 2])
        self._tables.copy_(self._inputs[:, 3:])
        return self._model.decode(
            self._inputs[:, 0], self._turns[0], self._turns[1], self._inputs[:, 1].contiguous(), self._attention,
            self._cache,
        )  # fmt: skip

    def _record(self) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles what is not compiled yet: nothing may be while recording.
            for _ in range(2):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._compute()
