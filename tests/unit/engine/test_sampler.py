"""Sampling: each filter does what it says, numbers come from (seed, position), rows are independent bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BadLogits, InvalidRequest
from baton.types import SamplingParams, SequenceSpec
from engine.sampler import Sampler, draw, logprobs, uniform
from engine.step import Piece, Sequence, StepResult

VOCAB = 97


def sequence(name: str = "a", prompt: tuple[int, ...] = (1, 2), generated: tuple[int, ...] = (), **options: object):
    params = SamplingParams(**{"max_tokens": 50, "seed": 7, **options})  # type: ignore[arg-type]
    return Sequence(SequenceSpec(name, prompt, params, generated))


def sample_one(logits: torch.Tensor, live: Sequence) -> int:
    return Sampler(logits.shape[-1]).sample(logits[None], [live]).sampled[live.sequence_id].token_ids[0]


def test_uniform_is_philox_with_known_answers() -> None:
    # Random123's known answers for philox4x32-10: counter 0, key 0.
    assert uniform(0, 0) == ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) * 2.0**-53
    assert uniform(5, 3) != uniform(3, 5)
    assert uniform(2**64 - 1, 10) != uniform(2**32 - 1, 10)


def test_uniform_is_uniform() -> None:
    numbers = np.array([uniform(42, i) for i in range(4000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    # Chi-squared with 19 degrees of freedom: 43.8 is the 0.1 % point.
    assert ((counts - 200) ** 2 / 200).sum() < 43.8


def test_frequencies_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))
    tokens = [draw(logits, SamplingParams(), uniform(1, i)) for i in range(4000)]
    assert np.bincount(tokens, minlength=4) / 4000 == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.03)


@given(
    st.integers(0, 2**32),
    st.floats(0.05, 5),
    st.integers(0, 12),
    st.floats(0.05, 1),
    st.floats(0, 0.5),
    st.floats(0, 0.999999),
)
def test_filters_match_their_definition(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, number: float
) -> None:
    logits = np.random.default_rng(seed).normal(size=40).astype(np.float32).round(1)  # rounded: ties occur
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    token = draw(logits, params, number)
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = sorted(range(40), key=lambda i: (-p[i], i))
    if min_p > 0:
        order = [i for i in order if p[i] >= min_p * p.max() * (1 - 1e-6)]
    order = order[: top_k or None]
    mass = np.cumsum(p[order]) / p[order].sum()
    allowed = order if top_p == 1 else order[: int((mass < top_p - 1e-9).sum()) + 2]
    assert token in allowed


class Allowing:
    is_ready = follows_tokens = True

    def __init__(self, flags: np.ndarray) -> None:
        self._bits = np.packbits(flags, bitorder="little").tobytes()

    def is_over(self, token_ids: object) -> bool:
        return False

    def bits(self, token_ids: object) -> bytes:
        return self._bits


@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.02, 0.4, 0.6, 0.98, 1.0]),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.0, 0.7, 3.0]),
            "top_k": st.integers(0, 9),
            "top_p": st.sampled_from([0.3, 0.9, 1.0]),
            "min_p": st.sampled_from([0.0, 0.2]),
            "frequency_penalty": st.just(1.5),
            "logit_bias": st.just({3: 2.0, 5: -9.0}),
        },
    ),
)
def test_a_mask_draws_what_minus_infinity_for_the_others_draws(
    seed: int, share: float, options: dict[str, object]
) -> None:
    rng = np.random.default_rng(seed)
    flags = rng.random(VOCAB) < share
    logits = rng.normal(size=VOCAB).astype(np.float32).round(1)
    live = sequence(generated=(4, 4, 9), **options)
    live.token_mask = Allowing(flags)
    found = Sampler(VOCAB).sample(torch.from_numpy(logits)[None], [live])
    if not flags.any():
        assert isinstance(found.failed["a"], InvalidRequest)
        return
    params = live.spec.sampling
    changed = logits.copy()
    for token_id, bias in params.logit_bias.items():
        changed[token_id] += np.float32(bias)
    changed[[4, 9]] -= np.float32(params.frequency_penalty) * np.array([2, 1], dtype=np.float32)
    changed[~flags] = -np.inf
    number = uniform(7, len(live.token_ids))
    wanted = int(changed.argmax()) if params.is_greedy else draw(changed, params, number)
    assert found.sampled["a"].token_ids == (wanted,)


def test_top_p_looks_beyond_the_first_candidates() -> None:
    logits = np.zeros(3000, dtype=np.float32)
    assert draw(logits, SamplingParams(top_p=0.9), 0.9999) == 2699
    assert draw(logits, SamplingParams(top_p=0.9), 0.0) == 0


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(VOCAB)
    logits[[5, 9]] = 3
    assert sample_one(logits, sequence(temperature=0)) == 5


def test_top_k_one_is_greedy() -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    assert sample_one(logits, sequence(top_k=1)) == int(logits.argmax())


def test_bias_bans_and_min_tokens() -> None:
    logits = torch.zeros(VOCAB)
    logits[3] = 5
    assert sample_one(logits, sequence(temperature=0, logit_bias={8: 6})) == 8
    stop = {"temperature": 0, "stop_token_ids": (3,), "min_tokens": 2}
    assert sample_one(logits, sequence(**stop)) != 3
    assert sample_one(logits, sequence(generated=(4,), **stop)) != 3
    assert sample_one(logits, sequence(generated=(4, 4), **stop)) == 3


def test_penalties_count_prompt_and_output_as_they_should() -> None:
    logits = torch.zeros(VOCAB)
    logits[1], logits[2], logits[6] = 2.0, 1.9, 1.5
    # Repetition counts the prompt: 1 and 2 are halved.
    assert sample_one(logits, sequence(temperature=0, repetition_penalty=2)) == 6
    # Presence and frequency count output alone.
    assert sample_one(logits, sequence(temperature=0, presence_penalty=2)) == 1
    assert sample_one(logits, sequence(generated=(1,), temperature=0, presence_penalty=1)) == 2
    assert sample_one(logits, sequence(generated=(1, 2, 1), temperature=0, frequency_penalty=0.45)) == 6
    # A negative logit is multiplied.
    logits = torch.full((VOCAB,), -3.0)
    logits[1] = -2.0
    assert sample_one(logits, sequence(temperature=0, repetition_penalty=2)) == 0


def test_penalty_state_follows_the_tokens_also_when_a_sequence_starts_over() -> None:
    sampler, generator = Sampler(VOCAB), torch.Generator().manual_seed(3)
    live = sequence(repetition_penalty=1.5, frequency_penalty=0.5)
    for _ in range(6):
        logits = torch.randn(VOCAB, generator=generator)
        token = sampler.sample(logits[None], [live]).sampled["a"].token_ids[0]
        assert token == sample_one(logits, sequence(generated=tuple(live.token_ids[2:]), **_options(live)))
        live.token_ids.append(token)
    del live.token_ids[4:]
    logits = torch.randn(VOCAB, generator=generator)
    expected = sample_one(logits, sequence(generated=tuple(live.token_ids[2:]), **_options(live)))
    assert sampler.sample(logits[None], [live]).sampled["a"].token_ids[0] == expected
    sampler.forget("a")
    sampler.forget("never seen")
    assert sampler.sample(logits[None], [live]).sampled["a"].token_ids[0] == expected


def _options(live: Sequence) -> dict[str, object]:
    params = live.spec.sampling
    return {"repetition_penalty": params.repetition_penalty, "frequency_penalty": params.frequency_penalty}


def test_rows_do_not_see_each_other() -> None:
    logits = torch.randn(24, 5000, generator=torch.Generator().manual_seed(1)) * 3
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 0},
        {"top_p": 0.7},
        {"top_k": 40, "logprobs": 4},
        {"min_p": 0.05, "presence_penalty": 1.0},
        {"temperature": 0, "logprobs": 0, "logit_bias": {4: 3.0}},
    ]
    live = [sequence(f"s{i}", prompt=(i, i + 1), seed=i, **kinds[i % len(kinds)]) for i in range(24)]
    together = Sampler(5000).sample(logits, live)
    for i, one in enumerate(live):
        alone = Sampler(5000).sample(logits[i : i + 1].clone(), [one])
        assert alone.sampled[one.sequence_id] == together.sampled[one.sequence_id]


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)) * 4
    expected = torch.log_softmax(logits.double(), 0)
    found = logprobs(logits, 11, 5)
    assert found.chosen.logprob == pytest.approx(float(expected[11]), abs=1e-9)
    assert found.rank == int((logits > logits[11]).sum()) + 1
    assert [t.token_id for t in found.top] == logits.topk(5).indices.tolist()
    assert [t.logprob for t in found.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-9)
    assert math.isclose(sum(math.exp(t.logprob) for t in logprobs(logits, 0, 20).top), 1, abs_tol=0.2)
    assert logprobs(logits, 11, 0).top == ()


def test_nothing_to_sample() -> None:
    assert Sampler(VOCAB).sample(torch.empty(0, VOCAB), []) == StepResult()


KINDS: list[dict[str, object]] = [
    {"temperature": 0},
    {},
    {"top_p": 0.7, "top_k": 40, "min_p": 0.01},
    {"temperature": 0, "logprobs": 3},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {3: -100.0}},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("is_whole", [True, False], ids=["everywhere", "one"])
def test_logits_that_are_not_finite_fail_their_row_alone(kind: dict[str, object], bad: float, is_whole: bool) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    live = [sequence(f"s{i}", **kind) for i in range(3)]
    expected = Sampler(VOCAB).sample(logits.clone(), live).sampled
    logits[1, slice(None) if is_whole else 60] = bad
    found = Sampler(VOCAB).sample(logits, live)
    assert found.sampled == {name: expected[name] for name in ("s0", "s2")}
    assert list(found.failed) == ["s1"]
    assert isinstance(found.failed["s1"], BadLogits)
    assert "NaN or infinity" in found.failed["s1"].message


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"min_tokens": 1, "stop_token_ids": tuple(range(VOCAB))}, "min_tokens"),
        ({"repetition_penalty": 0.01, "logit_bias": {1: 1.0}}, "logit_bias and repetition_penalty"),
    ],
    ids=["all banned", "overflow"],
)
def test_parameters_that_leave_no_finite_logit_are_the_callers_mistake(
    temperature: float, options: dict[str, object], names: str
) -> None:
    logits = torch.full((1, VOCAB), 3e37)  # a hundred times that is infinite in float32
    found = Sampler(VOCAB).sample(logits, [sequence(temperature=temperature, **options)])
    assert found.sampled == {}
    assert isinstance(found.failed["a"], InvalidRequest)
    assert found.failed["a"].message.startswith(f"{names} leave no token to draw")
    assert "expected a finite number" in found.failed["a"].message
    assert found.failed["a"].param == names.split()[0]


def test_a_row_that_raises_fails_alone() -> None:
    logits = torch.zeros(2, VOCAB)
    # An id that no vocabulary has, where penalties look for what was seen.
    bad, good = sequence("bad", (VOCAB + 5,), repetition_penalty=2.0), sequence("good", temperature=0.0)
    found = Sampler(VOCAB).sample(logits, [bad, good])
    assert isinstance(found.failed["bad"], IndexError)
    assert set(found.sampled) == {"good"}


def test_positions_of_prompts_are_scored_behind_the_rows_that_sample() -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(6, VOCAB))).float()
    drawing, scored = sequence("a"), sequence("b", (5, 6, 7, 8), prompt_logprobs=2)
    spoilt = sequence("c", (1, 2, 3), prompt_logprobs=0)
    logits[5, 0] = math.inf
    pieces = [Piece(scored, 0, 3, samples=False, scored=range(3)), Piece(spoilt, 0, 2, samples=False, scored=range(2))]
    result = Sampler(VOCAB).sample(logits, [drawing], None, pieces)
    assert result.sampled["a"] == Sampler(VOCAB).sample(logits[:1], [drawing]).sampled["a"]
    assert result.scored == {"b": tuple(logprobs(logits[1 + i], token, 2) for i, token in enumerate((6, 7, 8)))}
    assert isinstance(error := result.failed["c"], BadLogits)
    assert "logits for token 2 of the sequence" in error.message
