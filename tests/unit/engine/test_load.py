"""What is read from a model folder, and that everything unsupported stops the start by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.errors import BadConfig, UnsupportedModel
from engine.config import EngineConfig
from engine.kernels.cpu import attention, linear, pointwise
from engine.kernels.cpu.kernel import Kernel
from engine.model_config import ModelConfig
from engine.runner import Runner
from engine.weights import Checkpoint, fingerprint
from tests.support.engine_driver import Driver, random_prompt, spec
from tests.support.models import ORACLE_CASES, VOCAB_SIZE, ModelCase

CASES = {case.name: case for case in ORACLE_CASES}
CONFIG = EngineConfig(num_blocks=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return CASES["llama-gqa2-d32"].save(tmp_path / "model")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "DROP"}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported; supported are Llama"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "rope_type 'mrope'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0]}}, "short_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"head_dim": 33}, "head_dim"),
        ({"dtype": "float8_e4m3fn"}, "float8"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight"),
        ({"num_hidden_layers": 1}, "does not have: model.layers.1."),
        ({"intermediate_size": 100}, "expected (100, 64)"),
        ({"vocab_size": 999}, "embed_tokens.weight"),
        ({"attention_bias": True}, "q_proj.bias"),
    ],
)
def test_unsupported_configs_stop_the_start(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UnsupportedModel) as caught:
        Runner.load(folder, CONFIG)
    assert named in str(caught.value)


def _drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return drop


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)


def _quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_drop("model.layers.1.mlp.up_proj.weight"), "lack model.layers.1.mlp.up_proj.weight"),
        (_drop("lm_head.weight"), "lack lm_head.weight"),
        (_add, "model.layers.0.self_attn.sinks"),
        (_quantize, "dtype I8"),
    ],
)
def test_wrong_weights_stop_the_start(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], named: str
) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(UnsupportedModel) as caught:
        Runner.load(folder, CONFIG)
    assert named in str(caught.value)


def test_missing_and_broken_files_stop_the_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json does not exist"):
        Runner.load(tmp_path / "nowhere", CONFIG)
    (folder / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(UnsupportedModel, match="no whole safetensors file"):
        Runner.load(folder, CONFIG)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"expected model\.safetensors"):
        Runner.load(folder, CONFIG)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/x.safetensors"}}')
    with pytest.raises(UnsupportedModel, match="expected files of its own folder"):
        Runner.load(folder, CONFIG)
    (folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not JSON"):
        Runner.load(folder, CONFIG)


def test_shards_give_the_same_model_and_fingerprint(folder: Path, tmp_path: Path) -> None:
    case = CASES["llama-gqa2-d32"]
    sharded = case.save(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert fingerprint(sharded) == fingerprint(folder)
    request = spec("a", random_prompt(20, VOCAB_SIZE))
    runs = [Driver(Runner.load(f, CONFIG)).generate(request).token_ids for f in (folder, sharded)]
    assert runs[0] == runs[1]


def test_fingerprint_sees_weights_and_config(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(folder)
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, path)
    second = fingerprint(folder)
    edit(folder, rms_norm_eps=1e-5)
    assert len({first, second, fingerprint(folder)}) == 3


@pytest.mark.parametrize("name", ["llama-theta", "llama-linear", "llama-yarn", "llama-llama3", "qwen3-longrope"])
def test_old_and_new_spelling_of_rope_agree(name: str, tmp_path: Path) -> None:
    case: ModelCase = CASES[name]
    case.config().save_pretrained(tmp_path)
    edit(tmp_path, architectures=[f"{case.family}ForCausalLM"])
    new = ModelConfig.from_folder(tmp_path)
    params = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta, kind = params.pop("rope_theta"), params.pop("rope_type")
    scaling = None if kind == "default" else {"type": "su" if kind == "longrope" else kind, **params}
    edit(tmp_path, rope_parameters="DROP", rope_theta=theta, rope_scaling=scaling)
    assert ModelConfig.from_folder(tmp_path) == new


def test_what_a_config_says_is_read(tmp_path: Path) -> None:
    case = CASES["qwen2-window"]
    case.config().save_pretrained(tmp_path)
    edit(tmp_path, architectures=["Qwen2ForCausalLM"], eos_token_id=[3, 4], dtype="DROP", torch_dtype="bfloat16")
    config = ModelConfig.from_folder(tmp_path)
    assert config.windows == (None, 50, 50)
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == (True, False, False)
    assert config.eos_token_ids == (3, 4)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    "options",
    [{"dtype": "int8"}, {"kernels": "fast"}, {"block_tokens": 48}, {"num_blocks": 0}, {"max_graph_seqs": -1}],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=next(iter(options))):
        EngineConfig(**options)


def test_cache_lies_in_the_given_memory(folder: Path) -> None:
    given: list[bytearray] = []

    def allocate(num_bytes: int) -> memoryview:
        given.append(bytearray(num_bytes))
        return memoryview(given[0])

    runner = Runner.load(folder, CONFIG, allocate=allocate)
    assert len(given[0]) == runner.layout.total_bytes
    driver = Driver(runner)
    run = driver.generate(spec("a", random_prompt(10, VOCAB_SIZE)))
    assert (
        run.token_ids
        == Driver(Runner.load(folder, CONFIG)).generate(spec("a", random_prompt(10, VOCAB_SIZE))).token_ids
    )
    assert any(given[0])
    with pytest.raises(BadConfig, match="bytes"):
        Runner.load(folder, CONFIG, allocate=lambda n: memoryview(bytearray(n - 1)))
    with pytest.raises(BadConfig, match="kv_bytes"):
        Runner.load(folder, EngineConfig(kv_bytes=10))


@pytest.mark.parametrize("name", ["llama-gqa2-d32", "llama-gqa4-d64"], ids=["untied", "tied"])
def test_weights_are_read_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the model and for the digest: a model larger than memory would come from the disk twice."""
    folder, opened = CASES[name].save(tmp_path / "model"), 0
    enter = Checkpoint.__enter__

    def count(self: Checkpoint) -> Checkpoint:
        nonlocal opened
        opened += 1
        return enter(self)

    monkeypatch.setattr(Checkpoint, "__enter__", count)
    found = Runner.load(folder, CONFIG).description.fingerprint
    assert opened == 1
    assert found == fingerprint(folder), "as of a folder that is not loaded"


def test_replicas_with_other_weights_do_not_take_each_other_for_the_same(folder: Path) -> None:
    first = Runner.load(folder, CONFIG).description
    path = folder / "model.safetensors"
    before = path.stat()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, path)
    # Nothing but the bytes has changed.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = Runner.load(folder, CONFIG).description
    assert replace(second, fingerprint=first.fingerprint) == first
    assert second.fingerprint != first.fingerprint


def test_one_changed_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    case = ModelCase("wide", hidden=512, intermediate=2048)
    model = case.build()
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        # In the middle of a matrix of 4 MB, where no sample of its bytes would be likely to look.
        model.model.layers[1].mlp.up_proj.weight[1000, 201] += 1
    model.save_pretrained(tmp_path / "after")
    assert fingerprint(tmp_path / "before") != fingerprint(tmp_path / "after")


def test_no_kernel_is_compiled_after_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of compilation in the first requests would be a second of their TTFT."""
    compiled: list[str] = []
    compile_kernel = Kernel.__init__

    def count(self: Kernel, name: str, *rest: Any) -> None:
        compiled.append(name)
        compile_kernel(self, name, *rest)

    monkeypatch.setattr(Kernel, "__init__", count)
    for cached in (attention._kernel, linear._kernel, pointwise._rms_norm, pointwise._silu_mul, pointwise._rope_store):
        cached.forget_all()
    driver = Driver(Runner.load(folder, CONFIG))
    assert len(compiled) >= 6
    loaded = list(compiled)
    driver.generate(spec("a", random_prompt(150, VOCAB_SIZE), max_tokens=3), chunk=40)
    assert compiled == loaded
