"""Runs a step of the model as one program: recorded once, run for every batch that fits, recorded again for a larger
one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.kernels.cpu.attention import Tile, tables_of, tiles_of, tiles_of_runs
from engine.kernels.cpu.logits import peaks_of
from engine.kernels.cpu.long_attention import LongAttention, Split, long_tables, split
from engine.kernels.cpu.program import Count, Program
from engine.kernels.interface import Attention, Logits, StepInputs
from engine.kv_cache import KvCache
from engine.memory import recorded_size
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    from engine.kernels.cpu import CpuKernels

_Order = Callable[[StepInputs], tuple[Tensor, Tensor]]
_OnLayer = Callable[[int], None] | None


class StepRecorder:
    """Keeps the latest recording."""

    def __init__(self, kernels: CpuKernels, config: ModelConfig, cache: KvCache) -> None:
        self._kernels = kernels
        self._config = config
        self._cache = cache
        self._sizes = _Sizes(1, 1, 1, 0)
        self._most_positions = cache.layout.blocks_for(config.max_model_tokens) * cache.layout.block_tokens
        self._step: _RecordedStep | None = None

    @property
    def num_bytes(self) -> int:
        """Of the newest recording, kept until a larger one."""
        return 0 if self._step is None else self._step.num_bytes

    def run(self, batch: Batch, cos: Tensor, sin: Tensor, on_layer: _OnLayer, order: _Order) -> Logits:
        block_ids, begins = tables_of(batch.pieces)
        tiles = split(
            tiles_of(batch.pieces, begins, self._config.group_size), self._cache.layout,
            num_heads=self._config.num_heads, num_threads=torch.get_num_threads(), most_positions=self._most_positions,
        )  # fmt: skip
        sizes = _Sizes(batch.num_tokens, len(batch.logit_rows), len(block_ids), tiles.num_positions)
        if self._step is None or not self._sizes.hold(sizes):
            self._sizes = self._sizes.grown(sizes)
            # Free the old recording's memory first.
            self._step = None
            self._step = _RecordedStep(self._kernels, self._config, self._cache, self._sizes, order)
        logit_tiles = tiles_of_runs(batch, begins, self._config.group_size)
        return self._step.run(batch, block_ids, logit_tiles, tiles, cos, sin, on_layer)


class _Sizes(NamedTuple):
    """The capacity of a recording."""

    rows: int
    # Whose logits are computed.
    wanted: int
    blocks: int
    # Of long contexts.
    positions: int

    def hold(self, other: _Sizes) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def grown(self, other: _Sizes) -> _Sizes:
        return _Sizes(*(max(mine, recorded_size(theirs)) for mine, theirs in zip(self, other, strict=True)))


class _Inputs(NamedTuple):
    """The input memory of a program, as host tensors."""

    token_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    tiles: NDArray[np.int64]
    block_ids: NDArray[np.int64]
    logit_rows: NDArray[np.int64]
    logit_tiles: NDArray[np.int64]
    long_tiles: NDArray[np.int64]
    long_pieces: NDArray[np.int64]


class _RecordedStep:
    """A program and its inputs, at the addresses that the program reads."""

    def __init__(self, kernels: CpuKernels, config: ModelConfig, cache: KvCache, sizes: _Sizes, order: _Order) -> None:
        integers = partial(torch.zeros, dtype=torch.int64)
        token_ids, slots, logit_rows = map(integers, (sizes.rows, sizes.rows, sizes.wanted))
        cos, sin = torch.empty(2, sizes.rows, config.head_dim // 2)
        tiles, logit_tiles, block_ids = integers(sizes.rows, 4), integers(sizes.wanted, 4), integers(sizes.blocks)
        long_tiles, long_pieces = (integers(*shape) for shape in long_tables(sizes.positions))
        self._inputs = _Inputs(
            *(x.numpy() for x in (token_ids, slots, cos, sin, tiles, block_ids, logit_rows, logit_tiles)),
            *(x.numpy() for x in (long_tiles, long_pieces)),
        )
        long = self._long = None
        if sizes.positions:
            long = self._long = kernels.long_attention(
                config, cache.layout, long_tiles, long_pieces, block_ids, sizes.positions
            )
        self._program = program = Program(sizes.rows, sizes.wanted)
        # Number of records before layer i's keys and values are written.
        self._written: list[int] = []

        def attention(tiles: Tensor, count: Count, long: LongAttention | None = None) -> Attention:
            return kernels.tiled_attention(config, cache.layout, tiles, block_ids, count, long)

        def choose(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Attention]:
            program.count = Count.WANTED
            chosen = kernels.take_rows(x, logit_rows), kernels.take_rows(q, logit_rows)
            return *chosen, attention(logit_tiles, Count.WANTED_TILES)

        def on_layer(_: int) -> None:
            self._written.append(len(program))

        inputs = StepInputs(token_ids, cos, sin, slots, attention(tiles, Count.TILES, long), on_layer, choose)
        with kernels.tape.recording(program):
            # Kept, so that no later record writes there.
            self._hidden, logits = order(inputs)
            self._logits, summary = kernels.summarize(logits)
        self._summary = summary.numpy()
        program.seal()

    @property
    def num_bytes(self) -> int:
        long = 0 if self._long is None else self._long.num_bytes
        return self._program.num_bytes + sum(part.nbytes for part in self._inputs) + long

    def run(
        self,
        batch: Batch,
        block_ids: list[int],
        logit_tiles: list[Tile],
        tiles: Split,
        cos: Tensor,
        sin: Tensor,
        on_layer: _OnLayer,
    ) -> Logits:
        num_rows, num_wanted = batch.num_tokens, len(batch.logit_rows)
        to = self._inputs
        to.token_ids[:num_rows], to.slots[:num_rows] = batch.token_ids.numpy(), batch.slot_mapping.numpy()
        to.cos[:num_rows], to.sin[:num_rows] = cos.numpy(), sin.numpy()
        to.block_ids[: len(block_ids)] = block_ids
        for table, rows in ((to.tiles, tiles.whole), (to.long_tiles, tiles.long), (to.long_pieces, tiles.pieces)):
            if rows:
                table[: len(rows)] = rows
        if num_wanted:
            to.logit_rows[:num_wanted] = batch.logit_rows
            to.logit_tiles[: len(logit_tiles)] = logit_tiles
        counts = {Count.ROWS: num_rows, Count.WANTED: num_wanted}
        counts |= {Count.TILES: len(tiles.whole), Count.WANTED_TILES: len(logit_tiles)}
        counts |= {Count.LONG_TILES: len(tiles.long), Count.LONG_PIECES: len(tiles.pieces)}
        pauses = [] if on_layer is None else [(at, partial(on_layer, i)) for i, at in enumerate(self._written)]
        # Only the rows whose logits are wanted need the last layer's output.
        self._program.run(counts, pauses, len(self._program) if num_wanted else self._written[-1])
        return Logits(self._logits[:num_wanted], peaks_of(self._summary[:num_wanted]), self._hidden[:num_wanted])
