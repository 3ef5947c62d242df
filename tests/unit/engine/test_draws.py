"""What a device is told of each row, and what lies in its slots. No kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
import pytest

from baton.errors import BadLogits, InvalidRequest
from baton.types import SamplingParams, SequenceSpec
from engine.draws import DeviceDraws, drawn_results
from engine.kernels.interface import NO_TOKEN
from engine.step import Piece, Sequence
from tests.support.device_sampler import BestSampler

VOCAB = 40


def sequence(name: str, prompt: tuple[int, ...] = (1, 2, 2), generated: tuple[int, ...] = (), **options: object):
    params = SamplingParams(**{"max_tokens": 9, "seed": 1, **options})  # type: ignore[arg-type]
    return Sequence(SequenceSpec(name, prompt, params, generated))


def newest(live: Sequence, *, is_fed: bool = False) -> Piece:
    """The piece that computes the newest token: known, or the one that the step before draws."""
    return Piece(live, len(live.token_ids) - (not is_fed), 1, samples=True)


def whole(live: Sequence) -> Piece:
    return Piece(live, 0, len(live.token_ids), samples=True)


def seen(draws: DeviceDraws, slot: int) -> dict[int, int]:
    counts = draws.sampler.tables.seen[slot].tolist()
    return {i: n for i, n in enumerate(counts) if n}


def test_rows_without_changes_have_no_slot() -> None:
    draws = DeviceDraws(BestSampler(3, VOCAB))
    kinds: list[dict[str, object]] = [
        {"seed": 2**64 - 1, "top_k": 2**40, "top_p": 0.5, "min_p": 0.25, "temperature": 2.0, "min_tokens": 1},
        {"temperature": 0.0, "logprobs": 0},
        {"stop_token_ids": (4,)},
    ]
    found = draws.prepare([whole(sequence(f"s{i}", **kind)) for i, kind in enumerate(kinds)], {}).columns
    assert found.scale.tolist() == [np.float32(math.log2(math.e) / 2), 0, np.float32(math.log2(math.e))]
    assert (found.seed[0], found.top_k[0], found.position[0]) == (-1, 2**31 - 1, 3)
    assert found.top_p.tolist() == [0.5, 1.0, 1.0]
    assert found.reach.tolist() == [2 * math.log(0.25), -math.inf, -math.inf]
    assert found.slot.tolist() == [-1] * 3
    assert found.newest.tolist() == [NO_TOKEN] * 3
    assert found.num_logprobs.tolist() == [-1, 0, -1]
    assert draws.prepare([], {}).columns.seed.shape == (0,)


def test_a_slot_lists_biases_and_bans_by_id() -> None:
    draws = DeviceDraws(BestSampler(3, VOCAB))
    live = sequence("a", logit_bias={9: 1.5, 4: -2.0}, min_tokens=1, stop_token_ids=(30, 4), presence_penalty=0.5)
    row = draws.prepare([whole(live)], {}).columns
    slot = int(row.slot)
    tables = draws.sampler.tables
    assert tables.edit_ids[slot, :4].tolist() == [4, 9, 30, 2**31 - 1]
    assert tables.edit_biases[slot, :4].tolist() == [-2.0, 1.5, 0.0, 0.0]
    assert tables.edit_bans[slot, :4].tolist() == [1, 0, 1, 0]
    assert tables.penalties[slot].tolist() == [1.0, 0.0, 0.5]
    assert row.is_banning.tolist() == [1]
    live.token_ids.append(7)
    assert draws.prepare([newest(live)], {}).columns.is_banning.tolist() == [0]
    # Bans alone need a slot only while they last.
    banned = sequence("b", min_tokens=1, stop_token_ids=(30,))
    assert draws.prepare([whole(banned)], {}).columns.slot.tolist() != [-1]
    banned.token_ids.append(7)
    assert draws.prepare([newest(banned)], {}).columns.slot.tolist() == [-1]


def test_the_device_counts_new_tokens_and_gets_all_others() -> None:
    draws = DeviceDraws(BestSampler(3, VOCAB))
    live = sequence("a", generated=(2, 5), frequency_penalty=0.5)
    row = draws.prepare([whole(live)], {}).columns
    slot = int(row.slot)
    assert seen(draws, slot) == {1: 1, 2: 3, 5: 2}
    assert row.newest.tolist() == [NO_TOKEN]
    # The step after does not know the token, the one after that does.
    row = draws.prepare([newest(live, is_fed=True)], {"a": 6}).columns
    assert (row.newest.tolist(), row.slot.tolist(), row.position.tolist()) == ([~6], [slot], [6])
    live.token_ids += [8, 9]
    assert draws.prepare([newest(live)], {}).columns.newest.tolist() == [9]
    assert seen(draws, slot) == {1: 1, 2: 3, 5: 2}
    # Preempted, it computes all of its tokens, of which the last one was not counted.
    live.token_ids.append(10)
    assert draws.prepare([whole(live)], {}).columns.newest.tolist() == [10]
    # Taken up after steps that were lost, it is counted anew.
    del live.token_ids[4:]
    assert draws.prepare([whole(live)], {}).columns.newest.tolist() == [NO_TOKEN]
    assert seen(draws, slot) == {1: 1, 2: 3}
    draws.forget("a")
    again = draws.prepare([whole(sequence("a", (3,), frequency_penalty=0.5))], {}).columns
    assert seen(draws, int(again.slot)) == {3: 1}


def test_the_slot_used_longest_ago_is_taken_and_what_it_held_comes_back() -> None:
    draws = DeviceDraws(BestSampler(2, VOCAB))
    one, two, three = (sequence(n, (i,), presence_penalty=1.0) for i, n in enumerate("abc"))
    draws.prepare([whole(one), whole(two)], {})
    for live in (one, two):
        live.token_ids.append(20)
    # The first in the plan needs a slot, and does not get the one of the other, whose token the device has.
    row = draws.prepare([whole(three), newest(one)], {}).columns
    assert sorted(row.slot.tolist()) == [0, 1]
    assert row.newest.tolist() == [NO_TOKEN, 20]
    row = draws.prepare([newest(two)], {}).columns
    assert row.newest.tolist() == [NO_TOKEN]
    assert seen(draws, int(row.slot)) == {1: 1, 20: 2}


class Odd:
    def __init__(self, num_words: int = 2) -> None:
        self.num_words = num_words

    def bits(self, token_ids: Seq[int]) -> bytes:
        return b"\xaa" * 4 * self.num_words


def test_a_mask_lies_in_its_row_and_one_that_cannot_be_made_fails_its_sequence() -> None:
    draws = DeviceDraws(BestSampler(3, VOCAB))
    plain, good, bad = (sequence(n) for n in "abc")
    good.token_mask, bad.token_mask = Odd(), Odd(3)
    found = draws.prepare([whole(plain), whole(good), whole(bad)], {})
    assert found.columns.is_masked.tolist() == [0, 1, 0]
    assert draws.sampler.masks[1].tolist() == [-0x55555556] * 2
    assert list(found.failed) == ["c"]
    assert isinstance(found.failed["c"], ValueError)


@pytest.mark.parametrize(
    ("drawn", "error", "words"), [(-1, BadLogits, "NaN"), (-2, InvalidRequest, "the best logit is -inf")]
)
def test_what_was_not_drawn_fails_alone(drawn: int, error: type[Exception], words: str) -> None:
    result = drawn_results([sequence("a"), sequence("b")], [drawn, 5], {})
    assert result.sampled["b"].token_ids == (5,)
    assert isinstance(result.failed["a"], error)
    assert words in str(result.failed["a"])
