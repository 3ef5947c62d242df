"""Which decode steps are recorded, and which steps are decode steps. No kernels."""

from __future__ import annotations

from baton.types import SamplingParams, SequenceSpec
from engine.decode_graph import length_buckets, row_buckets
from engine.runner import decode_rows
from engine.step import Piece, Sequence, StepPlan


def test_buckets_hold_every_size_with_bounded_padding() -> None:
    assert row_buckets(1) == [1]
    assert row_buckets(40) == [1, 2, 4, 8, 12, 16, 24, 32, 40]
    for most in range(1, 300):
        buckets = row_buckets(most)
        assert buckets[-1] == most
        for rows in range(8, most + 1):
            assert min(b for b in buckets if b >= rows) * 2 <= rows * 3
    assert length_buckets(100) == [100]
    assert length_buckets(512) == [512]
    assert length_buckets(9000) == [512, 2048, 8192, 9000]


def piece(num_prompt: int, num_generated: int, start: int, num_tokens: int = 1) -> Piece:
    known = tuple(range(num_prompt)), tuple(range(100, 100 + num_generated))
    sequence = Sequence(SequenceSpec("a", known[0], SamplingParams(seed=1, max_tokens=9), known[1]))
    sequence.block_ids = [7]
    return Piece(sequence, start, num_tokens, samples=start + num_tokens == num_prompt + num_generated)


def test_only_newest_generated_tokens_are_decodes() -> None:
    decode = piece(3, 2, 4)
    assert decode_rows(StepPlan((decode,)), {}) == [(101, 4, 3, [7])]
    for other in (piece(1, 0, 0), piece(3, 2, 3), piece(3, 2, 3, 2), piece(4, 1, 3, 2)):
        assert decode_rows(StepPlan((other,)), {}) is None
        assert decode_rows(StepPlan((decode, other)), {}) is None


def test_a_token_that_is_being_drawn_is_named_by_its_row() -> None:
    fed = Piece(piece(3, 2, 4).sequence, 5, 1, samples=True)
    assert fed.token_is_on_device
    assert decode_rows(StepPlan((piece(3, 2, 4), fed)), {"a": 6}) == [(101, 4, 3, [7]), (~6, 5, 3, [7])]
