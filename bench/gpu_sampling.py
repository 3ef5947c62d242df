"""The sampling cases of `bench.gpu`: common parameters in batches of 1, 64 and 256, checked against the host's sampler.

Each row states its minimum traffic: the passes over the logits, without intermediate results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from baton.types import SamplingParams, SequenceSpec
from bench.gpu_measure import Device, Peer, Work
from engine.draws import DeviceDraws
from engine.kernels.cases import generator_on
from engine.kernels.interface import REPORT_TOP, Draws
from engine.kernels.triton.sampling import TritonSampler
from engine.mass import reported_mass
from engine.sampler import Sampler
from engine.step import Piece, Sequence

_PROMPT = tuple(range(3, 40))
# Bytes per logit that are read or written in all chunks of a row, if the bound of top_p lies in some of them only.
KINDS: Mapping[str, tuple[dict[str, object], int]] = {
    "greedy": ({"temperature": 0.0}, 4),
    "plain": ({}, 8),
    "top-p": ({"temperature": 0.8, "top_p": 0.9}, 8),
    "top-k and top-p": ({"temperature": 0.8, "top_k": 50, "top_p": 0.9}, 8),
    # Logits and counts in; a copy out, which is read again.
    "penalties": ({"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {7: 2.0}}, 24),
    "logprobs": ({"logprobs": 5}, 12),
}


def works(vocab_size: int, device: Device, batches: tuple[int, ...]) -> Iterator[Work]:
    for rows in batches:
        device_draws = DeviceDraws(TritonSampler(rows, vocab_size, torch.device(device.torch)))
        for name, (options, logit_bytes) in KINDS.items():
            sequences = [_sequence(f"{name}/{i}", i, options) for i in range(rows)]
            columns = device_draws.prepare([Piece(s, 0, len(_PROMPT), samples=True) for s in sequences], {}).columns
            draws = Draws(*(column.to(device.torch) for column in columns))
            num_bytes = rows * vocab_size * logit_bytes
            yield Work(
                f"sampling, {name}",
                f"{rows} x {vocab_size}",
                partial(_logits, device, rows, vocab_size),
                partial(_draw, device_draws, draws, name == "logprobs"),
                _peers(name),
                partial(_expected, sequences, name == "logprobs"),
                bytes=num_bytes,
                input_bytes=rows * vocab_size * 4,
                dtype="float32",
            )


def _peers(name: str) -> dict[str, Peer]:
    """Sampling as engines do it with torch operations."""
    if name == "greedy":
        return {"torch_argmax": Peer(lambda logits: logits.argmax(-1))}
    if name == "plain":
        return {"torch_multinomial": Peer(lambda logits: torch.multinomial(logits.softmax(-1), 1))}
    return {"torch_sort_top_p": Peer(_torch_top_p)} if name == "top-p" else {}


def _torch_top_p(logits: Tensor) -> Tensor:
    values, ids = (logits / 0.8).sort(dim=-1, descending=True)
    masses = values.softmax(-1)
    masses = masses.masked_fill(masses.cumsum(-1) - masses > 0.9, 0.0)
    return ids.gather(-1, torch.multinomial(masses, 1))


def _sequence(name: str, seed: int, options: Mapping[str, object]) -> Sequence:
    params = SamplingParams(seed=seed, max_tokens=9, **options)  # type: ignore[arg-type]
    return Sequence(SequenceSpec(name, _PROMPT, params))


def _logits(device: Device, rows: int, vocab_size: int, seed: int) -> Tensor:
    """Logits with a realistic spread, so that the bound of top_p lies among thousands of values."""
    generator = generator_on(device.torch, seed)
    return torch.randn(rows, vocab_size, generator=generator, device=device.torch, dtype=torch.float32) * 3


def _draw(draws: DeviceDraws, columns: Draws, is_reporting: bool, logits: Tensor) -> Tensor:
    draws.sampler.draw(logits, columns, draws.drawn)
    return draws.sampler.report[: len(logits)] if is_reporting else draws.drawn[: len(logits)]


def _expected(sequences: list[Sequence], is_reporting: bool, logits: Tensor) -> Tensor:
    values = logits.cpu()
    sampled = Sampler(values.shape[-1]).sample(values, sequences).sampled
    token_ids = [sampled[s.sequence_id].token_ids[0] for s in sequences]
    if not is_reporting:
        return torch.tensor(token_ids, dtype=torch.float64, device=logits.device)
    reports = [
        _report(row.numpy(), token_id, [t.token_id for t in logprobs[0].top])
        for row, token_id, s in zip(values, token_ids, sequences, strict=True)
        if (logprobs := sampled[s.sequence_id].logprobs)
    ]
    return torch.tensor(reports, dtype=torch.float64, device=logits.device)


def _report(row: np.ndarray, token_id: int, top: list[int]) -> list[int]:
    """A report as in interface.REPORT_WORDS."""
    bits = row.view(np.int32)
    nothing = int(np.float32(-np.inf).view(np.int32))
    rest = REPORT_TOP - len(top)
    rank = int((row > row[token_id]).sum()) + 1
    found = [reported_mass(row, row.max()), rank, int(bits[row.argmax()]), int(bits[token_id])]
    return [*found, *top, *[-1] * rest, *(int(bits[i]) for i in top), *[nothing] * rest]
