"""The runner reads shared prefixes once where a row's bits may depend on its neighbours, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.kernels.cases import TOLERANCE, relative_error
from engine.kernels.triton import kernels as kernels_module
from engine.runner import Runner
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE

CONFIG = EngineConfig(dtype="float32", block_tokens=16, num_blocks=40, kernels="triton", max_graph_seqs=4)


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_the_runner_shares_what_its_block_tables_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_batch_invariant: bool
) -> None:
    """Rows of two sequences whose tables begin alike, recorded or beside a prompt, give what they give alone."""
    # A tiny model saves a few KiB; the laws do not depend on where the line is drawn.
    monkeypatch.setattr(kernels_module, "MIN_SAVED_BYTES", 1)
    monkeypatch.setattr(kernels_module, "is_worth_queueing", lambda *_: True)
    launches: list[int] = []
    plain = kernels_module.shared_decode_attention

    def counted(*args: object, **options: object) -> torch.Tensor:
        launches.append(1)
        return plain(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels_module, "shared_decode_attention", counted)
    folder = next(c for c in ORACLE_CASES if c.name == "llama-gqa2-d32").save(tmp_path / "model")
    config = replace(CONFIG, is_batch_invariant=is_batch_invariant)
    driver = Driver(Runner.load(folder, config))
    known = random_prompt(259, VOCAB_SIZE)
    sequences = [driver.add(spec(name, known[:3], generated=known[3:])) for name in "ab"]
    for s in sequences:
        driver.step([driver.piece(s, 258)])
    # Every split of its own first, then the first sequence's blocks for both.
    launches.clear()
    alone = [driver.step([driver.piece(s, 1)])[1] for s in sequences]
    assert not launches, "a row alone shares nothing"
    for s in sequences:
        s.num_computed -= 1
        s.token_ids.pop()
    own, sequences[1].block_ids = sequences[1].block_ids, [*sequences[0].block_ids[:16], *sequences[1].block_ids[16:]]
    for beside in (False, True):
        more = [driver.piece(driver.add(spec("c", (1, 2, 3))), 3)] if beside else []
        _, found = driver.step([*(driver.piece(s, 1) for s in sequences), *more])
        for s, wanted in zip(sequences, alone, strict=True):
            name = s.sequence_id
            assert relative_error(found[name], wanted[name]) < TOLERANCE[torch.float32]
            if is_batch_invariant:
                assert torch.equal(found[name], wanted[name])
            s.num_computed -= 1
            s.token_ids.pop()
    assert len(launches) == (0 if is_batch_invariant else 2 * driver.runner.layout.num_layers)
    sequences[1].block_ids = own
