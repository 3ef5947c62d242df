"""Every served architecture, split over two nodes: greedy float32 tokens equal those of transformers' ``generate``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.cluster import StartCluster, layerwise_from_kib
from tests.support.load import Job, run_all
from tests.support.models import ORACLE_CASES, VOCAB_SIZE, ModelCase
from tests.support.oracle import expected_tokens

MAX_TOKENS = 12
# Either side of every kind of border: the first block's, later ones', and of the switch to layer-wise push below.
LENGTHS = (1, 2, 3, 62, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 320, 511, 512, 513, 767, 1000, 1279, 1280, 1500)
# Prompts of more than four blocks are pushed layer by layer, shorter ones in one go.
LAYERWISE_FROM_BLOCKS = 5
# One a transport: these run in every test run, all of them by `make test-long`. On one node every kind of model is
# compared in every run (tests/oracle).
EVERYDAY = ("mistral-window-40", "qwen3-llama3")


def prompts(case: ModelCase) -> list[list[int]]:
    """One prompt per length; lengths beyond the model's context are left out."""
    rng = random.Random(case.name)
    limit = case.config().max_position_embeddings - MAX_TOKENS
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS if length <= limit]


async def split_equals_oracle(start_cluster: StartCluster, case: ModelCase, transport: str, folder: Path) -> None:
    case.save(folder)
    asked = prompts(case)
    cluster = start_cluster(
        folder,
        prefill=1,
        decode=1,
        transport=transport,
        dtype="float32",
        arguments=("--layerwise-from-kib", str(layerwise_from_kib(case, LAYERWISE_FROM_BLOCKS))),
    )
    answers = await run_all(cluster.http, [Job(p, MAX_TOKENS, {"ignore_eos": True}) for p in asked], concurrency=8)
    cluster.wait_baseline()
    assert [a.error for a in answers] == [None] * len(asked)
    expected = expected_tokens(folder, case, asked, MAX_TOKENS)
    for prompt, answer, tokens in zip(asked, answers, expected, strict=True):
        assert answer.token_ids == tokens, f"{case.name}, {len(prompt)} prompt tokens"
        assert answer.relay["prefill_node_id"] != answer.relay["decode_node_id"]
    how = {a.relay["transfer"]["layerwise"] for a in answers if a.relay["transfer"]}
    assert how == {False, True}


def _everyday(name: str) -> ModelCase:
    return next(case for case in ORACLE_CASES if case.name == name)


@pytest.mark.parametrize("name", EVERYDAY)
async def test_split_tokens_equal_transformers(start_cluster: StartCluster, name: str, tmp_path: Path) -> None:
    transport = ("shm", "tcp")[EVERYDAY.index(name) % 2]
    await split_equals_oracle(start_cluster, _everyday(name), transport, tmp_path / "model")


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
async def test_split_tokens_of_every_model_equal_transformers(
    start_cluster: StartCluster, case: ModelCase, transport: str, tmp_path: Path
) -> None:
    await split_equals_oracle(start_cluster, case, transport, tmp_path / "model")
