"""Tokens drawn on the device against engine.sampler, which is the truth."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest
import torch

from baton.types import SamplingParams
from engine.draws import Row, columns
from engine.kernels.interface import Draws
from engine.kernels.triton.sampling import TritonSampler
from engine.sampler import draw, uniform


def sample(logits: torch.Tensor, params: Seq[SamplingParams], positions: Seq[int], chunk: int = 1024) -> list[int]:
    device = torch.get_default_device()
    sampler = TritonSampler(len(params), logits.shape[-1], device, chunk=chunk)
    drawn = torch.full((len(params),), 77)
    draws = columns([Row.plain(p, at) for p, at in zip(params, positions, strict=True)])
    sampler.draw(logits.to(device), Draws(*(column.to(device) for column in draws)), drawn)
    return drawn.tolist()


def expected(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    if params.is_greedy:
        return int(logits.argmax())
    return draw(logits.numpy(), params, uniform(params.seed or 0, position))


def check(logits: torch.Tensor, params: Seq[SamplingParams], positions: Seq[int], chunk: int = 1024) -> None:
    wanted = [expected(row, p, at) for row, p, at in zip(logits, params, positions, strict=True)]
    assert sample(logits, params, positions, chunk) == wanted


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
    logits = torch.randn(rows, size, generator=torch.Generator("cpu").manual_seed(size), device="cpu") * 3
    params = [SamplingParams(seed=2**64 - 1 - i, **kind) for i in range(rows)]  # type: ignore[arg-type]
    check(logits, params, [2**33 + 7, 500][:rows])


def test_equal_logits_are_taken_by_id() -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    logits = torch.randint(-2, 3, (8, 300), generator=generator, device="cpu").float()
    logits[0] = 0.0
    logits[1, ::2] = -0.0
    params = [
        SamplingParams(seed=i, top_k=top_k, top_p=top_p)
        for i, (top_k, top_p) in enumerate([(7, 1.0), (80, 0.5), (0, 0.5), (100, 0.9)] * 2)
    ]
    check(logits, params, list(range(8)))
    check(logits, [SamplingParams(temperature=0.0)] * 8, [0] * 8)


def test_a_vocabulary_of_one() -> None:
    check(torch.zeros(2, 1, device="cpu"), [SamplingParams(seed=1), SamplingParams(seed=1, top_p=0.5)], [0, 1])


# Hardware makes infinity of it without a word, and so does the sampler.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_tokens_without_mass_are_never_drawn() -> None:
    logits = torch.full((2, 200), torch.finfo(torch.float32).min, device="cpu")
    logits[:, 150:153] = torch.tensor([1.0, 1.5, 0.5])
    check(logits, [SamplingParams(seed=3, top_p=0.999), SamplingParams(seed=4, top_k=100)], [5, 6])


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = torch.randn(4, 700, device="cpu")
    params = [SamplingParams(seed=i, **kind) for i, kind in enumerate(KINDS[1:8:2])]  # type: ignore[arg-type]
    whole = sample(logits, params, [9] * 4)
    for i in range(4):
        assert sample(logits[i : i + 1], params[i : i + 1], [9]) == whole[i : i + 1]
    assert sample(logits[:0], [], []) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_no_token(bad: float) -> None:
    """In the first chunk, inside it, in the last one, everywhere; the rows between them draw as they do alone."""
    logits = torch.randn(8, 2500, generator=torch.Generator("cpu").manual_seed(5), device="cpu")
    kinds = [SamplingParams(temperature=0.0), *(SamplingParams(seed=3, top_k=top_k) for top_k in (0, 5, 0))]
    params = [kind for kind in kinds for _ in range(2)]
    wanted = [expected(row, p, 9) for row, p in zip(logits, params, strict=True)]
    for row, place in zip((0, 3, 5, 6), (0, 70, 2499, slice(None)), strict=True):
        logits[row, place] = bad
        wanted[row] = -1
    assert sample(logits, params, [9] * 8) == wanted
