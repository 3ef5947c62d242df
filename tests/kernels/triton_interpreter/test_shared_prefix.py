"""Prefixes read once: the same results as the plain kernel, and groups that save the most."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.cases import TOLERANCE, PagedSequences, Shape, relative_error
from engine.config import EngineConfig
from engine.kernels.triton import kernels as kernels_module
from engine.kernels.triton.decode_attention import decode_attention
from engine.kernels.triton.shared_prefix import (
    Group,
    find_groups,
    is_worth_queueing,
    plan_prefixes,
    rows_per_tile,
    saved_bytes,
    shared_decode_attention,
)
from engine.kernels.triton.tuning import DecodeTile
from engine.runner import Runner
from tests.engine_driver import Driver, random_prompt, spec
from tests.models import ORACLE_CASES, VOCAB_SIZE

TILE = DecodeTile(split_tokens=32, block_n=16, num_warps=4, num_stages=2, prefix_block_m=16)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*zip((Shape(2, 2, 16), Shape(8, 2, 24), Shape(12, 1, 16)), TOLERANCE, strict=True)],
    ids=str,
)
def test_shared_prefixes_give_the_plain_result(shape: Shape, dtype: torch.dtype) -> None:
    lengths = [70, 100, 33, 97, 5, 66]
    sequences = PagedSequences(shape, lengths, 16, dtype, "cpu")
    # Rows 1 and 3 share 96 positions with one another, 0 the first 64 of them; 4 and 5 nothing.
    sequences.tables[3, :6] = sequences.tables[1, :6]
    sequences.tables[0, :4] = sequences.tables[1, :4]
    tables = [row[: -(-length // 16)] for row, length in zip(sequences.tables.tolist(), lengths, strict=True)]
    tile_rows = rows_per_tile(shape.heads // shape.kv_heads, TILE)
    groups = [Group((0, 1, 3), 2)]
    plan = plan_prefixes(groups, range(6), 32, tile_rows, torch.device("cpu"))
    query = sequences.query(6)
    rows, counts = torch.arange(6, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    plain = decode_attention(
        query, sequences.cache, sequences.tables, rows, counts,
        scale_log2=shape.scale_log2, max_length=100, tile=TILE,
    )  # fmt: skip
    for chosen in (plan, plan_prefixes([], range(6), 32, tile_rows, torch.device("cpu"))):
        found = shared_decode_attention(
            query, sequences.cache, sequences.tables, rows, counts, chosen,
            scale_log2=shape.scale_log2, max_length=100, tile=TILE,
        )  # fmt: skip
        assert relative_error(found, plain) < TOLERANCE[dtype]
        assert torch.equal(found[[2, 4, 5]], plain[[2, 4, 5]])
    assert find_groups(tables, lengths, 16, 32, tile_rows) in (groups, [])


def table(*blocks: int, own: int) -> list[int]:
    return [*blocks, *range(own, own + 4)]


def test_groups_leave_the_fewest_tokens_to_read() -> None:
    tables = [
        table(1, 2, 3, 4, own=100),
        table(1, 2, 3, 4, own=200),
        table(1, 2, 9, 8, own=300),
        table(7, 7, 7, 7, own=400),
    ]
    lengths = [16 * 7] * 4
    # Three rows share 1 split of two blocks: 2 reads saved; two share 2: 2 saved as well.
    assert find_groups(tables, lengths, 16, 32, 16) == [Group((0, 1, 2), 1)]
    assert find_groups(tables[:2], lengths[:2], 16, 32, 16) == [Group((0, 1), 2)]
    # With tiles of one row nothing is ever saved.
    assert find_groups(tables, lengths, 16, 32, 1) == []


def test_a_row_keeps_its_own_token_and_blocks_may_be_larger_than_splits() -> None:
    assert find_groups([[1], [1]], [64, 64], 64, 32, 16) == [Group((0, 1), 1)]
    assert find_groups([[1], [1]], [32, 33], 64, 32, 16) == []
    assert find_groups([], [], 64, 32, 16) == []


def test_a_prefix_of_many_splits_is_followed_to_its_end() -> None:
    """As deep as the longest context: further than calls can nest."""
    blocks = [*range(3000)]
    tables = [[*blocks, 7001], [*blocks, 7002], [*blocks[:1500], *range(8000, 9501)]]
    groups = find_groups(tables, [3001 * 32] * 3, 32, 32, 16)
    assert groups == [Group((0, 1, 2), 1500)]
    assert find_groups(tables[:2], [3001 * 32] * 2, 32, 32, 16) == [Group((0, 1), 3000)]


def test_a_step_is_queued_by_hand_where_that_saves_more_than_it_costs() -> None:
    """Llama-3-8B in bfloat16: 14 GiB of weights, 4 KiB of a layer's keys and values a token."""
    weights, layers = 14 << 30, 32
    # 64 rows of 8192 tokens behind a prefix of 8000, then of 256.
    kv = 64 * 8192 * 4096
    assert is_worth_queueing(weights + layers * kv, 63 * 8000 * 4096, layers, layers)
    assert not is_worth_queueing(weights + layers * kv, 8 * 256 * 4096, layers, layers)
    # Few rows: what is saved is little beside the weights. A small model: the host could not keep up.
    assert not is_worth_queueing(weights + layers * 2 * 6000 * 4096, 6000 * 4096, layers, layers)
    assert not is_worth_queueing((1 << 30) + 16 * (32 << 20), 31 << 20, 16, 16)
    # Layers with a window share nothing.
    assert not is_worth_queueing(weights + layers * kv, 63 * 8000 * 4096, layers, 0)


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


def test_predicted_bytes() -> None:
    assert saved_bytes([Group(tuple(range(20)), 3)], 1024, 256, 16) == 3 * 18 * 256 * 1024
