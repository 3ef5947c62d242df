"""Models counted from their config.json, against the parameters that their publishers state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UnsupportedModel
from planner import models
from planner.hugging_face import read

_LLAMA = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "vocab_size": 32000,
    "num_attention_heads": 64, "num_key_value_heads": 8, "torch_dtype": "float16", "tie_word_embeddings": False,
}  # fmt: skip
_BLOOM = {"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880}
_MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
_QWEN_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
_QWEN_SMALL = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
_GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "vocab_size": 50257,
    "torch_dtype": "float32",
}
_FALCON = {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
           "multi_query": True, "vocab_size": 65024}  # fmt: skip


def _read(tmp_path: Path, config: dict[str, Any]) -> models.Model:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read(tmp_path, "mine")


@pytest.mark.parametrize(
    ("config", "billions", "active_billions", "kv_bytes"),
    [
        (_LLAMA, 68.977, 68.715, 327_680),
        (_BLOOM, 176.247, 176.247, 4_014_080),
        (_MIXTRAL, 46.703, 12.75, 131_072),
        (_QWEN_MOE, 30.53, 3.04, 98_304),
        (_QWEN_SMALL, 0.494, 0.494, 12_288),
        (_GPT2, 0.124, 0.124, 73_728),
        (_FALCON, 6.92, 6.92, 8_192),
    ],
    ids=["llama2-70b", "bloom-176b", "mixtral-8x7b", "qwen3-30b-a3b", "qwen2.5-0.5b", "gpt2", "falcon-7b"],
)
def test_a_model_has_the_parameters_and_the_kv_that_its_publisher_states(
    config: dict[str, Any], billions: float, active_billions: float, kv_bytes: int, tmp_path: Path
) -> None:
    model = _read(tmp_path, config)
    assert model.num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.num_active_parameters / 1e9 == pytest.approx(active_billions, rel=0.015)
    assert model.kv_bytes_per_token == kv_bytes


def test_the_built_in_models_are_what_their_configs_say(tmp_path: Path) -> None:
    for name, config in (("llama2-70b", _LLAMA), ("bloom-176b", _BLOOM)):
        found, built_in = _read(tmp_path, config), models.BUILT_IN[name]
        assert found.num_parameters == pytest.approx(built_in.num_parameters, rel=1e-3)
        assert found.num_active_parameters == pytest.approx(built_in.num_active_parameters, rel=1e-3)
        assert found.kv_bytes_per_token == built_in.kv_bytes_per_token


def test_a_batch_reads_the_experts_that_some_token_uses(tmp_path: Path) -> None:
    model = _read(tmp_path, _MIXTRAL)
    assert model.read_bytes(1) == pytest.approx(2 * model.num_active_parameters)
    assert model.read_bytes(1) < model.read_bytes(2) < model.read_bytes(8) < model.weight_bytes
    # Of a long prompt all; the table of embeddings is not.
    assert model.read_bytes(1000) == pytest.approx(model.weight_bytes - 2 * 32000 * 4096)


def test_quantized_weights_are_smaller_and_their_kv_is_not(tmp_path: Path) -> None:
    model = _read(tmp_path, {**_LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert model.weight_bytes == pytest.approx(68.977e9 / 2, rel=1e-3)
    assert model.kv_bytes_per_token == 327_680


def test_the_text_of_a_model_of_pictures_is_what_counts(tmp_path: Path) -> None:
    assert _read(tmp_path, {"model_type": "llava", "text_config": _LLAMA}) == _read(tmp_path, _LLAMA)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": None}, "expected a positive hidden_size or n_embd"),
        ({"num_hidden_layers": 0}, "expected a positive num_hidden_layers"),
        ({"num_key_value_heads": 7}, "64 attention heads are not a multiple of 7"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"num_local_experts": 4, "num_experts_per_tok": 8}, "uses 8 of 4 experts"),
        ({"num_local_experts": 4}, "expected a positive num_experts_per_tok"),
        ({"torch_dtype": "int3"}, "torch_dtype is 'int3', expected one of float32"),
        ({"quantization_config": {"quant_method": "other"}}, "quant_method is 'other'"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected an integer"),
    ],
)
def test_what_cannot_be_counted_is_refused(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=complaint):
        _read(tmp_path, {**_LLAMA, **change})
