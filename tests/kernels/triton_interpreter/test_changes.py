"""Biases, bans, penalties, masks and log-probabilities on the device against engine.sampler, step by step."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import pytest
import torch

from baton.types import SamplingParams, SequenceSpec
from engine.draws import DeviceDraws, drawn_results, scored_tokens, take_scored
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


def test_positions_of_prompts_are_scored_as_on_the_host() -> None:
    """Rows of several prompts at once, ties, a row that is not finite, and memory that draws use too."""
    params = [SamplingParams(max_tokens=4, seed=0, prompt_logprobs=n) for n in (0, 3, 20, 1)]
    prompts = [tuple((7 * i + 3 * at) % VOCAB for at in range(6)) for i in range(4)]
    live = [Sequence(SequenceSpec(f"{i}", p, s)) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
    pieces = [Piece(s, i, 5 - i, samples=False, scored=range(i, 5)) for i, s in enumerate(live)]
    num_rows = sum(len(p.scored) for p in pieces)
    # Rounded: equal values occur.
    logits = torch.from_numpy(np.random.default_rng(3).normal(scale=3, size=(num_rows, VOCAB)).round(1)).float()
    logits[-1, VOCAB - 2] = float("nan")
    logits[0, prompts[0][1]] = -300.0
    sampler = TritonSampler(num_rows, VOCAB, torch.get_default_device(), chunk=CHUNK)
    device = sampler.masks.device
    draws = DeviceDraws(sampler)
    one = draws.prepare([Piece(live[0], 0, 6, samples=True)], {}).columns
    sampler.draw(logits[:1].to(device), Draws(*(column.to(device) for column in one)), draws.drawn)
    token_ids, num_top = (column.to(device) for column in scored_tokens(pieces))
    found = StepResult()
    take_scored(pieces, sampler.score(logits.to(device), token_ids, num_top).cpu().numpy(), found)
    wanted = Sampler(VOCAB).sample(logits.clone(), [], None, pieces)
    assert set(wanted.scored) == {"0", "1", "2"}
    assert found.scored == wanted.scored
    assert {k: str(e) for k, e in found.failed.items()} == {k: str(e) for k, e in wanted.failed.items()}
    assert "logits for token 5 of the sequence" in str(found.failed["3"])
