"""Tokens drawn on the device from a vocabulary of a large model, bit for bit those of engine.sampler."""

from __future__ import annotations

import pytest
import torch

from baton.types import SamplingParams, SequenceSpec
from engine.draws import DeviceDraws, drawn_results
from engine.kernels.interface import Draws
from engine.kernels.triton.sampling import TritonSampler
from engine.sampler import Sampler
from engine.step import Piece, Sequence

VOCAB = 128_256


def logits_of(kind: str) -> torch.Tensor:
    values = torch.randn(VOCAB, generator=torch.Generator("cpu").manual_seed(6), device="cpu")
    if kind == "wide":
        return values * 3
    if kind == "peaked":
        # As a trained model has it: a few tokens far above the rest.
        values = values * 2 - 5
        values[100 :: VOCAB // 19] = torch.linspace(12, 19, 19, device="cpu")
        return values
    # Two values, more of each than are gathered.
    return (values > 1).float()


CASES: list[tuple[str, dict[str, object]]] = [
    ("wide", {"temperature": 0.0, "logprobs": 20}),
    ("wide", {}),
    ("wide", {"top_p": 0.95, "temperature": 0.8}),
    ("wide", {"min_p": 0.01, "top_k": 20_000}),
    ("peaked", {"top_p": 0.9}),
    ("peaked", {"top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2, "logprobs": 3}),
    ("even", {"top_p": 0.6}),
    ("even", {"top_k": 40_000, "top_p": 0.9}),
]


@pytest.mark.parametrize("half", [0, 1])
def test_a_large_vocabulary(half: int) -> None:
    """One batch, so that rows of every kind lie beside each other."""
    cases = CASES[half::2]
    sequences = [
        Sequence(SequenceSpec(f"s{i}", (5, 6, VOCAB - 1), SamplingParams(seed=i, max_tokens=5, **kind)))  # type: ignore[arg-type]
        for i, (_, kind) in enumerate(cases)
    ]
    logits = torch.stack([logits_of(name) for name, _ in cases])
    device = DeviceDraws(TritonSampler(len(cases), VOCAB, torch.get_default_device()))
    prepared = device.prepare([Piece(s, 0, 3, samples=True) for s in sequences], {})
    on = device.drawn.device
    device.sampler.draw(logits.to(on), Draws(*(column.to(on) for column in prepared.columns)), device.drawn)
    found = drawn_results(
        sequences,
        device.drawn.tolist(),
        {i: device.sampler.report[i].cpu().numpy() for i, (_, kind) in enumerate(cases) if "logprobs" in kind},
    )
    wanted = Sampler(VOCAB).sample(logits, sequences)
    assert found == wanted
    assert not found.failed
