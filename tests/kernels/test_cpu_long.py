"""A long context divided among threads has the bits that one thread gives it, and only idle threads divide it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baton.types import KvLayout
from engine.config import EngineConfig
from engine.fake_devices import FakeDevices
from engine.kernels.cpu import CpuKernels
from engine.kernels.cpu.llvm import Isa
from engine.kernels.cpu.long_attention import long_tables, split
from engine.runner import Runner
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE

HOST = Isa.of_host()
AVX2 = Isa("avx2", "haswell", "+avx2,+fma,+f16c", 8, 6, 2, has_bf16_dot=False, has_vnni=False)
ISAS = {"host": HOST, "avx2": AVX2} if platform.machine() == "x86_64" else {"host": HOST}
CASES = ("llama-gqa2-d32", "llama-gqa8-d128", "llama-gqa3-d24", "mistral-window-200-d80", "qwen2-gqa7")
LAYOUT = KvLayout(1, 4, 2, 32, 16, "float32")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decoded(runner: Runner, num_threads: int, lengths: tuple[int, ...]) -> list[Tensor]:
    """Logits of prompts that decode side by side, across the length from which on they are divided."""
    driver = Driver(runner)
    with threads(num_threads):
        sequences = [
            driver.add(spec(f"s{i}", random_prompt(n, VOCAB_SIZE, i), max_tokens=40)) for i, n in enumerate(lengths)
        ]
        for sequence in sequences:
            driver.step([driver.piece(sequence, 1 << 30)])
        found = []
        for _ in range(12):
            _, logits = driver.step([driver.piece(sequence, 1) for sequence in sequences])
            found.append(torch.stack(list(logits.values())))
    return found


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path, name: str, dtype: str, isa: str) -> None:
    case = next(case for case in ORACLE_CASES if case.name == name)
    config = EngineConfig(dtype=dtype, num_blocks=300, block_tokens=16)
    kernels = CpuKernels(ISAS[isa], uses_onednn=False)
    runner = Runner.load_on(
        kernels, case.save(tmp_path / "model"), config, allocate=None, devices=FakeDevices()
    )  # fmt: skip
    for lengths in ((1004,), (1500, 1003)):
        alone = decoded(runner, 1, lengths)
        divided = decoded(runner, 16, lengths)
        assert runner._model._recorder is not None
        assert runner._model._recorder[1]._sizes.positions >= 1024
        assert all(torch.equal(one, other) for one, other in zip(alone, divided, strict=True))


def test_only_idle_threads_divide_a_context() -> None:
    def whole(tiles: list[tuple[int, int, int, int]], num_threads: int, most_positions: int = 1 << 20) -> int:
        found = split(tiles, LAYOUT, num_heads=4, num_threads=num_threads, most_positions=most_positions)
        assert len(found.whole) + len(found.long) == len(tiles)
        assert sorted({piece[0] for piece in found.pieces}) == list(range(len(found.long)))
        room = 1 << max(found.num_positions - 1, 0).bit_length()
        (most_tiles, _), (most_pieces, _) = long_tables(room)
        assert not found.long or (len(found.long) <= most_tiles and len(found.pieces) <= most_pieces)
        return len(found.whole)

    one = [(0, 5000, 1, 0)]
    assert whole(one, 7) == 1, "two KV heads, fewer than four threads each"
    assert whole(one, 8) == 0
    assert whole([(0, 5000, 3, 0)], 8) == 1, "several tokens"
    assert whole([(0, 1007, 1, 0)], 8) == 1, "a short context"
    assert whole([(0, 1008, 1, 0)], 8) == 0
    two = [(0, 5000, 1, 0), (1, 3000, 1, 313)]
    assert whole(two, 16) == 0
    assert whole(two, 16, most_positions=5008) == 1, "beyond the memory for it"
    assert whole(two, 15) == 2
