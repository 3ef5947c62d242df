"""Law 1 on CPU: tokens and logits of a sequence are the same bits whatever runs beside it and however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.runner import Runner
from engine.step import StepPlan
from tests.support.engine_driver import Crowd, Driver, Run, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE, ModelCase

# Wide enough that torch splits products and loops between threads; ratios that need padded rows; a window.
CASES = (
    ModelCase("wide-llama", heads=8, kv_heads=2, head_dim=64, hidden=512, intermediate=1408),
    ModelCase("mha-biased-qwen2", family="Qwen2", heads=2, kv_heads=2, hidden=64, head_dim=32),
    next(case for case in ORACLE_CASES if case.name == "mistral-window-40"),
    next(case for case in ORACLE_CASES if case.name == "qwen3-longrope"),
    next(case for case in ORACLE_CASES if case.name == "llama-gqa3-d24"),
)
DTYPES = ("float32", "bfloat16", "float16")
SAMPLING: dict[str, dict[str, object]] = {
    "greedy": {},
    "seeded": {
        "temperature": 0.9,
        "seed": 1234,
        "top_p": 0.95,
        "top_k": 60,
        "min_p": 0.001,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logprobs": 5,
    },
}
PROMPT = random_prompt(150, VOCAB_SIZE, seed=77)
MAX_TOKENS = 8

Loader = Callable[[ModelCase, str], Runner]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    runners: dict[tuple[str, str], Runner] = {}

    def loader(case: ModelCase, dtype: str) -> Runner:
        key = (case.name, dtype)
        if key not in runners:
            folder = case.save(tmp_path_factory.mktemp("model"))
            runners[key] = Runner.load(folder, EngineConfig(dtype=dtype, num_blocks=160))
        return runners[key]

    return loader


def assert_same(found: Run, expected: Run) -> None:
    assert found.token_ids == expected.token_ids
    assert found.sampled == expected.sampled
    for index, (left, right) in enumerate(zip(found.logits, expected.logits, strict=True)):
        assert torch.equal(left, right), f"logits of generated token {index} differ by {(left - right).abs().max()}"


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunks_neighbours_and_reruns_change_no_bit(case: ModelCase, dtype: str, sampling: str, load: Loader) -> None:
    runner = load(case, dtype)
    request = spec("main", PROMPT, max_tokens=MAX_TOKENS, **SAMPLING[sampling])
    alone = Driver(runner, seed=1).generate(request)
    assert all(torch.isfinite(row).all() for row in alone.logits)
    for chunk in (64, 7) if sampling == "seeded" else (64, 7, 1):
        assert_same(Driver(runner, seed=2).generate(request, chunk=chunk), alone)
    for seed in (1, 2):
        crowd = Crowd(32, VOCAB_SIZE, seed=seed)
        assert_same(Driver(runner, seed=seed).generate(request, chunk=90, neighbours=crowd), alone)
    for done in (1, 5):
        again = spec("main", PROMPT, generated=alone.token_ids[:done], max_tokens=MAX_TOKENS, **SAMPLING[sampling])
        rest = Run(alone.token_ids[done:], alone.logits[done:], alone.sampled[done:])
        assert_same(Driver(runner, seed=3).generate(again), rest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_equals_prefilling_the_same_tokens(dtype: str, load: Loader) -> None:
    """The logits drawn from while decoding are those of a prompt that ends there."""
    runner = load(CASES[0], dtype)
    tokens = random_prompt(70, VOCAB_SIZE, seed=5)
    for length in (1, 2, 63, 64, 65, 70):
        whole = Driver(runner).generate(spec("whole", tokens[:length], max_tokens=1))
        single = Driver(runner).generate(spec("single", tokens[:length], max_tokens=1), chunk=1)
        assert_same(single, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perturbing_a_neighbour_changes_nothing(dtype: str, load: Loader) -> None:
    runner = load(CASES[0], dtype)
    rows = []
    for change in range(6):
        driver = Driver(runner)
        sequences = [driver.add(spec(f"n{i}", random_prompt(40 + 9 * i, VOCAB_SIZE, i))) for i in range(6)]
        if change:
            sequences[change].token_ids[change * 3] ^= 1
        _, logits = driver.step([driver.piece(s, 1 << 30) for s in sequences])
        _, later = driver.step([driver.piece(s, 1) for s in sequences])
        rows.append((logits["n0/0/0"], later["n0/0/0"], logits[f"n{change}/0/0"] if change else None))
    for first, second, changed in rows[1:]:
        assert torch.equal(first, rows[0][0])
        assert torch.equal(second, rows[0][1])
        assert changed is not None
        assert not torch.equal(changed, rows[0][0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_order_of_pieces_and_place_of_blocks_change_nothing(dtype: str, load: Loader) -> None:
    runner = load(CASES[0], dtype)
    results = []
    for seed in (1, 2):
        driver = Driver(runner, seed)
        sequences = [driver.add(spec(f"n{i}", random_prompt(30 + 50 * i, VOCAB_SIZE, i))) for i in range(5)]
        pieces = [driver.piece(s, 1 << 30) for s in sequences]
        _, logits = driver.step(pieces if seed == 1 else pieces[::-1])
        results.append(logits)
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_reference_kernels_are_exact_too(tmp_path: Path) -> None:
    case = CASES[2]
    config = EngineConfig(dtype="float32", num_blocks=160, kernels="reference")
    runner = Runner.load(case.save(tmp_path), config)
    request = spec("main", PROMPT[:70], max_tokens=4)
    alone = Driver(runner).generate(request)
    assert_same(Driver(runner, seed=2).generate(request, chunk=7, neighbours=Crowd(6, VOCAB_SIZE)), alone)


def test_threads_change_no_bit(load: Loader) -> None:
    """Not promised between machines, but one and two threads agree, and this shows when that ends."""
    before = torch.get_num_threads()
    try:
        for dtype in ("float32", "bfloat16"):
            runner, request = load(CASES[0], dtype), spec("main", PROMPT, max_tokens=4)
            torch.set_num_threads(1)
            one = Driver(runner).generate(request)
            torch.set_num_threads(2)
            assert_same(Driver(runner).generate(request), one)
    finally:
        torch.set_num_threads(before)


def test_layers_are_reported_in_order_once_written(load: Loader) -> None:
    runner = load(CASES[1], "float32")
    driver = Driver(runner)
    sequence = driver.add(spec("a", PROMPT))
    reported: list[int] = []

    def on_layer(layer: int) -> None:
        blocks = driver._arena[layer][sequence.block_ids[:2]]
        assert torch.isfinite(blocks).all()
        reported.append(layer)

    runner.execute(StepPlan((driver.piece(sequence, 1 << 30),)), on_layer)
    assert reported == [0, 1]
