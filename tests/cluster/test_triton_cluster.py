"""A split cluster on Triton's kernels, under the interpreter: greedy float32 tokens equal those of transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.cluster import StartCluster, layerwise_from_kib
from tests.support.load import Job, run_all
from tests.support.models import ORACLE_CASES, VOCAB_SIZE
from tests.support.oracle import expected_tokens

pytest.importorskip("triton", reason="triton is only for Linux")
NEW_TOKENS = 4
# Within a block and across its edge; the last is long enough to be pushed layer by layer. A token takes the interpreter
# tens of milliseconds, and on one node it is compared in every run (tests/kernels).
LENGTHS = (2, 63, 65, 270)
FEW = (2, 65, 130)


@pytest.mark.parametrize("lengths", [FEW, pytest.param(LENGTHS, marks=pytest.mark.long)], ids=["few", "more"])
async def test_split_tokens_equal_transformers(
    start_cluster: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    case = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32")
    folder = case.save(tmp_path / "model")
    cluster = start_cluster(
        folder,
        prefill=1,
        decode=1,
        dtype="float32",
        arguments=("--kernels", "triton", "--layerwise-from-kib", str(layerwise_from_kib(case, num_blocks=3))),
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
    answers = await run_all(cluster.http, [Job(p, NEW_TOKENS, {"ignore_eos": True}) for p in prompts], concurrency=4)
    cluster.wait_baseline()
    assert [a.error for a in answers] == [None] * len(prompts)
    expected = expected_tokens(folder, case, prompts, NEW_TOKENS)
    for prompt, answer, tokens in zip(prompts, answers, expected, strict=True):
        assert answer.token_ids == tokens, f"{len(prompt)} prompt tokens"
        assert answer.relay["prefill_node_id"] != answer.relay["decode_node_id"]
    assert {a.relay["transfer"]["layerwise"] for a in answers if a.relay["transfer"]} == {False, True}
    assert all(node.node.kernels.startswith("triton-") for node in cluster.status().nodes)
