"""The sizes of the GPU benchmark: the layers of Llama-3-8B and Qwen3-0.6B, and small odd ones in every dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.kernels.cases import Shape


@dataclass(frozen=True, slots=True)
class Sizes:
    """One size of the whole benchmark."""

    name: str
    dtype: torch.dtype
    shape: Shape
    hidden: int
    inner: int
    vocabulary: int
    num_layers: int
    has_qk_norm: bool
    prefill: tuple[tuple[int, int], ...]  # (sequences, tokens)
    chunked: tuple[tuple[int, int], ...]  # (tokens, context before them)
    decode: tuple[tuple[int, int], ...]  # (rows, context)
    prefixes: tuple[tuple[int, int, int], ...]  # (rows, prefix, suffix)
    rows: tuple[int, ...]
    pointwise_rows: tuple[int, ...]
    copied_tokens: tuple[int, ...]
    block_tokens: tuple[int, ...]
    # Whole steps: (rows, context) of a decode; tokens of a prompt.
    steps: tuple[tuple[int, int], ...]
    prompt: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


LLAMA_8B = Sizes(
    "8B", torch.bfloat16, Shape(32, 8, 128), 4096, 14336, 128256, 32, False,
    prefill=((8, 2048), (4, 4096), (2, 8192), (1, 16384)),
    chunked=((2048, 8192), (2048, 32768)),
    decode=((1, 4096), (64, 4096), (1, 1024), (1, 32768), (8, 4096), (32, 4096), (64, 8192), (256, 1024)),
    prefixes=((64, 8192, 256), (16, 512, 256), (128, 2048, 256)),
    rows=(1, 64, 4096, 16, 128, 1024, 8192),
    pointwise_rows=(1, 64, 16384),
    copied_tokens=(1024, 32768),
    block_tokens=(64, 16),
    steps=((1, 1024), (64, 4096)),
    prompt=8192,
)  # fmt: skip
QWEN_06B = Sizes(
    "0.6B", torch.bfloat16, Shape(16, 8, 128), 1024, 3072, 151936, 28, True,
    prefill=((4, 2048),), chunked=((512, 2048),), decode=((1, 1024), (64, 1024)), prefixes=((16, 512, 256),),
    rows=(1, 64, 2048), pointwise_rows=(1, 64), copied_tokens=(1024,), block_tokens=(64,),
    steps=((1, 1024), (64, 1024)),
    prompt=8192,
)  # fmt: skip
# One in each dtype, with odd shapes.
TINY = tuple(
    Sizes(
        "tiny", dtype, shape, 84, 40, 70, 2, False,
        prefill=((2, 20), (1, 63)), chunked=((9, 30),), decode=((1, 1), (3, 63), (2, 300)), prefixes=((3, 256, 5),),
        rows=(1, 63, 70), pointwise_rows=(3,), copied_tokens=(33,), block_tokens=(64, 16),
        steps=((2, 40),), prompt=30,
    )
    for dtype, shape in (
        (torch.float32, Shape(4, 2, 16)), (torch.float16, Shape(7, 1, 80)), (torch.bfloat16, Shape(3, 1, 96)),
    )
)  # fmt: skip


def _served(name: str, dtype: torch.dtype, shape: Shape, hidden: int, inner: int, vocabulary: int) -> Sizes:
    return Sizes(
        name, dtype, shape, hidden, inner, vocabulary, 2, False,
        # One for each kind of launch: tiles of few, of some and of many rows; with and without parts to combine.
        prefill=((1, 63),), chunked=(), decode=((1, 63), (3, 700)), prefixes=(), rows=(1, 17, 33, 700),
        pointwise_rows=(3,), copied_tokens=(), block_tokens=(64,), steps=(), prompt=1,
    )  # fmt: skip


# Models that stages run only as a whole: their kernels are compiled ahead, too.
FAMILY_SHAPE = Shape(8, 2, 128)
SERVED = (
    *(_served("families", t, FAMILY_SHAPE, 256, 384, 997) for t in (torch.float32, torch.bfloat16)),
    *(_served("demo", t, Shape(4, 2, 32), 128, 320, 2867) for t in (torch.float32, torch.bfloat16)),
    *(
        replace(_served("0.6B", t, QWEN_06B.shape, 1024, 3072, 151936), has_qk_norm=True)
        for t in (torch.bfloat16, torch.float16, torch.float32)
    ),
    _served("0.25B", torch.bfloat16, Shape(16, 4, 64), 1024, 2816, 32000),
)
