"""Turns a StepPlan into the index tensors of one forward pass."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.types import KvLayout
from engine.step import Piece, StepPlan


@dataclass(frozen=True, slots=True)
class PieceRows:
    """The rows of one piece: row ``row + i`` is the token at position ``start + i``."""

    row: int
    start: int
    num_tokens: int
    # Block j holds positions [j * block_tokens, (j + 1) * block_tokens).
    block_ids: tuple[int, ...]
    # Positions from here on were generated; a step that takes a sequence up again may hold both kinds.
    num_prompt_tokens: int = sys.maxsize


class Run(NamedTuple):
    """Consecutive rows of one piece."""

    # Its number among the pieces.
    piece: int
    # The first row, counted from the piece's.
    offset: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's inputs, a row per token."""

    num_tokens: int
    token_ids: Tensor  # [num_tokens] int64; ~i: what row i of the step before draws
    positions: Tensor  # [num_tokens] int64
    prompt_lengths: Tensor  # [num_tokens] int64
    # Where a token's keys and values go, block * block_tokens + offset, [num_tokens] int64.
    slot_mapping: Tensor
    # Of the plan's pieces, in their order.
    pieces: tuple[PieceRows, ...]
    # Whose logits are wanted: of each piece that samples the last row, in the order of the pieces, then the rows that
    # are scored.
    runs: tuple[Run, ...]
    # All rows of these.
    logit_rows: tuple[int, ...]


def logit_pieces(batch: Batch) -> tuple[PieceRows, ...]:
    """The runs as pieces, in rows numbered as ``logit_rows`` orders them."""
    found: list[PieceRows] = []
    row = 0
    for run in batch.runs:
        piece = batch.pieces[run.piece]
        found.append(replace(piece, row=row, start=piece.start + run.offset, num_tokens=run.num_rows))
        row += run.num_rows
    return tuple(found)


def token_ids_of(piece: Piece, drawn_rows: Mapping[str, int]) -> list[int]:
    """``drawn_rows``: which row of the step before draws a sequence's token, for one that the host does not know."""
    if piece.token_is_on_device:
        return [~drawn_rows[piece.sequence.sequence_id]]
    return piece.sequence.token_ids[piece.start : piece.end]


def build_batch(plan: StepPlan, layout: KvLayout, drawn_rows: Mapping[str, int] | None = None) -> Batch:
    """In NumPy: before a short step, every operation of torch's on a few numbers shows."""
    token_ids: list[int] = []
    rows: list[PieceRows] = []
    for piece in plan.pieces:
        row = len(token_ids)
        token_ids += token_ids_of(piece, drawn_rows or {})
        rows.append(_rows_of(piece, row, layout))
    runs = [Run(i, p.num_tokens - 1, 1) for i, p in enumerate(plan.pieces) if p.samples]
    runs += [Run(i, p.scored.start - p.start, len(p.scored)) for i, p in enumerate(plan.pieces) if p.scored]
    counts = [r.num_tokens for r in rows]
    # Of a row, its position less its number.
    offsets = np.array([r.start - r.row for r in rows]).repeat(counts)
    positions = offsets + np.arange(len(token_ids))
    return Batch(
        num_tokens=len(token_ids),
        token_ids=torch.from_numpy(np.array(token_ids)),
        positions=torch.from_numpy(positions),
        prompt_lengths=torch.from_numpy(
            np.array([len(p.sequence.spec.prompt_token_ids) for p in plan.pieces]).repeat(counts)
        ),
        slot_mapping=torch.from_numpy(_slot_mapping(rows, counts, positions, layout.block_tokens)),
        pieces=tuple(rows),
        runs=tuple(runs),
        logit_rows=tuple([rows[i].row + offset + j for i, offset, count in runs for j in range(count)]),
    )


def _rows_of(piece: Piece, row: int, layout: KvLayout) -> PieceRows:
    sequence, end = piece.sequence, piece.end
    num_blocks = layout.blocks_for(end)
    assert piece.num_tokens > 0, "a piece computes at least one token"
    assert end <= len(sequence.token_ids) + piece.token_is_on_device, (
        "a piece computes tokens that are known or being drawn"
    )
    assert num_blocks <= len(sequence.block_ids), "a piece's tokens have blocks"
    block_ids = tuple(sequence.block_ids[:num_blocks])
    return PieceRows(row, piece.start, piece.num_tokens, block_ids, len(sequence.spec.prompt_token_ids))


def _slot_mapping(
    rows: list[PieceRows], counts: list[int], positions: NDArray[np.int64], block_tokens: int
) -> NDArray[np.int64]:
    tables: list[int] = []
    begins: list[int] = []
    for piece in rows:
        begins.append(len(tables))
        tables += piece.block_ids
    blocks = np.array(tables)[np.array(begins).repeat(counts) + positions // block_tokens]
    return blocks * block_tokens + positions % block_tokens
