"""The steps before serving keep to the limits of the replica that they warm up."""

from __future__ import annotations

import pytest

from baton.types import KvLayout
from engine.kernels.interface import LaunchShapes
from engine.warm_up import MINIMAL, largest_step, warm_up_plans

LAYOUT = KvLayout(1, 4, 1, 16, 16, "float32")
ROWS = (1, 17, 33, 128)
SHAPES = LaunchShapes(prompts=ROWS, decodes=(*((rows, 2) for rows in ROWS), (1, 257)))


@pytest.mark.parametrize(
    ("max_batch_tokens", "max_num_seqs", "max_model_tokens"), [(2048, 256, 8192), (100, 20, 30), (8, 200, 1), (1, 1, 1)]
)
def test_every_kind_that_the_limits_allow_and_no_other(
    max_batch_tokens: int, max_num_seqs: int, max_model_tokens: int
) -> None:
    prompts, decodes, longest = set(), set(), 0
    plans = warm_up_plans(
        SHAPES, LAYOUT, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs, max_model_tokens=max_model_tokens
    )
    for plan in plans:
        assert plan.num_tokens <= max_batch_tokens
        assert all(p.end <= max_model_tokens for p in plan.pieces)
        assert all(LAYOUT.blocks_for(p.end) == len(p.sequence.block_ids) for p in plan.pieces)
        assert len({p.sequence.sequence_id for p in plan.pieces}) == len(plan.pieces)
        is_decode = plan.pieces[0].start > 0
        (decodes if is_decode else prompts).add(plan.num_tokens)
        longest = max(longest, *(p.end for p in plan.pieces))
    assert prompts == {n for n in ROWS if n <= max_batch_tokens}
    if max_model_tokens > 1:
        assert decodes == {n for n in ROWS if n <= min(max_num_seqs, max_batch_tokens)}
        assert (longest == 257) == (max_model_tokens >= 257)


def test_without_a_compiler_a_prompt_and_a_token_are_enough() -> None:
    plans = list(warm_up_plans(MINIMAL, LAYOUT, max_batch_tokens=9, max_num_seqs=9, max_model_tokens=9))
    assert [(p.pieces[0].start, p.num_tokens) for p in plans] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("max_batch_tokens", "max_num_seqs", "max_model_tokens"),
    [(2048, 256, 8192), (2048, 256, 100), (300, 4, 100), (100, 200, 30), (8, 2, 3), (5, 5, 1), (1, 1, 1)],
)
def test_the_largest_step_is_as_large_as_the_limits_allow(
    max_batch_tokens: int, max_num_seqs: int, max_model_tokens: int
) -> None:
    plan = largest_step(
        LAYOUT, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs, max_model_tokens=max_model_tokens
    )
    num_seqs = min(max_num_seqs, max_batch_tokens)
    assert plan.num_tokens == min(max_batch_tokens, max_num_seqs * max_model_tokens)
    assert len(plan.pieces) == num_seqs
    assert len({p.sequence.sequence_id for p in plan.pieces}) == len(plan.pieces)
    assert all(p.samples and p.end <= max_model_tokens for p in plan.pieces)
    decodes = [p.end for p in plan.pieces if p.start > 0]
    # What attention keeps of every row is as large as its longest one.
    assert not decodes or max(decodes) == max_model_tokens
