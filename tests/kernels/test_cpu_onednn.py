"""Products by oneDNN, forced: no processor is needed that would choose them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.devices import TorchDevices
from engine.kernels.cpu import CpuKernels, onednn
from engine.kernels.reference import ReferenceKernels
from engine.runner import Runner
from tests.support.engine_driver import Crowd, Driver, random_prompt, spec
from tests.support.models import VOCAB_SIZE, ModelCase

pytestmark = pytest.mark.skipif(not onednn.is_exact(), reason="torch has no oneDNN here, or its rows see each other")


def test_rows_of_a_product_do_not_see_each_other_and_it_is_right() -> None:
    torch.manual_seed(4)
    weight, bias = torch.randn(1000, 264).bfloat16() * 0.1, torch.randn(1000).bfloat16()
    linear = CpuKernels(uses_onednn=True).linear(weight, bias)
    assert isinstance(linear, onednn.OneDnnLinear)
    x = torch.randn(801, 264).bfloat16()
    whole, expected = linear(x), ReferenceKernels().linear(weight, bias)(x)
    assert (whole.double() - expected.double()).abs().max() <= 2e-2 * expected.double().abs().max()
    for at, rows in ((0, 1), (5, 2), (8, 24), (13, 40), (0, 128), (24, 504), (800, 1)):
        assert torch.equal(linear(x[at : at + rows].clone()), whole[at : at + rows])


def test_the_processor_chooses_and_nodes_tell_the_choice_apart() -> None:
    ours = CpuKernels(uses_onednn=False)
    assert CpuKernels(uses_onednn=True).name == f"{ours.name}-onednn"
    assert CpuKernels().name == CpuKernels(uses_onednn=onednn.has_matrix_units()).name
    assert not isinstance(ours.linear(torch.ones(8, 8).bfloat16(), None), onednn.OneDnnLinear)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_whole_model_is_exact_in_chunks_and_among_neighbours(threads: int, tmp_path: Path) -> None:
    """Python's calls stand between the records of a program, in their order."""
    case = ModelCase("wide-llama", heads=8, kv_heads=2, head_dim=64, hidden=512, intermediate=1408)
    config = EngineConfig(dtype="bfloat16", num_blocks=100)
    runner = Runner.load_on(
        CpuKernels(uses_onednn=True), case.save(tmp_path), config, allocate=None, devices=TorchDevices()
    )
    assert runner.kernels.endswith("-onednn")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        request = spec("main", random_prompt(150, VOCAB_SIZE, seed=77), max_tokens=5)
        alone = Driver(runner, seed=1).generate(request)
        for chunk, crowd in ((64, None), (7, None), (90, Crowd(9, VOCAB_SIZE))):
            found = Driver(runner, seed=2).generate(request, chunk=chunk, neighbours=crowd)
            assert found.token_ids == alone.token_ids
            assert all(torch.equal(a, b) for a, b in zip(found.logits, alone.logits, strict=True))
    finally:
        torch.set_num_threads(before)
