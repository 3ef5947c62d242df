"""The sampling kernel of `bench.gpu`: greedy, plain and top-p rows; the host's sampler says what is right."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from baton.types import SamplingParams
from bench.cases import generator_on
from bench.gpu_measure import Device, Peer, Work
from bench.gpu_sizes import Sizes
from engine.kernels.interface import Draws
from engine.kernels.triton.sampling import sample
from engine.sampler import draw, uniform

_KINDS = (("greedy", 0.0, 0, 1.0), ("plain", 1.0, 0, 1.0), ("top-p", 0.8, 50, 0.9))


def works(sizes: Sizes, device: Device) -> Iterator[Work]:
    for rows in (2,) if sizes.name == "tiny" else (1, 64, 256):
        for name, temperature, top_k, top_p in _KINDS:
            params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
            draws = Draws(
                torch.full((rows,), temperature, dtype=torch.float64, device=device.torch),
                torch.full((rows,), top_k, dtype=torch.int32, device=device.torch),
                torch.full((rows,), top_p, dtype=torch.float64, device=device.torch),
                torch.zeros(rows, dtype=torch.float64, device=device.torch),
                torch.arange(rows, device=device.torch),
                torch.arange(rows, device=device.torch),
            )
            num_bytes = rows * sizes.vocabulary * 4
            yield Work(
                f"sampling, {name}",
                f"{rows} x {sizes.vocabulary}",
                partial(_logits, device, rows, sizes.vocabulary),
                partial(sample, draws=draws),
                {"torch_argmax": Peer(lambda logits: logits.argmax(-1))} if params.is_greedy else {},
                partial(_drawn, params),
                bytes=num_bytes,
                input_bytes=num_bytes,
                dtype="float32",
            )


def _logits(device: Device, rows: int, vocabulary: int, seed: int) -> Tensor:
    generator = generator_on(device.torch, seed)
    return torch.randn(rows, vocabulary, generator=generator, device=device.torch, dtype=torch.float32) * 4


def _drawn(params: SamplingParams, logits: Tensor) -> Tensor:
    """What the engine's sampler draws for row i of seed i at position i."""
    if params.is_greedy:
        return logits.argmax(-1).double()
    rows = logits.cpu().numpy()
    tokens = [draw(row, params, uniform(i, i)) for i, row in enumerate(rows)]
    return torch.tensor(tokens, dtype=torch.float64, device=logits.device)
