"""Tied or not, the file decides as it does in transformers: same logits' best tokens for every way to save a head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.errors import UnsupportedModel
from engine.config import EngineConfig
from engine.runner import Runner
from engine.weights import fingerprint
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE

CASE = next(case for case in ORACLE_CASES if case.name == "llama-gqa2-d32")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = EngineConfig(dtype="float32", num_blocks=8)
Tensors = dict[str, Tensor]


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda weights: {n: w for n, w in weights.items() if n != name}


def with_equal_head(weights: Tensors) -> Tensors:
    return {**weights, HEAD: weights[EMBEDDING].clone()}


def save(folder: Path, is_tied: bool, change: Callable[[Tensors], Tensors]) -> Path:
    CASE.save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": is_tied}))
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("is_tied", "change"),
    [
        (True, dict), (True, with_equal_head), (True, without(HEAD)), (True, without(EMBEDDING)),
        (False, dict), (False, with_equal_head),
    ],
    ids=["tied, another head", "tied, equal head", "tied, no head", "tied, head alone", "untied", "untied, equal"],
)  # fmt: skip
def test_the_head_is_the_one_that_transformers_takes(
    is_tied: bool, change: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", is_tied, change)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = random_prompt(20, VOCAB_SIZE)
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert Driver(Runner.load(folder, CONFIG)).generate(spec("a", prompt, max_tokens=12)).token_ids == expected


def test_untied_without_a_head_is_refused(tmp_path: Path) -> None:
    """Transformers draws one at random, with a warning."""
    with pytest.raises(UnsupportedModel, match=r"lack lm_head\.weight"):
        Runner.load(save(tmp_path / "model", False, without(HEAD)), CONFIG)


def test_a_head_that_differs_is_part_of_the_fingerprint_and_an_equal_one_is_not(tmp_path: Path) -> None:
    folders = [save(tmp_path / str(i), True, how) for i, how in enumerate((dict, with_equal_head, without(HEAD)))]
    other, equal, none = map(fingerprint, folders)
    assert equal == none != other
