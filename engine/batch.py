"""Turns a StepPlan into the index tensors of one forward pass. Knows no weights and computes no activations."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baton.types import KvLayout
from engine.step import Piece, StepPlan


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one piece: row ``row + i`` is the token at position ``start + i``."""

    row: int
    start: int
    num_tokens: int
    # Block j holds positions [j * block_tokens, (j + 1) * block_tokens).
    block_ids: tuple[int, ...]
    # Positions from here on were generated; a step that takes a sequence up again may hold both kinds.
    num_prompt_tokens: int = sys.maxsize


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's inputs, a row per token."""

    num_tokens: int
    token_ids: Tensor  # [num_tokens] int64; ~i: what row i of the step before draws
    positions: Tensor  # [num_tokens] int64
    prompt_lengths: Tensor  # [num_tokens] int64
    # Where a token's keys and values go, block * block_tokens + offset, [num_tokens] int64.
    slot_mapping: Tensor
    spans: tuple[Span, ...]
    # Rows whose logits are wanted, in the order of the pieces that sample.
    sample_rows: tuple[int, ...]


def sampling_spans(batch: Batch) -> tuple[Span, ...]:
    """Spans of the single tokens that sample, in rows numbered as ``sample_rows`` orders them."""
    wanted = set(batch.sample_rows)
    spans = [s for s in batch.spans if s.row + s.num_tokens - 1 in wanted]
    return tuple(replace(s, row=i, start=s.start + s.num_tokens - 1, num_tokens=1) for i, s in enumerate(spans))


def token_ids_of(piece: Piece, drawn_rows: Mapping[str, int]) -> list[int]:
    """``drawn_rows``: which row of the step before draws a sequence's token, for one that the host does not know."""
    if piece.is_fed:
        return [~drawn_rows[piece.sequence.sequence_id]]
    return piece.sequence.token_ids[piece.start : piece.end]


def build_batch(plan: StepPlan, layout: KvLayout, drawn_rows: Mapping[str, int] | None = None) -> Batch:
    num_tokens = plan.num_tokens
    token_ids: list[int] = []
    spans: list[Span] = []
    sample_rows: list[int] = []
    for piece in plan.pieces:
        row = len(token_ids)
        token_ids += token_ids_of(piece, drawn_rows or {})
        spans.append(_span(piece, row, layout))
        if piece.samples:
            sample_rows.append(row + piece.num_tokens - 1)
    positions = _ranges([s.start for s in spans], [s.num_tokens for s in spans])
    counts = torch.tensor([s.num_tokens for s in spans])
    return Batch(
        num_tokens=num_tokens,
        token_ids=torch.tensor(token_ids),
        positions=positions,
        prompt_lengths=torch.tensor([len(p.sequence.spec.prompt_token_ids) for p in plan.pieces]).repeat_interleave(
            counts
        ),
        slot_mapping=_slot_mapping(spans, positions, counts, layout.block_tokens),
        spans=tuple(spans),
        sample_rows=tuple(sample_rows),
    )


def _span(piece: Piece, row: int, layout: KvLayout) -> Span:
    sequence, end = piece.sequence, piece.end
    num_blocks = layout.blocks_for(end)
    assert piece.num_tokens > 0, "a piece computes at least one token"
    assert end <= len(sequence.token_ids) + piece.is_fed, "a piece computes tokens that are known or being drawn"
    assert num_blocks <= len(sequence.block_ids), "a piece's tokens have blocks"
    block_ids = tuple(sequence.block_ids[:num_blocks])
    return Span(row, piece.start, piece.num_tokens, block_ids, len(sequence.spec.prompt_token_ids))


def _ranges(starts: list[int], counts: list[int]) -> Tensor:
    return torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])


def _slot_mapping(spans: list[Span], positions: Tensor, counts: Tensor, block_tokens: int) -> Tensor:
    tables = torch.tensor([block for span in spans for block in span.block_ids])
    sizes = torch.tensor([len(span.block_ids) for span in spans])
    first = (sizes.cumsum(0) - sizes).repeat_interleave(counts)
    return tables[first + positions // block_tokens] * block_tokens + positions % block_tokens
