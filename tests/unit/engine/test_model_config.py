"""config.json: what changes numbers is read or refused by name, and no value of any type ends in a bare exception."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.errors import UnsupportedModel
from engine.model_config import ModelConfig
from engine.rope import inverse_frequencies

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def read(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_folder(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_default_config_of_transformers_is_known(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=3)
    raw = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [f"{family}ForCausalLM"]}
    assert read(tmp_path, raw).num_layers == 3


# Fields as they are found in public folders, by whose they are.
PUBLIC: dict[str, dict[str, Any]] = {
    "llama 2": {"pretraining_tp": 2, "pad_token_id": 0, "rope_scaling": None, "max_length": 4096, "do_sample": True},
    "llama 3.1": {
        "attention_bias": False, "mlp_bias": False, "eos_token_id": [3, 8, 9], "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    "yarn of its authors": {
        "rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True},
    },
    "vicuna": {"max_sequence_length": 2048, "_name_or_path": "vicuna", "pad_token_id": -1},
    "smollm 2": {
        "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {"q4": 1}},
    },
    "unsloth": {"unsloth_fixed": True, "unsloth_version": "2025.1.5", "_attn_implementation_autoset": True},
    "neuron": {"neuron": {"compiler_version": "2.16"}},
    "a tokenizer of its own": {"auto_map": {"AutoTokenizer": "tok.Tok", "AutoConfig": "c.Config"}},
    "mistral": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096,
        "num_key_value_heads": 2, "use_sliding_window": False,
    },
    "qwen 2.5": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_mrope": False, "use_sliding_window": False,
        "sliding_window": 131072, "max_window_layers": 70,
    },
    "qwen 3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "sliding_window": None,
        "max_window_layers": 36, "head_dim": 128, "rope_scaling": None,
    },
    "granite that scales by one": {"residual_multiplier": 1.0, "logits_scaling": 1, "embedding_multiplier": None},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_fields_of_public_folders_are_known(name: str, tmp_path: Path) -> None:
    read(tmp_path, {**LLAMA, **PUBLIC[name]})


DUAL_CHUNK = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
CHANGING: list[tuple[str, dict[str, Any]]] = [
    ("dual_chunk_attention_config", {"dual_chunk_attention_config": DUAL_CHUNK}),
    ("residual_multiplier", {"residual_multiplier": 0.22}),
    ("embedding_multiplier", {"embedding_multiplier": 0}),
    ("attention_multiplier", {"attention_multiplier": 0.015}),
    ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
    ("attn_logit_softcapping", {"attn_logit_softcapping": 50}),
    ("use_mrope", {"use_mrope": True}),
    ("rope_interleaved", {"rope_interleaved": True}),
    ("no_rope_layers", {"no_rope_layers": [1, 0]}),
    ("clip_qkv", {"clip_qkv": 8.0}),
    ("num_experts", {"num_experts": 8}),
    ("quantization", {"quantization": {"group_size": 64, "bits": 4}}),
    ("compression_config", {"compression_config": {"format": "pack-quantized"}}),
    ("AutoModelForCausalLM", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}),
    ("sliding_window", {"sliding_window": 4096}),
    ("mlp_bias", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "mlp_bias": True}),
    ("attention_bias", {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_bias": True}),
    ("model_type", {"model_type": "mistral"}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("mrope_section", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}),
    ("attention_factor", {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.2}}),
    ("rope_scaling and rope_parameters",
     {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}),
    ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("layer_types", {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                     "layer_types": ["full_attention", "sliding_attention"]}),
    ("something_new", {"something_new": "on"}),
]  # fmt: skip


@pytest.mark.parametrize(("named", "changes"), CHANGING, ids=[str(c) for _, c in CHANGING])
def test_what_may_change_numbers_is_refused_by_name(named: str, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read(tmp_path, {**LLAMA, **changes})
    assert named in caught.value.message


@pytest.mark.parametrize("count", [1, 2, 30])
def test_unknown_fields_leave_room_to_say_what_to_do(count: int, tmp_path: Path) -> None:
    unknown = {f"something_new_{i}_{'x' * 200}": "on" * 200 for i in range(count)}
    with pytest.raises(UnsupportedModel) as caught:
        read(tmp_path, {**LLAMA, **unknown})
    assert "something_new_0" in caught.value.message
    assert caught.value.message.endswith("take them out of its config.json, and serve that")
    assert ("and 27 more" in caught.value.message) == (count == 30)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_field_that_is_off_is_let_pass(value: object, tmp_path: Path) -> None:
    read(tmp_path, {**LLAMA, "something_new": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", None), ("rms_norm_eps", "1e-5"), ("rms_norm_eps", True), ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", -1e-6), ("rms_norm_eps", 1e300), ("vocab_size", 10**30), ("num_hidden_layers", 10**9),
        ("head_dim", [16]), ("attention_bias", "false"), ("tie_word_embeddings", 1), ("rope_scaling", "yarn"),
        ("rope_theta", 0), ("rope_theta", float("inf")), ("max_position_embeddings", None), ("eos_token_id", "2"),
        ("eos_token_id", [2, True]), ("architectures", "LlamaForCausalLM"), ("architectures", [["x"]]),
        ("dtype", ["float16"]), ("hidden_act", None), ("rope_parameters", {"rope_type": ["yarn"]}),
        ("rope_parameters", {"rope_type": "linear", "factor": 1e300}), ("layer_types", "full_attention"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": "4096"}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": [10**400] * 8, "long_factor": [1] * 8}),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_named_with_what_was_expected(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read(tmp_path, {**LLAMA, key: value})
    assert key in caught.value.message
    assert "expected" in caught.value.message or "supported" in caught.value.message


@pytest.mark.parametrize(
    "text", ['{"vocab_size": ' + "9" * 5000 + "}", "[" * 100_000, "[1]", "3", "\x00", ""], ids=lambda text: text[:20]
)
def test_a_file_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def _full() -> dict[str, Any]:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    more = {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False}
    also = {"tie_word_embeddings": False, "dtype": "float32", "eos_token_id": 2, "hidden_act": "silu"}
    return {**LLAMA, **more, **also, "rope_parameters": rope, "max_position_embeddings": 1024, "sliding_window": None}


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([10**400, -(10**400), 2**63, 1e300, -1e300, 1e-320]),
    st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=5), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
    st.sampled_from(["linear", "dynamic", "yarn", "longrope", "llama3"]),
)  # fmt: skip


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_value_in_any_field_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    raw = _full()
    family = data.draw(st.sampled_from(FAMILIES))
    raw |= {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*raw, "use_sliding_window", "max_window_layers", "layer_types", "auto_map"]))
        inner = raw.get("rope_parameters")
        if key == "rope_parameters" and isinstance(inner, dict) and data.draw(st.booleans()):
            names = [*inner, "short_factor", "beta_fast", "mscale", "truncate", "low_freq_factor"]
            raw[key] = {**inner, data.draw(st.sampled_from(names)): data.draw(ODD)}
        else:
            raw[key] = data.draw(ODD)
    config = None
    with contextlib.suppress(UnsupportedModel):
        config = read(tmp_path, raw)
    if config is not None and config.head_dim <= 1024:
        for length in (1, 5000):
            frequencies, factor = inverse_frequencies(config.rope, config.head_dim, length)
            assert frequencies.isfinite().all()
            assert math.isfinite(factor)
