"""Reads a Model from a Hugging Face ``config.json``, of any decoder-only transformer. No torch.

It only counts: a model that the engine refuses can be planned with. What cannot be counted is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from baton.fields import Fields
from baton.files import read_object
from planner.models import Model

# Families call the same thing by different names; the first that is there counts.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")
# Their MLP is two matrices; all others have a gate as well.
_PLAIN_MLP = frozenset(
    ("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "phi",
     "starcoder2")
)  # fmt: skip
# Hugging Face takes embeddings for tied where the file does not say, but for these.
_UNTIED = frozenset(
    ("deepseek", "falcon_h1", "glm4_moe", "gpt_neox", "gpt_oss", "gptj", "internlm2", "llama", "llama4_text", "mistral",
     "mixtral", "olmo", "olmo2", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
     "stablelm", "yi")
)  # fmt: skip
_DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float64": 8.0}
# Bytes of a quantized parameter; group scales add about 4 % to 4 bits in groups of 128.
_METHOD_BITS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4, "awq": 4, "gptq": 4, "bitsandbytes": 8}
_BITS_IN_BYTE = 8


def read(path: Path, name: str = "") -> Model:
    """``path`` is the file or its folder; ``name`` is for reports, the folder's if empty. Raises UnsupportedModel."""
    file = path / "config.json" if path.is_dir() else path
    return model_of(Fields(read_object(file), str(file)), name or file.resolve().parent.name)


def model_of(fields: Fields, name: str) -> Model:
    if inside := fields.fields("text_config"):
        # Of a model that takes pictures as well; those and what reads them are not counted.
        fields = Fields(inside, fields.within("text_config"))
    if "kv_lora_rank" in fields:
        raise fields.refusal("keys and values are kept as one latent vector (kv_lora_rank), which is not counted")
    kind = fields.text("model_type") or ""
    hidden, layers, heads = (_required(fields, keys) for keys in (_HIDDEN, _LAYERS, _HEADS))
    kv_heads = _optional(fields, _KV_HEADS) or _kv_heads_of_flags(fields, kind, heads)
    if heads % kv_heads:
        raise fields.refusal(f"{heads} attention heads are not a multiple of {kv_heads} KV heads")
    head_dim = _optional(fields, ("head_dim",)) or hidden // heads
    embedding = _required(fields, ("vocab_size",)) * hidden
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    # A norm before each half, and one at the end.
    norms = (2 * layers + 1) * hidden
    mlp = _mlp(fields, kind, hidden, layers)
    active = embedding + layers * attention + norms + mlp.dense + mlp.experts * mlp.used_share
    is_tied = fields.flag("tie_word_embeddings", kind not in _UNTIED)
    return Model(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_parameters=active + mlp.experts * (1 - mlp.used_share) + (0 if is_tied else embedding),
        num_active_parameters=active,
        num_experts=mlp.num_experts,
        num_experts_per_token=mlp.num_used,
        num_expert_parameters=mlp.experts,
        bytes_per_parameter=_bytes_per_parameter(fields),
        bytes_per_kv_value=_dtype_bytes(fields),
    )


class _Mlp(NamedTuple):
    """Parameters of all layers: those that each token uses, and those of the experts."""

    dense: float
    experts: float = 0.0
    num_experts: int = 0
    num_used: int = 0

    @property
    def used_share(self) -> float:
        return self.num_used / self.num_experts if self.num_experts else 0.0


def _mlp(fields: Fields, kind: str, hidden: int, layers: int) -> _Mlp:
    inner = _optional(fields, _INNER) or 4 * hidden
    matrix = hidden * (2 if kind in _PLAIN_MLP else 3)
    num_experts = _optional(fields, _EXPERTS) or 0
    if num_experts < 2:
        return _Mlp(float(layers * matrix * inner))
    num_used = _required(fields, _EXPERTS_PER_TOKEN)
    if num_used > num_experts:
        raise fields.refusal(f"a token uses {num_used} of {num_experts} experts")
    expert_inner = _optional(fields, ("moe_intermediate_size", "expert_ffn_hidden_size")) or inner
    shared_inner = _optional(fields, ("shared_expert_intermediate_size",)) or 0
    shared_inner += (_optional(fields, ("n_shared_experts",)) or 0) * expert_inner
    num_dense = _num_dense_layers(fields, layers)
    num_sparse = layers - num_dense
    router = hidden * num_experts
    return _Mlp(
        dense=float(num_dense * matrix * inner + num_sparse * (matrix * shared_inner + router)),
        experts=float(num_sparse * num_experts * matrix * expert_inner),
        num_experts=num_experts,
        num_used=num_used,
    )


def _num_dense_layers(fields: Fields, layers: int) -> int:
    """Layers of a mixture of experts that have none."""
    first = _optional(fields, ("first_k_dense_replace",)) or 0
    step = _optional(fields, ("decoder_sparse_step",)) or 1
    listed = fields.get("mlp_only_layers") or []
    return sum(layer < first or (layer + 1) % step != 0 or layer in listed for layer in range(layers))


def _kv_heads_of_flags(fields: Fields, kind: str, heads: int) -> int:
    is_single = fields.flag("multi_query", kind in ("falcon", "gpt_bigcode"))
    return 1 if is_single and not fields.get("new_decoder_architecture") else heads


def _bytes_per_parameter(fields: Fields) -> float:
    quantization = fields.fields("quantization_config")
    if not quantization:
        return _dtype_bytes(fields)
    inside = Fields(quantization, fields.within("quantization_config"))
    method = inside.text("quant_method") or ""
    if inside.get("load_in_4bit"):
        return 4 / _BITS_IN_BYTE
    bits = _optional(inside, ("bits", "w_bit")) or _METHOD_BITS.get(method)
    if bits is None:
        raise inside.fault("quant_method", f"a field bits, or one of {', '.join(_METHOD_BITS)}")
    return bits / _BITS_IN_BYTE


def _dtype_bytes(fields: Fields) -> float:
    key = "dtype" if "dtype" in fields else "torch_dtype"
    dtype = fields.text(key) or "bfloat16"
    if dtype not in _DTYPE_BYTES:
        raise fields.fault(key, f"one of {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[dtype]


def _optional(fields: Fields, keys: tuple[str, ...]) -> int | None:
    for key in keys:
        if fields.get(key) is not None:
            return fields.integer(key, least=0)
    return None


def _required(fields: Fields, keys: tuple[str, ...]) -> int:
    found = _optional(fields, keys)
    if not found:
        raise fields.refusal(f"expected a positive {' or '.join(keys)}")
    return found
