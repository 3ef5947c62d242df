"""Greedy float32 tokens of the engine equal those of transformers' generate, for every kind of model served."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.runner import Runner
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE
from tests.support.oracle import expected_tokens

NEW_TOKENS = 6
BLOCK = 64


def prompt_lengths(index: int) -> list[int]:
    """One token, the edges of a block, and lengths that differ from case to case up to 1,500."""
    edges = [(1, BLOCK - 1, BLOCK, BLOCK + 1), (2, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1)][index % 2]
    # Tokens generated across a boundary, and contexts that outgrow windows and trained lengths.
    return [*edges, 3 * BLOCK - 3, (300, 517, 401, 777, 1024, 640, 1200, 1500)[index % 8]]


@pytest.mark.parametrize("index", range(len(ORACLE_CASES)), ids=[case.name for case in ORACLE_CASES])
def test_greedy_tokens_equal_transformers(index: int, tmp_path: Path) -> None:
    case = ORACLE_CASES[index]
    folder = case.save(tmp_path / case.name)
    prompts = [random_prompt(length, VOCAB_SIZE, index) for length in prompt_lengths(index)]
    driver = Driver(Runner.load(folder, EngineConfig(dtype="float32", num_blocks=40)))
    chunk = (1 << 30, 100, 64, 256)[index % 4]
    found = [driver.generate(spec("r", p, max_tokens=NEW_TOKENS), chunk=chunk).token_ids for p in prompts]
    assert found == expected_tokens(folder, case, prompts, NEW_TOKENS)


@pytest.mark.parametrize("name", ["llama-gqa4-d64", "mistral-window-40", "qwen2-dynamic", "qwen3-longrope"])
def test_reference_kernels_equal_transformers(name: str, tmp_path: Path) -> None:
    case = next(c for c in ORACLE_CASES if c.name == name)
    folder = case.save(tmp_path / case.name)
    prompts = [random_prompt(length, VOCAB_SIZE) for length in (1, 65, 270)]
    driver = Driver(Runner.load(folder, EngineConfig(dtype="float32", num_blocks=40, kernels="reference")))
    found = [driver.generate(spec("r", p, max_tokens=NEW_TOKENS)).token_ids for p in prompts]
    assert found == expected_tokens(folder, case, prompts, NEW_TOKENS)


def test_block_size_does_not_change_tokens(tmp_path: Path) -> None:
    case = ORACLE_CASES[1]
    folder = case.save(tmp_path / case.name)
    prompts = [random_prompt(length, VOCAB_SIZE) for length in (1, 15, 16, 17, 130)]
    expected = expected_tokens(folder, case, prompts, NEW_TOKENS)
    for block_tokens in (16, 32, 128):
        config = EngineConfig(dtype="float32", num_blocks=40, block_tokens=block_tokens)
        driver = Driver(Runner.load(folder, config))
        assert [driver.generate(spec("r", p, max_tokens=NEW_TOKENS)).token_ids for p in prompts] == expected
