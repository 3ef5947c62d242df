"""Whole models on Triton's kernels: tokens of transformers, the same logits in any batch, chunks and after a re-run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.runner import Runner
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE
from tests.support.oracle import expected_tokens

# A window; head norms. Group sizes and head_dims are the kernels' own tests.
CASES = ("mistral-window-40", "qwen3-llama3")


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    case = next(c for c in ORACLE_CASES if c.name == name)
    folder = case.save(tmp_path / name)
    prompts = [random_prompt(length, VOCAB_SIZE) for length in (1, 65)]
    driver = Driver(Runner.load(folder, EngineConfig(dtype="float32", num_blocks=20, kernels="triton")))
    found = [driver.generate(spec("r", p, max_tokens=3), chunk=40).token_ids for p in prompts]
    assert found == expected_tokens(folder, case, prompts, 3)


def test_logits_do_not_depend_on_batch_chunks_or_a_re_run(tmp_path: Path) -> None:
    case = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32")
    folder = case.save(tmp_path / "model")
    driver = Driver(Runner.load(folder, EngineConfig(dtype="bfloat16", num_blocks=20, kernels="triton")))
    prompt = random_prompt(70, VOCAB_SIZE)
    alone = driver.generate(spec("alone", prompt, max_tokens=4))
    chunked = driver.generate(spec("chunked", prompt, max_tokens=4), chunk=33)
    resumed = driver.generate(spec("resumed", prompt, generated=alone.token_ids[:2], max_tokens=4))
    for i, logits in enumerate(alone.logits):
        assert torch.equal(chunked.logits[i], logits)
        assert i < 2 or torch.equal(resumed.logits[i - 2], logits)
    pair = [driver.add(spec(name, prompt, max_tokens=4)) for name in ("one", "two")]
    other = driver.add(spec("other", random_prompt(9, VOCAB_SIZE), max_tokens=4))
    for step in range(2):
        _, logits_by_id = driver.step([driver.piece(s, 1000) for s in (other, *pair)])
        for sequence in pair:
            assert torch.equal(logits_by_id[sequence.sequence_id], alone.logits[step])
