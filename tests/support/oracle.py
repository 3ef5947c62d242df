"""What transformers' generate makes of a prompt, in float32 and greedily: what every path of ours is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from tests.support.models import ModelCase


def expected_tokens(
    folder: Path, case: ModelCase, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[list[int]]:
    """The tokens after each prompt; each prompt is alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = []
    for prompt in prompts:
        if case.is_length_dependent:
            # transformers keeps the longest length seen in the module; a request must not depend on earlier ones.
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            # With its own guess of the mask, generate would take every token 0 of the prompt for padding.
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0
            )
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens
