"""What a step computed for one sequence, checked and added to it: tokens, scores of its prompt, an embedding.

Pure. What the runner returns is not trusted: each function raises InternalError for results that cannot be the
sequence's.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from baton.errors import InternalError
from baton.types import Embedding, FinishReason, PositionLogprobs, PromptLogprobs, TokenChunk
from engine.pooling import Pool
from engine.step import Piece, Sequence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def take_drawn(sequence: Sequence, drawn: TokenChunk, block_tokens: int) -> TokenChunk:
    """Add the drawn tokens up to the first that ends the sequence; returns those, with how it ended."""
    if drawn.index != sequence.num_generated or not drawn.token_ids:
        raise InternalError(
            f"the runner drew {len(drawn.token_ids)} tokens at index {drawn.index}, expected at least one at "
            f"{sequence.num_generated}"
        )
    room = len(sequence.block_ids) * block_tokens
    if sequence.num_computed + len(drawn.token_ids) - 1 > room:
        raise InternalError(f"the runner drew {len(drawn.token_ids)} tokens, more than the KV blocks have room for")
    for count, token_id in enumerate(drawn.token_ids, start=1):
        sequence.token_ids.append(token_id)
        finish = finish_reason(sequence, token_id)
        if finish is not None:
            drawn = replace(
                drawn, token_ids=drawn.token_ids[:count], logprobs=drawn.logprobs[:count], finish_reason=finish
            )
            break
    sequence.num_computed = len(sequence.token_ids) - 1
    return drawn


def take_hidden(sequence: Sequence, pool: Pool, piece: Piece, rows: NDArray[np.float32] | None) -> Embedding | None:
    """``rows``: hidden states of the piece's scored positions and of the one that samples. The embedding comes with
    the last piece of the prompt."""
    expected, found = len(piece.scored) + piece.samples, 0 if rows is None else len(rows)
    if expected != found:
        raise InternalError(f"the runner returned {found} hidden states, expected {expected}")
    if rows is not None:
        pool.add(rows)
    embedding = None
    if piece.samples:
        embedding = Embedding(sequence.sequence_id, pool.values())
        sequence.pool = None
    _note_scored(sequence, piece)
    return embedding


def take_scores(
    sequence: Sequence, piece: Piece, reports: tuple[PositionLogprobs, ...], failure: Exception | None
) -> PromptLogprobs:
    """``failure``: why the runner has no reports, if it said so; raised where some are missing."""
    if len(reports) != len(piece.scored):
        raise failure or InternalError(f"the runner scored {len(reports)} positions, expected {len(piece.scored)}")
    _note_scored(sequence, piece)
    return PromptLogprobs(sequence.sequence_id, piece.scored.start + 1, reports)


def finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    """``token_id`` was just appended to ``sequence``."""
    sampling = sequence.spec.sampling
    if token_id in sampling.stop_token_ids and sequence.num_generated > sampling.min_tokens:
        return FinishReason.STOP
    if sequence.token_mask is not None and sequence.token_mask.is_over(sequence.token_ids):
        return FinishReason.STOP
    if sequence.num_generated == sampling.max_tokens:
        return FinishReason.LENGTH
    return None


def _note_scored(sequence: Sequence, piece: Piece) -> None:
    if piece.scored:
        end = piece.scored.stop
        sequence.first_scored = end if end < len(sequence.spec.prompt_token_ids) - 1 else sys.maxsize
