"""The tokens of one sequence, put in order: late, twice, with a hole, with others than before."""

from __future__ import annotations

from itertools import permutations

import pytest

from baton.types import PositionLogprobs, TokenChunk, TokenLogprob
from router.flow.token_order import DifferentTokens, TokenOrder

# (index, tokens) of chunks that overlap.
CHUNKS = ((0, (5, 6)), (1, (6, 7)), (3, (8,)), (2, (7, 8, 9)))
WHOLE = [5, 6, 7, 8, 9]


def chunk(index: int, token_ids: tuple[int, ...]) -> TokenChunk:
    logprobs = tuple(PositionLogprobs(TokenLogprob(t, -1.0), 1) for t in token_ids)
    return TokenChunk("s", index, token_ids, logprobs)


@pytest.mark.parametrize("order", list(permutations(CHUNKS)))
def test_each_token_is_new_once_and_in_its_place_whatever_comes_first(
    order: tuple[tuple[int, tuple[int, ...]]],
) -> None:
    tokens, delivered = TokenOrder(), list[int]()
    for index, token_ids in order:
        new = tokens.take(chunk(index, token_ids))
        assert (new is None) == (index > len(delivered))
        if new is not None:
            assert new.index == len(delivered)
            assert [x.chosen.token_id for x in new.logprobs] == list(new.token_ids)
            delivered += new.token_ids
        assert tokens.tokens == delivered
    assert delivered == WHOLE
    assert not tokens.early


def test_what_comes_again_is_nothing_new() -> None:
    tokens = TokenOrder([5])
    assert tokens.take(chunk(0, (5,))) == TokenChunk("s", 1, ())
    assert tokens.tokens == [5]


@pytest.mark.parametrize("early", [(), ((2, (7,)),)])
def test_a_token_that_differs_is_named_by_its_place(early: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
    tokens = TokenOrder([5])
    for index, token_ids in early:
        assert tokens.take(chunk(index, token_ids)) is None
    with pytest.raises(DifferentTokens, match=f"token at {2 if early else 0} came twice"):
        tokens.take(chunk(1, (6, 8)) if early else chunk(0, (4, 6)))
