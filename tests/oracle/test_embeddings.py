"""Embeddings of prompts: those of transformers' last hidden states, and the same bits however the prompt is cut."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.runner import Runner
from tests.support.engine_driver import Crowd, Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE

CASE = next(case for case in ORACLE_CASES if case.name == "qwen3-longrope")
PROMPT = random_prompt(150, VOCAB_SIZE, seed=6)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_prompt_is_embedded_as_by_transformers(pooling: str, kernels: str, tmp_path: Path) -> None:
    model = CASE.build().eval()
    with torch.inference_mode():
        hidden = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0]
    wanted = hidden.mean(0) if pooling == "mean" else hidden[-1]
    runner = Runner.load(
        CASE.save(tmp_path / "model"), EngineConfig(dtype="float32", num_blocks=160, kernels=kernels)
    )  # fmt: skip
    asked = spec("a", PROMPT, max_tokens=1, pooling=pooling)
    whole = Driver(runner).generate(asked).embedding
    assert struct.unpack(f"<{len(whole) // 4}f", whole) == pytest.approx(wanted.tolist(), abs=1e-4)
    for chunk in (1, 64):
        assert Driver(runner, chunk).generate(asked, chunk=chunk).embedding == whole
    beside = Driver(runner).generate(asked, chunk=33, neighbours=Crowd(3, VOCAB_SIZE))
    assert beside.embedding == whole
    assert beside.token_ids == Driver(runner).generate(spec("b", PROMPT, max_tokens=1)).token_ids
