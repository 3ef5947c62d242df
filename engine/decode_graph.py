"""Whole decode steps, sampling included, recorded once per bucket of (sequences, length) and replayed.

Owns the memory of their inputs and results. Without a GPU the same steps run without being recorded. The caller assigns
sequences to rows. One step at a time, in the order of one stream.
"""

from __future__ import annotations

import itertools
import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.interface import DRAW_DTYPES, PLAIN_DRAW, DeviceKernels, DeviceSampler, Draws
from engine.kv_cache import KvCache
from engine.model import Model
from engine.model_config import ModelConfig
from engine.staging import new_event

_log = logging.getLogger(__name__)

# Lengths are bucketed in wide steps: of a row that is shorter, programs end before they read anything.
_FIRST_LENGTH = 512
_LENGTH_FACTOR = 4
# Most rows * length of a recorded step, which bounds the partial results of attention; larger steps are long enough
# for the host to keep ahead of the device.
_MAX_ROW_TOKENS = 1 << 22
# What tensors of an allocation of their own are aligned to at least, as kernels are specialized for it.
_ALIGNMENT_BYTES = 16


class DecodeRow(NamedTuple):
    """One sequence that decodes: its newest token, which lies at ``position`` and whose keys are not yet written."""

    # ~i: what row i of the step before drew
    token_id: int
    position: int
    num_prompt_tokens: int
    block_ids: Sequence[int]


class _Inputs(NamedTuple):
    """A step's inputs as views of one buffer, so that they travel in one copy."""

    token_ids: Tensor  # [rows] int64
    slots: Tensor  # [rows] int64; negative: padding
    lengths: Tensor  # [rows] int32; 0: padding
    turns: Tensor  # [2 (cos, sin), rows, head_dim / 2] float32
    tables: Tensor  # [rows, blocks] int32; what is behind a row's length is never read
    draws: Draws

    @classmethod
    def of(cls, flat: Tensor, num_rows: int, num_blocks: int, half_dim: int) -> _Inputs:
        ends = itertools.accumulate(_sizes(num_rows, num_blocks, half_dim), initial=0)
        fields = [
            flat[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for at, (dtype, shape) in zip(ends, _fields(num_rows, num_blocks, half_dim), strict=False)
        ]
        token_ids, slots, lengths, turns, tables, *draws = fields
        return cls(token_ids, slots, lengths, turns, tables, Draws(*draws))


def _fields(num_rows: int, num_blocks: int, half_dim: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """In the order of ``_Inputs``, ``Draws`` last."""
    rows = (num_rows,)
    ours = [(torch.int64, rows), (torch.int64, rows), (torch.int32, rows), (torch.float32, (2, num_rows, half_dim))]
    return [*ours, (torch.int32, (num_rows, num_blocks)), *((dtype, rows) for dtype in DRAW_DTYPES)]


def _sizes(num_rows: int, num_blocks: int, half_dim: int) -> list[int]:
    """Bytes of each field, with what fills it up."""
    sizes = (math.prod(shape) * dtype.itemsize for dtype, shape in _fields(num_rows, num_blocks, half_dim))
    return [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes]


class StepMemory:
    """Where the inputs and results of steps lie: one for all graphs, as one step runs at a time."""

    def __init__(
        self,
        cache: KvCache,
        config: ModelConfig,
        device: torch.device,
        shapes: Sequence[tuple[int, int]],
        drawn: Tensor | None = None,
    ) -> None:
        """``shapes``: (rows, length) of all steps; ``drawn``: where steps of any kind leave their tokens."""
        half, blocks_for = config.head_dim // 2, cache.layout.blocks_for
        num_bytes = max(sum(_sizes(rows, blocks_for(length), half)) for rows, length in shapes)
        num_rows = max(rows for rows, _ in shapes)
        self.host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.logits = torch.empty(num_rows, config.vocab_size, dtype=torch.float32, device=device)
        self.token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device) if drawn is None else drawn
        # What graphs allocate while they run; the largest comes first and the others fit into what it left.
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        # The last copy out of ``host``, which must not be written before it is done.
        self.copied = new_event(device)


class Stepped(NamedTuple):
    """On the device, valid until the next step."""

    logits: Tensor  # [rows, vocabulary] float32
    token_ids: Tensor  # [rows] int64


class DecodeGraph:
    """``num_rows`` and ``max_length`` bound what a step may hold; shorter ones leave rows of padding."""

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        config: ModelConfig,
        kernels: DeviceKernels,
        *,
        num_rows: int,
        max_length: int,
        memory: StepMemory | None = None,
        sampler: DeviceSampler | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler or kernels.sampler(num_rows, config.vocab_size)
        self._memory = memory or StepMemory(cache, config, kernels.device, [(num_rows, max_length)])
        shape = num_rows, cache.layout.blocks_for(max_length), config.head_dim // 2
        self._num_rows = num_rows
        self._num_bytes = sum(_sizes(*shape))
        self._host = _Inputs.of(self._memory.host, *shape)
        self._inputs = _Inputs.of(self._memory.device, *shape)
        self._attention = kernels.device_decode(
            config, cache.layout, self._inputs.tables, self._inputs.lengths, max_length
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        if kernels.device.type == "cuda":
            self._record()

    def step(self, rows: Sequence[DecodeRow], draws: Draws | None = None) -> Stepped:
        """Queue a step; ``draws`` on the host, None is greedy. The host waits for nothing that the device computes."""
        if self._memory.copied is not None:
            self._memory.copied.synchronize()
        self._fill(rows, draws)
        self._send()
        logits, token_ids = self.replay()
        return Stepped(logits[: len(rows)], token_ids[: len(rows)])

    def replay(self) -> Stepped:
        """The step again, on the inputs as they are: what a measurement times. All rows, with padding."""
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        return Stepped(self._memory.logits[: self._num_rows], self._memory.token_ids[: self._num_rows])

    def _fill(self, rows: Sequence[DecodeRow], draws: Draws | None) -> None:
        host, count, block_tokens = self._host, len(rows), self._cache.layout.block_tokens
        assert count <= self._num_rows, "a step fits its bucket"
        host.token_ids[count:] = 0
        host.slots[count:] = -1
        host.lengths[count:] = 0
        for column, nothing in zip(host.draws, PLAIN_DRAW, strict=True):
            column[count if draws else 0 :] = nothing
        if not rows:
            return
        positions = torch.tensor([row.position for row in rows])
        host.token_ids[:count] = torch.tensor([row.token_id for row in rows])
        last_blocks = torch.tensor([row.block_ids[row.position // block_tokens] for row in rows])
        host.slots[:count] = last_blocks * block_tokens + positions % block_tokens
        host.lengths[:count] = positions + 1
        tables = host.tables.numpy()
        for i, row in enumerate(rows):
            num_blocks = row.position // block_tokens + 1
            tables[i, :num_blocks] = row.block_ids[:num_blocks]
        prompts = torch.tensor([row.num_prompt_tokens for row in rows])
        for i, part in enumerate(self._model.rope_rows(positions, prompts)):
            host.turns[i, :count] = part
        if draws is not None:
            for to, values in zip(host.draws, draws, strict=True):
                to[:count] = values

    def _send(self) -> None:
        memory = self._memory
        memory.device[: self._num_bytes].copy_(memory.host[: self._num_bytes], non_blocking=True)
        if memory.copied is not None:
            memory.copied.record()

    def _compute(self) -> None:
        inputs = self._inputs
        logits = self._memory.logits[: self._num_rows]
        cos, sin = inputs.turns
        logits.copy_(
            self._model.decode(
                inputs.token_ids, self._memory.token_ids, cos, sin, inputs.slots, self._attention, self._cache
            ),
        )
        self._sampler.draw(logits, inputs.draws, self._memory.token_ids)

    def _record(self) -> None:
        # Nothing but padding: what runs before the recording writes to no block.
        self._fill([], None)
        self._send()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles what is not compiled yet: nothing may be while recording.
            for _ in range(2):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=self._memory.pool):
            self._compute()


class DecodeGraphs:
    """One graph for every bucket up to ``max_rows`` sequences of up to ``max_length`` tokens, all recorded at once.

    ``most``: only so many, those that take the most memory.
    """

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        config: ModelConfig,
        kernels: DeviceKernels,
        *,
        max_rows: int,
        max_length: int,
        drawn: Tensor,
        sampler: DeviceSampler,
        most: int | None = None,
    ) -> None:
        self._row_buckets = row_buckets(max_rows)
        self._length_buckets = length_buckets(max_length)
        shapes = graph_shapes(max_rows, max_length)[:most]
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        if not shapes:
            return
        memory = StepMemory(cache, config, kernels.device, shapes, drawn)
        for i, (rows, length) in enumerate(shapes):
            if i % len(self._row_buckets) == 0:
                _log.info("decode steps: %d of %d prepared, next %d x %d tokens", i, len(shapes), rows, length)
            self._graphs[rows, length] = DecodeGraph(
                model, cache, config, kernels, num_rows=rows, max_length=length, memory=memory, sampler=sampler
            )
        _log.info("decode steps: all %d prepared, up to %d sequences", len(shapes), max_rows)

    def find(self, num_rows: int, length: int) -> DecodeGraph | None:
        """The smallest that holds ``num_rows`` sequences, the longest with ``length`` tokens; None if there is none."""
        row, column = bisect_left(self._row_buckets, num_rows), bisect_left(self._length_buckets, length)
        if row == len(self._row_buckets) or column == len(self._length_buckets):
            return None
        return self._graphs.get((self._row_buckets[row], self._length_buckets[column]))


def graph_shapes(max_rows: int, max_length: int) -> list[tuple[int, int]]:
    """(rows, length) of all recorded steps, the most partial results first: those after it fit into its memory."""
    shapes = [
        (rows, length)
        for length in reversed(length_buckets(max_length))
        for rows in reversed(row_buckets(max_rows) if max_rows else [])
        if rows * length <= _MAX_ROW_TOKENS
    ]
    return sorted(shapes, key=lambda shape: shape[0] * shape[1], reverse=True)


def row_buckets(most: int) -> list[int]:
    """1, 2, 4, 8, 12, 16, 24, 32, 48 ... and ``most``: at most a third of a step's rows are padding from 8 on."""
    powers = [1 << i for i in range(most.bit_length())]
    between = [power * 3 // 2 for power in powers if power >= 8]
    return sorted({n for n in (*powers, *between) if n <= most} | {most})


def length_buckets(most: int) -> list[int]:
    lengths = [_FIRST_LENGTH]
    while lengths[-1] < most:
        lengths.append(lengths[-1] * _LENGTH_FACTOR)
    return [*lengths[:-1], most]
