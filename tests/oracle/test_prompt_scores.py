"""Log-probabilities of prompts: those of transformers, and the same bits whatever runs beside them, however the prompt
is cut, and whether a token was generated or came with the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.types import PositionLogprobs
from engine.config import EngineConfig
from engine.runner import Runner
from tests.support.engine_driver import Crowd, Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE, ModelCase

CASES = tuple(case for case in ORACLE_CASES if case.name in ("llama-gqa3-d24", "mistral-window-40", "qwen3-longrope"))
PROMPT = random_prompt(150, VOCAB_SIZE, seed=5)
KERNELS = ("cpu", "reference")


def loaded(case: ModelCase, folder: Path, **options: object) -> Runner:
    return Runner.load(case.save(folder), EngineConfig(num_blocks=160, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_prompt_has_the_log_probabilities_of_transformers(case: ModelCase, kernels: str, tmp_path: Path) -> None:
    model = case.build().eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    runner = loaded(case, tmp_path / "model", dtype="float32", kernels=kernels)
    scored = Driver(runner).generate(spec("a", PROMPT, max_tokens=1, prompt_logprobs=4)).scored
    assert len(scored) == len(PROMPT) - 1
    for at, report in enumerate(scored):
        row = wanted[at]
        assert report.chosen.token_id == PROMPT[at + 1]
        assert report.chosen.logprob == pytest.approx(float(row[PROMPT[at + 1]]), abs=1e-4)
        assert [t.logprob for t in report.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert report.rank == 1 + sum(float(v) > float(row[PROMPT[at + 1]]) for v in row)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_are_the_same_bits_however_the_prompt_is_cut(
    case: ModelCase, kernels: str, dtype: str, tmp_path: Path
) -> None:
    runner = loaded(case, tmp_path / "model", dtype=dtype, kernels=kernels)
    asked = spec("a", PROMPT, max_tokens=2, prompt_logprobs=3)
    whole = Driver(runner).generate(asked)
    assert len(whole.scored) == len(PROMPT) - 1
    for chunk in (1, 7, 64):
        assert Driver(runner, chunk).generate(asked, chunk=chunk).scored == whole.scored
    beside = Driver(runner).generate(asked, chunk=33, neighbours=Crowd(3, VOCAB_SIZE))
    assert (beside.scored, beside.token_ids) == (whole.scored, whole.token_ids)
    unasked = Driver(runner).generate(spec("a", PROMPT, max_tokens=2))
    assert (unasked.scored, unasked.token_ids) == ([], whole.token_ids)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_token_scores_as_it_was_generated(kernels: str, tmp_path: Path) -> None:
    runner = loaded(CASES[0], tmp_path / "model", dtype="float32", kernels=kernels)
    assert runner.prefix_caching.phases_agree
    run = Driver(runner).generate(spec("a", PROMPT[:20], max_tokens=12, logprobs=3))
    reports: list[PositionLogprobs] = [report for _, reports in run.sampled for report in reports]
    again = Driver(runner).generate(spec("a", (*PROMPT[:20], *run.token_ids), max_tokens=1, prompt_logprobs=3))
    assert again.scored[19:] == reports
