"""What a step computed for one sequence: what is taken of it, and what cannot be the sequence's."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from baton.errors import BadLogits, InternalError
from baton.types import FinishReason, PositionLogprobs, SamplingParams, SequenceSpec, TokenChunk, TokenLogprob
from engine.results import take_drawn, take_hidden, take_scores
from engine.step import Piece, Sequence

BLOCK_TOKENS = 4
REPORT = PositionLogprobs(TokenLogprob(1, -1.0), 1)


def sequence(num_blocks: int = 2, **sampling: object) -> Sequence:
    """Its prompt of three tokens was computed just now."""
    made = Sequence(SequenceSpec("s", (1, 2, 3), SamplingParams(**{"max_tokens": 4, "seed": 0} | sampling)))  # type: ignore[arg-type]
    made.block_ids = tuple(range(num_blocks))
    made.num_computed = 3
    return made


def drawn(*token_ids: int, index: int = 0) -> TokenChunk:
    return TokenChunk("s", index, token_ids, (REPORT,) * len(token_ids))


@pytest.mark.parametrize(("sampling", "token_ids", "num_taken", "reason"), [
    ({}, (7,), 1, None),
    ({}, (7, 8), 2, None),
    ({"stop_token_ids": (8,)}, (7, 8, 9), 2, FinishReason.STOP),
    ({"stop_token_ids": (8,), "min_tokens": 2}, (7, 8, 9), 3, None),
    ({"max_tokens": 2}, (7, 8, 9), 2, FinishReason.LENGTH),
    ({"max_tokens": 2, "stop_token_ids": (8,)}, (7, 8, 9), 2, FinishReason.STOP),
])  # fmt: skip
def test_tokens_are_taken_up_to_the_one_that_ends_it(
    sampling: dict[str, object], token_ids: tuple[int, ...], num_taken: int, reason: FinishReason | None
) -> None:
    one = sequence(**sampling)
    taken = take_drawn(one, drawn(*token_ids), BLOCK_TOKENS)
    assert taken == TokenChunk("s", 0, token_ids[:num_taken], (REPORT,) * num_taken, reason)
    assert one.token_ids == [1, 2, 3, *token_ids[:num_taken]]
    assert one.num_computed == 2 + num_taken, "the KV of the newest token is to come"


@pytest.mark.parametrize(("chunk", "words"), [
    (drawn(7, index=1), "1 tokens at index 1, expected at least one at 0"),
    (drawn(), "0 tokens at index 0, expected at least one at 0"),
    (drawn(7, 8, 9), "more than the KV blocks have room for"),
])  # fmt: skip
def test_tokens_that_cannot_be_its_own_change_nothing(chunk: TokenChunk, words: str) -> None:
    one = sequence(num_blocks=1)
    with pytest.raises(InternalError, match=words):
        take_drawn(one, chunk, BLOCK_TOKENS)
    assert one.token_ids == [1, 2, 3]


def test_scores_are_of_the_tokens_behind_the_scored_positions() -> None:
    one = sequence(prompt_logprobs=1)
    first, last = Piece(one, 0, 1, samples=False, scored=range(1)), Piece(one, 1, 2, samples=True, scored=range(1, 2))
    assert take_scores(one, first, (REPORT,), None).index == 1
    assert one.first_scored == 1
    assert take_scores(one, last, (REPORT,), None).index == 2
    assert one.first_scored == sys.maxsize


def test_scores_that_are_missing_raise_what_the_runner_said() -> None:
    one = sequence(prompt_logprobs=1)
    piece = Piece(one, 0, 1, samples=False, scored=range(1))
    with pytest.raises(InternalError, match="scored 0 positions, expected 1"):
        take_scores(one, piece, (), None)
    with pytest.raises(BadLogits, match="why"):
        take_scores(one, piece, (), BadLogits("why"))
    assert one.first_scored == 0


def test_an_embedding_comes_with_the_piece_that_samples() -> None:
    one = sequence(pooling="mean", max_tokens=1)
    pool = one.pool
    assert pool is not None
    first, last = Piece(one, 0, 1, samples=False, scored=range(1)), Piece(one, 1, 2, samples=True, scored=range(1, 2))
    assert take_hidden(one, pool, first, np.ones((1, 2), np.float32)) is None
    with pytest.raises(InternalError, match="returned 1 hidden states, expected 2"):
        take_hidden(one, pool, last, np.ones((1, 2), np.float32))
    found = take_hidden(one, pool, last, np.ones((2, 2), np.float32))
    assert found is not None
    assert found.sequence_id == "s"
    assert one.pool is None
