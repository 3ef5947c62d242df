"""Writes the bench model (a plain Llama) as one GGUF file in bfloat16, without a vocabulary: prompts are token ids."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

NAME = "model.gguf"
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight``. KeyError for a name that a plain Llama does
    not have."""
    stem = name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    layer, inner = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{int(layer)}.{_NAMES[inner]}.weight"


def tensors(path: Path) -> dict[str, Any]:
    """The bfloat16 tensors of a safetensors file as uint16 arrays of their bits."""
    numpy = import_module("numpy")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}, expected BF16")
        begin, _ = entry["data_offsets"]
        found[name] = numpy.memmap(path, "<u2", "r", 8 + length + begin, tuple(entry["shape"]))
    return found


def interleaved(rows: Any, num_heads: int) -> Any:
    """Rows of a query or key projection in GGUF's order: the two rows of a rotary pair are adjacent instead of half
    a head apart."""
    head_dim = len(rows) // num_heads
    return rows.reshape(num_heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def convert(model: Path, target: Path) -> None:
    gguf, numpy = import_module("gguf"), import_module("numpy")
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(str(target / NAME), "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, bits in tensors(model / "model.safetensors").items():
        if bits.ndim == 1:
            # GGUF files have norms in float32.
            wide = (bits.astype("<u4") << 16).view("<f4")
            writer.add_tensor(gguf_name(name), wide)
            continue
        for part, num_heads in heads.items():
            if part in name:
                bits = interleaved(bits, num_heads)
        raw = numpy.ascontiguousarray(bits).view(numpy.uint8)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
