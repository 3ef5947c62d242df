"""Biases, bans, penalties, masks and log-probabilities on the device against engine.sampler, step by step."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import pytest
import torch

from baton.types import SamplingParams, SequenceSpec
from engine.draws import DeviceDraws, drawn_results
from engine.kernels.interface import Draws
from engine.kernels.triton.sampling import TritonSampler
from engine.sampler import Sampler
from engine.step import Piece, Sequence, StepResult

# Three chunks, the last one short.
VOCAB, CHUNK = 300, 128


class Drawing:
    """Sequences that draw from logits that are given, on the device and on the host."""

    def __init__(self, sequences: Seq[Sequence]) -> None:
        self.sequences = [*sequences]
        self.device = DeviceDraws(TritonSampler(len(sequences), VOCAB, torch.get_default_device(), chunk=CHUNK))
        self.host = Sampler(VOCAB)
        self.rows: dict[str, int] = {}

    def step(self, logits: torch.Tensor, *, is_first: bool = False, is_fed: bool = False) -> StepResult:
        """On the device; fed with what the step before drew there, where the host knows it as well."""
        pieces = [
            Piece(s, 0, len(s.token_ids), samples=True)
            if is_first
            else Piece(s, len(s.token_ids) - (not is_fed), 1, samples=True)
            for s in self.sequences
        ]
        prepared = self.device.prepare(pieces, self.rows)
        device = self.device.drawn.device
        draws = Draws(*(column.to(device) for column in prepared.columns))
        self.device.sampler.draw(logits.to(device), draws, self.device.drawn)
        self.rows = {s.sequence_id: i for i, s in enumerate(self.sequences)}
        asked = [i for i, s in enumerate(self.sequences) if s.spec.sampling.logprobs is not None]
        reports = {i: self.device.sampler.report[i].cpu().numpy() for i in asked}
        return drawn_results(self.sequences, self.device.drawn.tolist(), reports)

    def check(self, logits: torch.Tensor, found: StepResult) -> None:
        wanted = self.host.sample(logits.clone(), self.sequences)
        # Not their index: a token that is on the device is not yet counted when the device is asked.
        assert {name: (c.token_ids, c.logprobs) for name, c in found.sampled.items()} == {
            name: (c.token_ids, c.logprobs) for name, c in wanted.sampled.items()
        }
        assert {k: (type(e), str(e)) for k, e in found.failed.items()} == {
            k: (type(e), str(e)) for k, e in wanted.failed.items()
        }

    def append(self, result: StepResult) -> None:
        for s in self.sequences:
            s.token_ids += result.sampled[s.sequence_id].token_ids


class EverySeventh:
    def bits(self, token_ids: Seq[int]) -> bytes:
        allowed = np.zeros(-(-VOCAB // 32) * 32, dtype=np.uint8)
        allowed[len(token_ids) % 7 : VOCAB : 7] = 1
        return np.packbits(allowed, bitorder="little").tobytes()


KINDS: list[dict[str, object]] = [
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "frequency_penalty": 0.3, "presence_penalty": -0.7, "top_p": 0.8, "logprobs": 5},
    {"logit_bias": {0: 3.0, 127: 2.5, 128: -100.0, 299: 4.0}, "frequency_penalty": 1.1},
    {"min_tokens": 2, "stop_token_ids": tuple(range(0, 300, 2)), "logit_bias": {4: 50.0, 5: 7.0}, "top_k": 30},
    {"temperature": 0.0, "logprobs": 0},
    {"logprobs": 20, "min_p": 0.05},
    {"temperature": 0.8, "presence_penalty": 2.0, "top_k": 50, "top_p": 0.9},
]  # fmt: skip


def live(i: int, kind: dict[str, object]) -> Sequence:
    params = SamplingParams(**{"seed": i, "max_tokens": 20, **kind})  # type: ignore[arg-type]
    return Sequence(SequenceSpec(f"s{i}", (i, 5, 130, 5), params, (7, 290)[: i % 3]))


def test_steps_change_and_report_as_the_host_does() -> None:
    """Known tokens and tokens that only the device has, and ties: logits are rounded."""
    drawing = Drawing([live(i, kind) for i, kind in enumerate(KINDS)])
    masked = drawing.sequences[-1]
    generator = torch.Generator("cpu").manual_seed(3)
    results = []
    for at in range(4):
        masked.token_mask = EverySeventh() if at in (1, 3) else None
        logits = (torch.randn(len(KINDS), VOCAB, generator=generator, device="cpu") * 4).round() / 2
        # A step that is launched before the result of the one before it is taken.
        found = drawing.step(logits, is_first=at == 0, is_fed=at == 2)
        if at == 2:
            drawing.append(results[-1])
        drawing.check(logits, found)
        results.append(found)
        if at != 1:
            drawing.append(found)
    assert all([len(report.top) for report in r.sampled["s1"].logprobs] == [5] for r in results)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_rows_without_a_token_say_why() -> None:
    kinds: list[dict[str, object]] = [
        {"min_tokens": 1, "stop_token_ids": tuple(range(VOCAB)), "logprobs": 1},
        {"repetition_penalty": 0.01, "temperature": 0.0},
        {"repetition_penalty": 1.5, "logprobs": 3},
        {"logit_bias": {3: 1.0}},
    ]
    drawing = Drawing([live(i, kind) for i, kind in enumerate(kinds)])
    logits = torch.full((4, VOCAB), 3e37, device="cpu")
    logits[2, 200] = float("nan")
    logits[3, 200] = float("-inf")
    found = drawing.step(logits, is_first=True)
    drawing.check(logits, found)
    assert list(found.failed) == ["s0", "s1", "s2", "s3"]
