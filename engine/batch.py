"""Turns a StepPlan into the index tensors of one forward pass. Knows no weights and computes no activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.types import KvLayout
from engine.step import Piece, StepPlan

# A row of a matrix product keeps its bits whatever the other rows only if their number is a multiple of this.
ROW_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one piece: row ``row + i`` is the token at position ``start + i``."""

    row: int
    start: int
    num_tokens: int
    # Block j holds positions [j * block_tokens, (j + 1) * block_tokens).
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's inputs; rows beyond ``num_tokens`` are padding: computed, never read, never written to the cache."""

    num_tokens: int
    num_rows: int
    token_ids: Tensor  # [num_rows] int64
    positions: Tensor  # [num_rows] int64
    prompt_lengths: Tensor  # [num_rows] int64
    spans: tuple[Span, ...]
    # Cache rows of the tokens' keys, [num_tokens * num_kv_heads] int64, token-major, in a layer seen as
    # [num_blocks * num_kv_heads * 2 * block_tokens, head_dim]; values lie block_tokens rows further.
    key_rows: Tensor
    # Rows whose logits are wanted, in the order of the pieces that sample.
    sample_rows: tuple[int, ...]


def sampling_rows(batch: Batch) -> Tensor:
    """Rows that sample, padded by repeating the last; there must be one."""
    rows = batch.sample_rows
    return torch.tensor(rows + rows[-1:] * (padded(len(rows)) - len(rows)))


def sampling_spans(batch: Batch) -> tuple[Span, ...]:
    """Spans of the single tokens that sample, in rows numbered as ``sampling_rows`` orders them."""
    wanted = set(batch.sample_rows)
    spans = [s for s in batch.spans if s.row + s.num_tokens - 1 in wanted]
    return tuple(Span(i, s.start + s.num_tokens - 1, 1, s.block_ids) for i, s in enumerate(spans))


def padded(num_rows: int) -> int:
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE


def build_batch(plan: StepPlan, layout: KvLayout) -> Batch:
    num_tokens = plan.num_tokens
    token_ids: list[int] = []
    spans: list[Span] = []
    sample_rows: list[int] = []
    for piece in plan.pieces:
        row = len(token_ids)
        token_ids += piece.sequence.token_ids[piece.start : piece.start + piece.num_tokens]
        spans.append(_span(piece, row, layout))
        if piece.samples:
            sample_rows.append(row + piece.num_tokens - 1)
    padding = padded(num_tokens) - num_tokens
    positions = _ranges([s.start for s in spans], [s.num_tokens for s in spans])
    counts = torch.tensor([s.num_tokens for s in spans])
    prompts = torch.tensor([len(p.sequence.spec.prompt_token_ids) for p in plan.pieces]).repeat_interleave(counts)
    return Batch(
        num_tokens=num_tokens,
        num_rows=num_tokens + padding,
        token_ids=torch.tensor(token_ids + [0] * padding),
        positions=torch.cat((positions, positions.new_zeros(padding))),
        prompt_lengths=torch.cat((prompts, prompts.new_ones(padding))),
        spans=tuple(spans),
        key_rows=_key_rows(spans, positions, counts, layout),
        sample_rows=tuple(sample_rows),
    )


def _span(piece: Piece, row: int, layout: KvLayout) -> Span:
    sequence, end = piece.sequence, piece.start + piece.num_tokens
    num_blocks = layout.blocks_for(end)
    assert piece.num_tokens > 0, "a piece computes at least one token"
    assert end <= len(sequence.token_ids), "a piece computes tokens that are known"
    assert num_blocks <= len(sequence.block_ids), "a piece's tokens have blocks"
    return Span(row, piece.start, piece.num_tokens, tuple(sequence.block_ids[:num_blocks]))


def _ranges(starts: list[int], counts: list[int]) -> Tensor:
    return torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])


def _key_rows(spans: list[Span], positions: Tensor, counts: Tensor, layout: KvLayout) -> Tensor:
    heads, block_tokens = layout.num_kv_heads, layout.block_tokens
    tables = torch.tensor([block for span in spans for block in span.block_ids])
    sizes = torch.tensor([len(span.block_ids) for span in spans])
    first = (sizes.cumsum(0) - sizes).repeat_interleave(counts)
    blocks = tables[first + positions // block_tokens]
    by_head = blocks[:, None] * heads + torch.arange(heads)
    return (by_head * (2 * block_tokens) + (positions % block_tokens)[:, None]).view(-1)
