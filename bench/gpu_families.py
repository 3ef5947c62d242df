"""Compares logits and greedy tokens on the device with transformers on the same device, for the demo model and a small
model of each family with random weights.

In float32 the tokens must be equal. In bfloat16 the logits must be as close to those in float32 as the logits of
transformers are.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.types import SamplingParams, SequenceSpec
from bench.gpu_cases import tuning_for
from bench.gpu_child import Context
from bench.gpu_measure import Case, Device, Task
from bench.gpu_model import WholeModel
from bench.gpu_sizes import FAMILY_SHAPE
from engine.kernels.cases import relative_error
from engine.model_config import ModelConfig
from engine.step import Piece
from engine.step import Sequence as Running
from engine.weights import Checkpoint

DEMO = Path(__file__).resolve().parents[1] / "demo" / "model"
# Tolerance: in float32 a share of the largest logit; in bfloat16 a multiple of the error of transformers.
_FLOAT32_ERROR, _TIMES_THEIRS = 2e-5, 2.0


@dataclass(frozen=True, slots=True)
class Family:
    """A small model; ``options`` go to the config of transformers. All families have one shape: shapes have cases of
    their own."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        import transformers

        config = getattr(transformers, f"{self.name}Config")(
            vocab_size=997, hidden_size=256, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=FAMILY_SHAPE.heads, num_key_value_heads=FAMILY_SHAPE.kv_heads,
            head_dim=FAMILY_SHAPE.head_dim,
            max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
            pad_token_id=None, **self.options,
        )  # fmt: skip
        model = getattr(transformers, f"{self.name}ForCausalLM")(config)
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            # Wide enough that the best logits are far apart and that missing norms and biases are noticed.
            parameter.data.copy_(1 + 0.2 * drawn if "norm" in name else 0.08 * drawn)
        model.save_pretrained(folder)
        return folder


FAMILIES = (
    Family("Llama"),
    Family("Mistral", {"sliding_window": 100}),
    Family("Qwen2"),
    Family("Qwen3"),
)


def cases(context: Context) -> Iterator[Case]:
    lengths = (70,) if context.is_tiny else (1, 63, 64, 65, 700)
    num_tokens = 2 if context.is_tiny else 12
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("demo", *(family.name for family in FAMILIES)):
            run = partial(_beside_transformers, name, dtype, context.device, lengths, num_tokens)
            yield Task(
                f"model, {name}", f"prompts of {', '.join(map(str, lengths))}", run, str(dtype).removeprefix("torch.")
            )


def _beside_transformers(
    name: str, dtype: torch.dtype, device: Device, lengths: tuple[int, ...], num_tokens: int
) -> dict[str, Any]:
    made = Path(tempfile.mkdtemp(prefix="baton-family-"))
    try:
        folder = DEMO if name == "demo" else next(f for f in FAMILIES if f.name == name).save(made / name)
        return _compared(folder, dtype, device, lengths, num_tokens)
    finally:
        shutil.rmtree(made)


def _compared(
    folder: Path, dtype: torch.dtype, device: Device, lengths: tuple[int, ...], num_tokens: int
) -> dict[str, Any]:
    """Baton generates; transformers reads prompt and answer at once and returns the token it would have chosen at each
    position."""
    import transformers

    with Checkpoint(folder) as checkpoint:
        config = checkpoint.check(ModelConfig.from_folder(folder))
        whole = WholeModel(config, checkpoint, dtype, tuning_for(device), device, max(lengths) + num_tokens)
    auto: Any = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(folder, dtype=dtype).to(device.torch).eval()
    ours_off, theirs_off, num_same = 0.0, 0.0, 0
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        prompt = torch.randint(1, config.vocab_size, (length,), generator=generator).tolist()
        ours, chosen = _generate(whole, prompt, num_tokens)
        read = torch.tensor([[*prompt, *chosen[:-1]]], device=device.torch)
        logits = theirs.to(dtype)(read).logits[0, length - 1 :].float()
        # The same weights without rounding between layers.
        wide = logits if dtype == torch.float32 else theirs.float()(read).logits[0, length - 1 :]
        ours_off = max(ours_off, relative_error(ours, wide))
        theirs_off = max(theirs_off, relative_error(logits, wide))
        num_same += sum(a == b for a, b in zip(chosen, logits.argmax(-1).tolist(), strict=True))
    share = num_same / (num_tokens * len(lengths))
    said = f"{share:.0%} of the tokens are the same"
    if dtype == torch.float32:
        return {"is_right": ours_off <= _FLOAT32_ERROR and share == 1, "error": ours_off, "said": said}
    is_close = ours_off <= _TIMES_THEIRS * theirs_off
    return {"is_right": is_close, "error": ours_off, "said": f"{said}; transformers is off by {theirs_off:.1e}"}


def _generate(whole: WholeModel, prompt: list[int], num_tokens: int) -> tuple[Tensor, list[int]]:
    """Logits [tokens, vocabulary] and the tokens that they are largest for."""
    spec = SequenceSpec("r", tuple(prompt), SamplingParams(max_tokens=num_tokens, seed=0))
    running = Running(spec)
    running.block_ids = [*range(whole.layout.blocks_for(len(prompt) + num_tokens))]
    found: list[Tensor] = []
    for _ in range(num_tokens):
        start, count = running.num_computed, len(running.token_ids) - running.num_computed
        # Cloned: the next step may overwrite them.
        found.append(whole.forward([Piece(running, start, count, samples=True)])[0].clone())
        running.num_computed += count
        running.token_ids.append(int(found[-1].argmax()))
    return torch.stack(found), running.token_ids[len(prompt) :]
