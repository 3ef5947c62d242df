"""What a model is, read from a Hugging Face config.json. No torch.

Everything the engine cannot serve exactly is refused here, by name, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baton.errors import BadConfig, quoted
from baton.fields import Fields
from baton.files import read_object
from baton.types import DTYPE_BYTES, RopeRegimes
from engine.config_keys import refuse_unknown

_SILU = ("silu", "swish")
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ROPE_ALIASES = {"su": "longrope"}
# Lists with an item per layer are made before any weight is looked at.
_MAX_LAYERS = 10_000
# Far beyond all models; products and quotients with a length stay finite.
_MIN_FACTOR, _MAX_FACTOR = 1e-6, 1e6
# YaRN divides by its logarithm.
_MIN_THETA = 1.001


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: the type and the numbers its formula takes; None where the formula has its own default."""

    rope_type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int = 2048
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies change once a sequence outgrows the trained context."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def regimes(self) -> RopeRegimes | None:
        """For which lengths of a prompt frequencies are equal; None: for all."""
        if self.rope_type == "dynamic":
            return RopeRegimes(self.max_position_embeddings, is_each_its_own=True)
        if self.rope_type == "longrope":
            return RopeRegimes(self.original_max_position_embeddings, is_each_its_own=False)
        return None


@dataclass(frozen=True, slots=True)
class _Family:
    """How the architectures differ from each other."""

    model_type: str
    qkv_bias: bool | None = None  # None: config's attention_bias decides
    output_bias: bool | None = False  # None: as qkv_bias
    mlp_bias: bool = False  # whether config's mlp_bias counts
    qk_norm: bool = False
    default_head_dim: int | None = None
    window: str = "none"  # none | always (config's sliding_window) | switched (use_sliding_window, max_window_layers)
    default_max_positions: int = 2048
    default_eps: float = 1e-6


_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family("llama", output_bias=None, mlp_bias=True),
    "MistralForCausalLM": _Family("mistral", qkv_bias=False, window="always", default_max_positions=131072),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True, window="switched", default_max_positions=32768),
    "Qwen3ForCausalLM": _Family(
        "qwen3", output_bias=None, qk_norm=True, default_head_dim=128, window="switched", default_max_positions=32768
    ),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder-only transformer with RMSNorm, rotary positions, grouped queries and a gated SiLU MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    # Per layer: how many positions, its own included, a token sees; None is all.
    windows: tuple[int | None, ...]
    max_model_tokens: int
    dtype: str
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def within(self, max_tokens: int | None) -> ModelConfig:
        """With a shorter context. Raises BadConfig for a longer one."""
        if max_tokens is None:
            return self
        if max_tokens > self.max_model_tokens:
            raise BadConfig(
                f"--max-model-len is {max_tokens}, expected at most {self.max_model_tokens}, the model's context",
                param="max_model_tokens",
            )
        return replace(self, max_model_tokens=max_tokens)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read ``config.json``. Raises UnsupportedModel naming what cannot be served and why."""
        path = folder / "config.json"
        return _parse(Fields(read_object(path), str(path)))


def _parse(fields: Fields) -> ModelConfig:
    architecture, family = _family(fields)
    _refuse_other_weights(fields)
    hidden = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads, nullable=True)
    if num_heads % num_kv_heads:
        raise fields.refusal(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    head_dim = fields.integer("head_dim", family.default_head_dim or hidden // num_heads, nullable=True)
    if head_dim % 2:
        raise fields.refusal(f"head_dim is {head_dim}, rotary embeddings need an even number")
    num_layers = fields.integer("num_hidden_layers", most=_MAX_LAYERS)
    rope = _rope(fields, family, head_dim)
    qkv_bias = fields.flag("attention_bias", False) if family.qkv_bias is None else family.qkv_bias
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", family.default_eps, least=0, most=1),
        rope=rope,
        qkv_bias=qkv_bias,
        output_bias=qkv_bias if family.output_bias is None else family.output_bias,
        mlp_bias=family.mlp_bias and fields.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        windows=_windows(fields, architecture, family, num_layers),
        max_model_tokens=_max_model_tokens(rope),
        dtype=_dtype(fields),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )
    refuse_unknown(fields)
    return config


def _family(fields: Fields) -> tuple[str, _Family]:
    architectures, model_type = fields.texts("architectures"), fields.text("model_type")
    for name in architectures:
        if name in _FAMILIES:
            family = _FAMILIES[name]
            if model_type is not None and model_type != family.model_type:
                raise fields.fault("model_type", f"{family.model_type!r} beside architecture {name}")
            return name, family
    named = ", ".join(architectures) or f"none (model_type {quoted(model_type)})"
    raise fields.refusal(f"architecture {named} is not supported; supported are {', '.join(_FAMILIES)}")


def _refuse_other_weights(fields: Fields) -> None:
    """Numbers that come from elsewhere than float weights and the code here."""
    quantization = fields.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise fields.refusal(
            f"quantization_config ({quoted(method)}) is set, but quantized weights are not supported; "
            "use an unquantized checkpoint, of which --quantization int8 makes 8-bit weights"
        )
    own_code = [name for name in fields.fields("auto_map") if name.startswith("AutoModel")]
    if own_code:
        raise fields.refusal(
            f"auto_map names the model's own code for {quoted(own_code[0])}, which is never run here; remove auto_map "
            "if transformers gives the same without trust_remote_code"
        )
    if fields.get("hidden_act") not in _SILU and "hidden_act" in fields:
        raise fields.fault("hidden_act", "'silu'")


def _rope(fields: Fields, family: _Family, head_dim: int) -> RopeConfig:
    """Both spellings: ``rope_parameters`` (transformers 5), ``rope_theta`` + ``rope_scaling`` (before)."""
    scaling, parameters = fields.fields("rope_scaling"), fields.fields("rope_parameters")
    if scaling and parameters and scaling != parameters:
        raise fields.refusal("rope_scaling and rope_parameters are both set and differ, expected one of them")
    params = Fields(parameters or scaling, fields.within("rope_parameters" if parameters else "rope_scaling"))
    if any(isinstance(value, dict) for value in (parameters or scaling).values()):
        raise fields.refusal("rope_parameters differ by layer type, which is not supported")
    old_name, rope_type = params.text("type"), params.text("rope_type")
    rope_type = rope_type or old_name or "default"
    rope_type = _ROPE_ALIASES.get(rope_type, rope_type)
    if rope_type not in _ROPE_TYPES:
        raise params.refusal(f"rope_type {quoted(rope_type)} is not supported; known are {', '.join(_ROPE_TYPES)}")
    for place in (params, fields):
        partial = place.get("partial_rotary_factor")
        if partial is not None and (isinstance(partial, bool) or partial != 1):
            raise place.fault("partial_rotary_factor", "1")
    max_positions = fields.integer("max_position_embeddings", family.default_max_positions)
    original = params.integer("original_max_position_embeddings", max_positions, least=2, nullable=True)
    original = fields.integer("original_max_position_embeddings", original, least=2, nullable=True)
    theta = fields.number("rope_theta", 10_000.0, least=_MIN_THETA, most=_MAX_FACTOR**2, nullable=True)
    values: dict[str, Any] = {
        "rope_type": rope_type,
        "theta": params.number("rope_theta", theta, least=_MIN_THETA, most=_MAX_FACTOR**2, nullable=True),
        "max_position_embeddings": max_positions,
        "original_max_position_embeddings": original,
    }
    if rope_type != "default":
        values |= _scaling(params, rope_type, max_positions / original, head_dim)
    # YaRN's authors noted whether a model was trained with it.
    refuse_unknown(params, harmless=frozenset({"finetuned"}))
    return RopeConfig(**values)


def _scaling(params: Fields, rope_type: str, default_factor: float, head_dim: int) -> dict[str, Any]:
    """The numbers that one scaling type takes."""
    values: dict[str, Any] = {}
    if rope_type in ("yarn", "longrope"):
        least = min(1.0, default_factor)
        values["factor"] = params.number("factor", default_factor, least=least, most=_MAX_FACTOR, nullable=True)
        values["attention_factor"] = params.optional_number("attention_factor", least=0, most=_MAX_FACTOR)
    else:
        values["factor"] = params.number("factor", least=1, most=_MAX_FACTOR)
    if rope_type == "dynamic" and head_dim < 4:
        raise params.refusal(f"head_dim is {head_dim}, expected at least 4 with dynamic scaling")
    if rope_type == "yarn":
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            values[name] = params.number(name, default, least=_MIN_FACTOR, most=_MAX_FACTOR, nullable=True)
        values["truncate"] = params.flag("truncate", True)
        for name in ("mscale", "mscale_all_dim"):
            values[name] = params.optional_number(name, least=0, most=_MAX_FACTOR)
    if rope_type == "llama3":
        low = values["low_freq_factor"] = params.number("low_freq_factor", least=_MIN_FACTOR, most=_MAX_FACTOR)
        values["high_freq_factor"] = params.number("high_freq_factor", least=_MIN_FACTOR, most=_MAX_FACTOR)
        if values["high_freq_factor"] <= low:
            raise params.fault("high_freq_factor", f"more than low_freq_factor, which is {low}")
    if rope_type == "longrope":
        for key in ("short_factor", "long_factor"):
            values[key] = params.numbers(key, head_dim // 2, most=_MAX_FACTOR)
    return values


def _max_model_tokens(rope: RopeConfig) -> int:
    """Linear and dynamic scaling stretch the stated length; yarn counts from the original one; others state it."""
    if rope.rope_type in ("linear", "dynamic"):
        return int(rope.max_position_embeddings * rope.factor)
    if rope.rope_type == "yarn":
        return max(rope.max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
    return rope.max_position_embeddings


def _windows(fields: Fields, architecture: str, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    window = None if family.window == "none" else 4096
    if "sliding_window" in fields:
        window = None if fields.get("sliding_window") is None else fields.integer("sliding_window", least=0)
    # Mistral never looked at the switch.
    is_on = fields.flag("use_sliding_window", family.window != "switched") or family.window == "always"
    window = window if is_on else None
    first = fields.integer("max_window_layers", 28, least=0)
    if window is not None and family.window == "none":
        raise fields.fault("sliding_window", f"null, as {architecture} has no windows")
    if window == 0:
        raise fields.fault("sliding_window", "a positive integer or null")
    kinds = fields.texts("layer_types")
    if not kinds:
        starts = first if family.window == "switched" else 0
        return tuple(window if layer >= starts else None for layer in range(num_layers))
    known = {"full_attention": None} | ({"sliding_attention": window} if window is not None else {})
    if family.window == "always" and window is not None:
        del known["full_attention"]
    if len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise fields.fault("layer_types", f"{num_layers} of {', '.join(known)}, by the other fields")
    return tuple(known[kind] for kind in kinds)


def _dtype(fields: Fields) -> str:
    old_name, name = fields.text("torch_dtype"), fields.text("dtype")
    name = name or old_name or "float32"
    if name not in DTYPE_BYTES:
        raise fields.refusal(f"dtype is {quoted(name)}, supported are {', '.join(DTYPE_BYTES)}")
    return name
