"""Tokens that a request allows or forbids by lists: a function of the ids, alone and with a grammar."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequest
from baton.types import KvLayout, SamplingParams, SequenceSpec
from engine.blocks import BlockPool
from engine.events import Output
from engine.fake import FakeRunner
from engine.list_masks import ListMask
from engine.schedule import Scheduler
from engine.scheduler_config import SchedulerConfig

VOCAB_SIZE = 37
PROMPT = (1, 2, 3)


def spec(prompt: tuple[int, ...] = PROMPT, **fields: Any) -> SequenceSpec:
    return SequenceSpec("a", prompt, SamplingParams(**{"seed": 0, "max_tokens": 64} | fields))


def allowed(mask: ListMask, *generated: int) -> set[int]:
    bits = mask.bits((*PROMPT, *generated))
    assert len(bits) == 8
    return {i for i in range(64) if bits[i // 8] >> i % 8 & 1}


ALL = set(range(VOCAB_SIZE))


def test_only_what_is_allowed() -> None:
    mask = ListMask(spec(allowed_token_ids=(4, 36, 500)), VOCAB_SIZE, None)
    assert allowed(mask) == {4, 36}
    assert mask.is_ready
    assert not mask.follows_tokens
    assert not mask.is_over(PROMPT)


def test_bad_words_end_nowhere_in_the_output() -> None:
    mask = ListMask(spec(bad_word_ids=((7,), (3, 8), (5, 6, 9), (5, 6, 10))), VOCAB_SIZE, None)
    # What the prompt ends with does not count.
    assert allowed(mask) == ALL - {7}
    assert allowed(mask, 3) == ALL - {7, 8}
    assert allowed(mask, 5) == ALL - {7}
    assert allowed(mask, 5, 6) == ALL - {7, 9, 10}
    assert allowed(mask, 5, 6, 3) == ALL - {7, 8}
    assert mask.follows_tokens
    assert not ListMask(spec(bad_word_ids=((7,), (8,))), VOCAB_SIZE, None).follows_tokens


class Odd:
    is_ready = False
    follows_tokens = True

    def is_over(self, token_ids: Seq[int]) -> bool:
        return len(token_ids) > 5

    def bits(self, token_ids: Seq[int]) -> bytes:
        return b"\xaa" * 8


def test_with_a_grammar_both_hold() -> None:
    mask = ListMask(spec(allowed_token_ids=(1, 2, 3), bad_word_ids=((3,),)), VOCAB_SIZE, Odd())
    assert allowed(mask) == {1}
    assert not mask.is_ready
    assert mask.follows_tokens
    assert (mask.is_over((*PROMPT, 1)), mask.is_over((*PROMPT, 1, 1, 1))) == (False, True)


@given(
    words=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    only=st.sets(st.integers(0, 11), min_size=7).map(tuple),
)
def test_no_answer_has_them(words: tuple[tuple[int, ...], ...], only: tuple[int, ...]) -> None:
    layout = KvLayout(1, 16, 1, 1, 16, "float32")
    runner = FakeRunner(layout, vocab_size=VOCAB_SIZE)
    config = SchedulerConfig(block_tokens=16, max_model_tokens=256, vocab_size=VOCAB_SIZE)
    scheduler = Scheduler(config, BlockPool(16))
    scheduler.add(spec(allowed_token_ids=only, bad_word_ids=words, max_tokens=40), hands_off=False, now=0.0)
    answer: list[int] = []
    while scheduler.num_sequences:
        plan, _ = scheduler.schedule(0.0)
        assert plan is not None
        for event in scheduler.apply(plan, runner.execute(plan), 0.0):
            assert isinstance(event, Output)
            answer += event.chunk.token_ids
    assert set(answer) <= set(only)
    for word in words:
        runs = [tuple(answer[i : i + len(word)]) for i in range(len(answer))]
        assert word not in runs


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"allowed_token_ids": ("1",)}, "allowed_token_ids"),
        ({"allowed_token_ids": tuple(range(20_000))}, "allowed_token_ids"),
        ({"bad_word_ids": ((),)}, "bad_word_ids"),
        ({"bad_word_ids": ((1, -1),)}, "bad_word_ids"),
        ({"bad_word_ids": ((1,),) * 1000}, "bad_word_ids"),
        ({"bad_word_ids": ((1,) * 100,)}, "bad_word_ids"),
    ],
)
def test_lists_have_bounds(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        spec(**fields)
    assert refused.value.param == param
