"""What a model is (read from a Hugging Face config.json) and how the engine runs it. No torch.

Everything the engine cannot serve exactly is refused here, by name, before a weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import BadConfig, UnsupportedModel
from baton.types import DTYPE_BYTES

_SILU = ("silu", "swish")
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ROPE_ALIASES = {"su": "longrope"}


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


@dataclass(frozen=True, slots=True)
class _Family:
    """How the architectures differ from each other."""

    qkv_bias: bool | None = None  # None: config's attention_bias decides
    output_bias: bool | None = False  # None: as qkv_bias
    mlp_bias: bool = False  # whether config's mlp_bias counts
    qk_norm: bool = False
    default_head_dim: int | None = None
    window: str = "none"  # none | always (config's sliding_window) | switched (use_sliding_window, max_window_layers)
    default_max_positions: int = 2048
    default_eps: float = 1e-6


_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(output_bias=None, mlp_bias=True),
    "MistralForCausalLM": _Family(qkv_bias=False, window="always", default_max_positions=131072),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, window="switched", default_max_positions=32768),
    "Qwen3ForCausalLM": _Family(
        output_bias=None, qk_norm=True, default_head_dim=128, window="switched", default_max_positions=32768
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

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read ``config.json``. Raises UnsupportedModel naming what cannot be served and why."""
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UnsupportedModel(f"{path} does not exist; expected a Hugging Face model folder") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UnsupportedModel(f"{path} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise UnsupportedModel(f"{path} holds a {type(raw).__name__}, expected an object")
        return _parse(raw, str(path))


def _parse(raw: Mapping[str, Any], source: str) -> ModelConfig:
    architecture, family = _family(raw, source)
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"{source}: quantization_config ({method}) is set, but quantized weights are not supported; "
            "use an unquantized checkpoint"
        )
    act = raw.get("hidden_act", "silu")
    if act not in _SILU:
        raise UnsupportedModel(f"{source}: hidden_act is {act!r}, supported is 'silu'")
    hidden = _integer(raw, "hidden_size", source)
    num_heads = _integer(raw, "num_attention_heads", source)
    num_kv_heads = _integer(raw, "num_key_value_heads", source, default=num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModel(
            f"{source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    head_dim = _integer(raw, "head_dim", source, default=family.default_head_dim or hidden // num_heads)
    if head_dim % 2:
        raise UnsupportedModel(f"{source}: head_dim is {head_dim}, rotary embeddings need an even number")
    num_layers = _integer(raw, "num_hidden_layers", source)
    rope = _rope(raw, family, head_dim, source)
    attention_bias = bool(raw.get("attention_bias", False))
    qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    return ModelConfig(
        architecture=architecture,
        vocab_size=_integer(raw, "vocab_size", source),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size", source),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", family.default_eps)),
        rope=rope,
        qkv_bias=qkv_bias,
        output_bias=qkv_bias if family.output_bias is None else family.output_bias,
        mlp_bias=family.mlp_bias and bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        windows=_windows(raw, family, num_layers, source),
        max_model_tokens=_max_model_tokens(rope),
        dtype=_dtype(raw, source),
        eos_token_ids=_eos(raw),
    )


def _family(raw: Mapping[str, Any], source: str) -> tuple[str, _Family]:
    architectures = raw.get("architectures") or []
    for name in architectures:
        if name in _FAMILIES:
            return name, _FAMILIES[name]
    named = ", ".join(map(str, architectures)) or f"none (model_type {raw.get('model_type')!r})"
    raise UnsupportedModel(f"{source}: architecture {named} is not supported; supported are {', '.join(_FAMILIES)}")


def _integer(raw: Mapping[str, Any], key: str, source: str, *, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"{source}: {key} is {raw.get(key)!r}, expected a positive integer")
    return value


def _number(raw: Mapping[str, Any], key: str, source: str, *, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedModel(f"{source}: rope parameter {key} is {raw.get(key)!r}, expected a number")
    return float(value)


def _rope(raw: Mapping[str, Any], family: _Family, head_dim: int, source: str) -> RopeConfig:
    """Both spellings: ``rope_parameters`` (transformers 5), ``rope_theta`` + ``rope_scaling`` (before)."""
    params: dict[str, Any] = dict(raw.get("rope_scaling") or {})
    params.update(raw.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in params.values()):
        raise UnsupportedModel(f"{source}: rope_parameters differ by layer type, which is not supported")
    rope_type = params.get("rope_type") or params.get("type") or "default"
    rope_type = _ROPE_ALIASES.get(rope_type, rope_type)
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModel(
            f"{source}: rope_type {rope_type!r} is not supported; known are {', '.join(_ROPE_TYPES)}"
        )
    partial = params.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModel(f"{source}: partial_rotary_factor is {partial}, supported is 1")
    max_positions = _integer(raw, "max_position_embeddings", source, default=family.default_max_positions)
    original = raw.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    original = max_positions if original is None else int(original)
    theta = params.get("rope_theta")
    values: dict[str, Any] = {
        "rope_type": rope_type,
        "theta": _number(raw, "rope_theta", source, default=10_000.0) if theta is None else float(theta),
        "max_position_embeddings": max_positions,
        "original_max_position_embeddings": original,
    }
    if rope_type != "default":
        values |= _scaling(params, rope_type, max_positions / original, head_dim, source)
    return RopeConfig(**values)


def _scaling(
    params: Mapping[str, Any], rope_type: str, default_factor: float, head_dim: int, source: str
) -> dict[str, Any]:
    """The numbers that one scaling type takes."""
    values: dict[str, Any] = {}
    if rope_type in ("yarn", "longrope"):
        values["factor"] = _number(params, "factor", source, default=default_factor)
        if params.get("attention_factor") is not None:
            values["attention_factor"] = _number(params, "attention_factor", source)
    else:
        values["factor"] = _number(params, "factor", source)
    if rope_type == "yarn":
        values["beta_fast"] = params.get("beta_fast") or 32.0
        values["beta_slow"] = params.get("beta_slow") or 1.0
        values["truncate"] = bool(params.get("truncate", True))
        values["mscale"] = params.get("mscale")
        values["mscale_all_dim"] = params.get("mscale_all_dim")
    if rope_type == "llama3":
        values["low_freq_factor"] = _number(params, "low_freq_factor", source)
        values["high_freq_factor"] = _number(params, "high_freq_factor", source)
    if rope_type == "longrope":
        for key in ("short_factor", "long_factor"):
            factors = params.get(key)
            if not isinstance(factors, list) or len(factors) != head_dim // 2:
                raise UnsupportedModel(f"{source}: {key} of longrope must be a list of {head_dim // 2} numbers")
            values[key] = tuple(float(f) for f in factors)
    return values


def _max_model_tokens(rope: RopeConfig) -> int:
    """Linear and dynamic scaling stretch the stated length; yarn counts from the original one; others state it."""
    if rope.rope_type in ("linear", "dynamic"):
        return int(rope.max_position_embeddings * rope.factor)
    if rope.rope_type == "yarn":
        return max(rope.max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
    return rope.max_position_embeddings


def _windows(raw: Mapping[str, Any], family: _Family, num_layers: int, source: str) -> tuple[int | None, ...]:
    if family.window == "none":
        return (None,) * num_layers
    window = raw.get("sliding_window", 4096)
    if family.window == "switched" and not raw.get("use_sliding_window", False):
        window = None
    if window is None:
        return (None,) * num_layers
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise UnsupportedModel(f"{source}: sliding_window is {window!r}, expected a positive integer or null")
    if family.window == "always":
        return (window,) * num_layers
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window}
    if len(layer_types) != num_layers or any(kind not in known for kind in layer_types):
        raise UnsupportedModel(f"{source}: layer_types {layer_types} is not {num_layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in layer_types)


def _dtype(raw: Mapping[str, Any], source: str) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPE_BYTES:
        raise UnsupportedModel(f"{source}: dtype is {name!r}, supported are {', '.join(DTYPE_BYTES)}")
    return str(name)


def _eos(raw: Mapping[str, Any]) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one replica runs. ``num_blocks`` wins over ``kv_bytes``; ``num_threads`` 0 leaves torch's setting alone.

    ``max_graph_seqs``: GPUs record decode steps of up to so many sequences when they start; 0 is none. Without
    ``is_batch_invariant`` kernels may be faster and tokens depend on what else is in a step.
    """

    dtype: str = "auto"
    block_tokens: int = 64
    num_blocks: int | None = None
    kv_bytes: int = 1 << 30
    max_batch_tokens: int = 2048
    max_num_seqs: int = 256
    max_graph_seqs: int = 256
    kernels: str = "auto"
    is_batch_invariant: bool = True
    num_threads: int = 0

    def __post_init__(self) -> None:
        self._check(self.dtype in ("auto", *DTYPE_BYTES), "dtype", f"auto or one of {', '.join(DTYPE_BYTES)}")
        known = ("auto", "cpu", "triton", "reference")
        self._check(self.kernels in known, "kernels", "auto, cpu, triton or reference")
        is_power = self.block_tokens >= 16 and self.block_tokens & (self.block_tokens - 1) == 0
        self._check(is_power, "block_tokens", "a power of two, at least 16")
        self._check(self.num_blocks is None or self.num_blocks >= 1, "num_blocks", "at least 1, or none")
        for name in ("kv_bytes", "max_batch_tokens", "max_num_seqs"):
            self._check(getattr(self, name) >= 1, name, "at least 1")
        self._check(self.num_threads >= 0, "num_threads", "0 (torch's own choice) or more")
        self._check(self.max_graph_seqs >= 0, "max_graph_seqs", "0 (record nothing) or more")

    def _check(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise BadConfig(f"engine.{name} is {getattr(self, name)!r}, expected {expected}", param=name)
