"""Tokens drawn on the device against engine.sampler, which is the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baton.types import SamplingParams
from engine.kernels.interface import Draws
from engine.kernels.triton.sampling import sample
from engine.sampler import draw, uniform
from tests.kernels.device import DEVICE


def draws(params: list[SamplingParams], positions: list[int]) -> Draws:
    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    seeds = torch.from_numpy(np.array([p.seed or 0 for p in params], dtype=np.uint64).view(np.int64))
    return Draws(
        temperature=column([p.temperature for p in params], torch.float64),
        top_k=column([p.top_k for p in params], torch.int32),
        top_p=column([p.top_p for p in params], torch.float64),
        min_p=column([p.min_p for p in params], torch.float64),
        seed=seeds,
        position=column(positions, torch.int64),
    )


def expected(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    if params.is_greedy:
        return int(logits.argmax())
    return draw(logits.numpy(), params, uniform(params.seed or 0, position))


def check(logits: torch.Tensor, params: list[SamplingParams], positions: list[int]) -> None:
    wanted = [expected(row, p, at) for row, p, at in zip(logits, params, positions, strict=True)]
    assert sample(logits, draws(params, positions)).tolist() == wanted


KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 90, "min_p": 0.5},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("size", "rows"), [(63, 2), (2500, 1)])
def test_every_way_to_draw(size: int, rows: int, kind: dict[str, float]) -> None:
    logits = torch.randn(rows, size, generator=torch.Generator(DEVICE).manual_seed(size)) * 3
    params = [SamplingParams(seed=2**64 - 1 - i, **kind) for i in range(rows)]  # type: ignore[arg-type]
    check(logits, params, [2**33 + 7, 500][:rows])


def test_equal_logits_are_taken_by_id() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randint(-2, 3, (8, 300), generator=generator).float()
    logits[0] = 0.0
    logits[1, ::2] = -0.0
    params = [
        SamplingParams(seed=i, top_k=top_k, top_p=top_p)
        for i, (top_k, top_p) in enumerate([(7, 1.0), (80, 0.5), (0, 0.5), (100, 0.9)] * 2)
    ]
    check(logits, params, list(range(8)))
    check(logits, [SamplingParams(temperature=0.0)] * 8, [0] * 8)


def test_a_vocabulary_of_one() -> None:
    check(torch.zeros(2, 1), [SamplingParams(seed=1), SamplingParams(seed=1, top_p=0.5)], [0, 1])


def test_tokens_without_mass_are_never_drawn() -> None:
    logits = torch.full((2, 200), torch.finfo(torch.float32).min)
    logits[:, 150:153] = torch.tensor([1.0, 1.5, 0.5])
    check(logits, [SamplingParams(seed=3, top_p=0.999), SamplingParams(seed=4, top_k=100)], [5, 6])


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = torch.randn(4, 700)
    params = [SamplingParams(seed=i, **kind) for i, kind in enumerate(KINDS[1:8:2])]  # type: ignore[arg-type]
    whole = sample(logits, draws(params, [9] * 4))
    for i in range(4):
        assert sample(logits[i : i + 1], draws(params[i : i + 1], [9])).tolist() == [int(whole[i])]
    assert sample(logits[:0], draws([], [])).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 70, 2499, slice(None)], ids=str)
def test_a_row_that_is_not_finite_has_no_token(bad: float, place: int | slice) -> None:
    """In the first block, the last one, everywhere; its neighbours draw what they draw without it."""
    logits = torch.randn(4, 2500, generator=torch.Generator(DEVICE).manual_seed(5))
    params = [SamplingParams(temperature=0.0), *(SamplingParams(seed=3, top_k=top_k) for top_k in (0, 5, 0))]
    wanted = [expected(row, p, 9) for row, p in zip(logits, params, strict=True)]
    for row in range(4):
        spoiled = logits.clone()
        spoiled[row, place] = bad
        assert sample(spoiled, draws(params, [9] * 4)).tolist() == [*wanted[:row], -1, *wanted[row + 1 :]]
