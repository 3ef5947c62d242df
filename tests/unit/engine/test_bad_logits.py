"""A sequence whose logits are NaN or infinite ends with an error that says so; its neighbours keep their tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.runner import Runner
from tests.support import bad_logits
from tests.support.bad_logits import BLOCK_TOKENS, CASE, NUM_BLOCKS

CONFIG = EngineConfig(dtype="float16", block_tokens=BLOCK_TOKENS, num_blocks=NUM_BLOCKS, kernels="cpu")
WEIGHTS = (
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return CASE.save(tmp_path / "model")


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_infinite_weight_fails_every_sequence_and_no_step(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[5] = torch.inf
    save_file(weights, folder / "model.safetensors")
    runner = Runner.load(folder, CONFIG)
    found = bad_logits.serve(runner, runner, bad_logits.specs())
    assert {name: code for name, (_, code) in found.items()} == dict.fromkeys(found, "BadLogits")
    assert all(tokens == [] for tokens, _ in found.values())


@pytest.mark.parametrize("victim", ["greedy", "seeded", "changed"])
def test_a_token_whose_embedding_is_nan_ends_those_that_meet_it_alone(folder: Path, victim: str) -> None:
    sequences = bad_logits.specs()
    runner = Runner.load(folder, CONFIG)
    clean = bad_logits.serve(runner, runner, sequences)
    token_id = bad_logits.token_to_spoil(clean, sequences, victim)
    bad_logits.spoil(folder, token_id)
    wanted = bad_logits.expected(clean, sequences, token_id)
    assert wanted[f"{victim}/0/0"][1] == "BadLogits"
    assert any(code == "" for _, code in wanted.values()), "some sequence goes on beside it"
    runner = Runner.load(folder, CONFIG)
    assert bad_logits.serve(runner, runner, sequences) == wanted


def test_a_prompt_with_such_a_token_has_no_first_token(folder: Path) -> None:
    sequences = bad_logits.specs()
    runner = Runner.load(folder, CONFIG)
    clean = bad_logits.serve(runner, runner, sequences)
    token_id = sequences[-1].prompt_token_ids[3]
    bad_logits.spoil(folder, token_id)
    runner = Runner.load(folder, CONFIG)
    found = bad_logits.serve(runner, runner, sequences)
    assert found == bad_logits.expected(clean, sequences, token_id)
    assert found["other-seeded/0/0"] == ([], "BadLogits")
