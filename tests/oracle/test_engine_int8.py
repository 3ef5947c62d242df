"""int8 from a float checkpoint: exact in itself, near what it was made from, smaller, and told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton import PROTOCOL_VERSION
from baton.errors import BadConfig, Incompatible
from baton.types import NodeDescription, NodeStatus, Role
from engine.config import EngineConfig
from engine.cost import CostModel
from engine.devices import Accelerator
from engine.fake_devices import FakeDevices
from engine.kernels import select_kernels
from engine.kernels.cpu.linear_int8 import CpuLinearInt8
from engine.kernels.int8 import GROUP
from engine.memory import weight_bytes
from engine.model_config import ModelConfig
from engine.runner import Runner
from kvtransfer.wire_codec import check_compatible
from router.cluster import membership as m
from tests.support.engine_driver import Crowd, Driver, Run, random_prompt, spec
from tests.support.models import VOCAB_SIZE, ModelCase

# Inputs of two groups and a part of one.
CASE = ModelCase("int8", family="Qwen2", heads=6, kv_heads=2, head_dim=24, hidden=256, intermediate=330)
PROMPT = random_prompt(150, VOCAB_SIZE, seed=77)
MAX_TOKENS = 6
STATUS = NodeStatus(Role.MIXED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASE.save(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: Any) -> Runner:
    return Runner.load(folder, EngineConfig(num_blocks=160, **options))


def assert_same(found: Run, expected: Run) -> None:
    assert found.token_ids == expected.token_ids
    assert all(torch.equal(left, right) for left, right in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_neighbours_phase_and_reruns_change_no_bit(folder: Path, dtype: str) -> None:
    runner = load(folder, dtype=dtype, quantization="int8")
    request = spec("main", PROMPT, max_tokens=MAX_TOKENS, temperature=0.9, seed=3)
    alone = Driver(runner, seed=1).generate(request)
    assert all(torch.isfinite(row).all() for row in alone.logits)
    for chunk in (64, 7, 1):
        assert_same(Driver(runner, seed=2).generate(request, chunk=chunk), alone)
    crowd = Crowd(32, VOCAB_SIZE, seed=1)
    assert_same(Driver(runner, seed=1).generate(request, chunk=90, neighbours=crowd), alone)
    again = spec("main", PROMPT, generated=alone.token_ids[:3], max_tokens=MAX_TOKENS, temperature=0.9, seed=3)
    assert_same(Driver(runner, seed=3).generate(again), Run(alone.token_ids[3:], alone.logits[3:]))


def test_logits_are_near_those_of_floats_and_not_the_same(folder: Path) -> None:
    """A level is 1/127 of the largest of its group, where bfloat16 has 1/256 of each: a few times its error."""

    def logits(dtype: str, quantization: str) -> Tensor:
        runner = load(folder, dtype=dtype, quantization=quantization)
        return Driver(runner).generate(spec("a", PROMPT, max_tokens=1)).logits[0]

    truth = logits("float32", "none")
    of_bfloat16, of_int8 = ((logits(*how) - truth).std() for how in (("bfloat16", "none"), ("bfloat16", "int8")))
    assert of_bfloat16 < of_int8 < 5 * of_bfloat16


def test_reference_kernels_have_it_too(folder: Path) -> None:
    found, expected = (
        Driver(load(folder, dtype="float32", quantization="int8", kernels=kernels)).generate(
            spec("a", PROMPT[:40], max_tokens=2)
        )
        for kernels in ("cpu", "reference")
    )
    # Norms and attention add in another order, which may turn a level.
    torch.testing.assert_close(found.logits[0], expected.logits[0], rtol=0, atol=0.02 * float(found.logits[0].std()))


def node(runner: Runner, node_id: str) -> NodeDescription:
    return NodeDescription(
        node_id=node_id,
        incarnation=1,
        home_role=Role.MIXED,
        address=f"{node_id}:1",
        model=runner.description,
        kv_layout=runner.layout,
        protocol_version=PROTOCOL_VERSION,
        pid=1,
        host_id="here",
        transports=("shm",),
        device="cpu",
        kernels=runner.kernels,
        software_version="0",
    )


def test_its_nodes_and_those_of_floats_refuse_each_other_with_both_values(folder: Path) -> None:
    plain, int8 = load(folder), load(folder, quantization="int8")
    assert int8.kernels == f"{plain.kernels}-w8a8g{GROUP}"
    assert int8.description.fingerprint == f"{plain.description.fingerprint}-int8"
    assert replace(int8.description, fingerprint=plain.description.fingerprint) == plain.description
    mine, theirs = (node(runner, name) for runner, name in ((plain, "p"), (int8, "d")))
    with pytest.raises(Incompatible, match=f"fingerprint is {plain.description.fingerprint} at p and .*-int8 at d"):
        check_compatible(mine, theirs, "", "")
    # The same weights by other arithmetic, should there ever be one.
    other = replace(theirs, kernels="cpu-avx2-w8a16")
    with pytest.raises(Incompatible, match=f"kernels is cpu-avx2-w8a16 at d and {int8.kernels} at d"):
        check_compatible(other, theirs, "", "")
    # And the router lets the second of them not in.
    router = m.Membership(["p:1", "d:1"], m.MembershipConfig())
    router.start()
    assert router.handle(m.Welcomed("p:1", mine, STATUS), 0.0) == [m.NodeUp(mine, STATUS)]
    _, refused = router.handle(m.Welcomed("d:1", theirs, STATUS), 0.0)
    assert isinstance(refused, m.NodeRefused)
    assert f"{plain.description.fingerprint} at p and {int8.description.fingerprint} at d" in refused.reason


def test_weights_take_what_is_reckoned(folder: Path) -> None:
    """Of layers that fill whole panels and groups: a byte for every weight, and four for every group."""
    config = replace(ModelConfig.from_folder(folder), hidden_size=1024, vocab_size=1280)
    cost = CostModel.of(config, "bfloat16", "int8")
    head = select_kernels("cpu", quantization="int8").linear(torch.zeros(1280, 1024, dtype=torch.bfloat16), None)
    assert isinstance(head, CpuLinearInt8)
    assert head._panels.nbytes == cost.head_weight_bytes
    embedding_bytes = 1280 * 1024 * 2
    plain = CostModel.of(config, "bfloat16", "none")
    assert cost.layer_weight_bytes == plain.layer_weight_bytes / 2 * (1 + 4 / GROUP)
    assert (cost.flops_per_token, cost.kv_bytes_per_layer) == (plain.flops_per_token, plain.kv_bytes_per_layer)
    layers_and_head = int(cost.layer_weight_bytes + cost.head_weight_bytes)
    assert weight_bytes(config, "bfloat16", "int8") == layers_and_head + embedding_bytes
    assert load(folder, quantization="int8").cost == CostModel.of(ModelConfig.from_folder(folder), "float32", "int8")


def test_kernels_of_gpus_refuse_it_by_name() -> None:
    with pytest.raises(BadConfig, match=r"quantization is 'int8', expected none with kernels triton: .*GPU yet"):
        EngineConfig(kernels="triton", quantization="int8")
    hopper = FakeDevices([Accelerator("NVIDIA H200", (9, 0))])
    with pytest.raises(BadConfig, match=r"quantization is int8, which kernels triton do not have.*not on a GPU yet"):
        select_kernels("auto", quantization="int8", devices=hopper)
    with pytest.raises(BadConfig, match=r"quantization is 'int4', expected none or int8"):
        EngineConfig(quantization="int4")
