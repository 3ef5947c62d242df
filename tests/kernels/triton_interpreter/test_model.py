"""Whole models on Triton's kernels: tokens of transformers, the same logits in any batch, chunks and after a re-run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.runner import Runner
from tests.engine_driver import Driver, random_prompt, spec
from tests.models import ORACLE_CASES, VOCAB_SIZE
from tests.oracle.test_engine_oracle import expected_tokens

# A window; head norms. Group sizes and head_dims are the kernels' own tests.
CASES = ("mistral-window-40", "qwen3-llama3")


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    case = next(c for c in ORACLE_CASES if c.name == name)
    folder = case.save(tmp_path / name)
    prompts = [random_prompt(length, VOCAB_SIZE) for length in (1, 65)]
    driver = Driver(Runner.load(folder, EngineConfig(dtype="float32", num_blocks=20, kernels="triton")))
    found = [driver.generate(spec("r", p, max_tokens=3), chunk=40).token_ids for p in prompts]
    assert found == [tokens[:3] for tokens in expected_tokens(folder, case, prompts)]


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


def test_a_step_recorded_or_not_is_the_same_step(tmp_path: Path) -> None:
    case = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32")
    folder = case.save(tmp_path / "model")
    kinds: list[dict[str, object]] = [{}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}, {"repetition_penalty": 1.3}]
    runs = []
    for max_graph_seqs in (4, 0):
        config = EngineConfig(dtype="bfloat16", num_blocks=20, kernels="triton", max_graph_seqs=max_graph_seqs)
        driver = Driver(Runner.load(folder, config))
        prompts = [random_prompt(n, VOCAB_SIZE) for n in (5, 66, 1)]
        sequences = [driver.add(spec(f"{i}", p, **kinds[i])) for i, p in enumerate(prompts)]
        steps = []
        for chosen in (sequences, sequences, sequences[:1]):
            steps.append(driver.step([driver.piece(s, 1000) for s in chosen]))
        graphs = driver.runner._graphs
        assert (graphs is not None) == bool(max_graph_seqs)
        if graphs is not None and (graph := graphs.find(1, 8)) is not None:
            with torch.inference_mode():
                assert graph.replay().token_ids.tolist() == sequences[0].token_ids[-1:]
        runs.append((steps, [s.token_ids for s in sequences]))
    (recorded, tokens), (plain, plain_tokens) = runs
    assert tokens == plain_tokens
    for (_, ours), (_, theirs) in zip(recorded, plain, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_graph_is_as_large_as_it_must_be(tmp_path: Path) -> None:
    case = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32")
    runner = Runner.load(
        case.save(tmp_path / "model"), EngineConfig(dtype="float32", num_blocks=2, kernels="triton", max_num_seqs=3)
    )
    graphs = runner._graphs
    assert graphs is not None
    assert graphs.find(1, 10) is not graphs.find(2, 10)
    assert graphs.find(3, 128) is not None
    assert graphs.find(4, 10) is None
    assert graphs.find(1, 129) is None
