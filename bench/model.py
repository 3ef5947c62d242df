"""The 0.25 B bench model: Llama with seeded random weights, written once into a cache folder, never committed."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from demo import tokenizer as demo_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

# Any change below needs a new name: an existing folder is used without a check.
NAME = "llama-0.25b-random-1"
VOCAB_SIZE = 32_000
HIDDEN = 1024
INTERMEDIATE = 2816
NUM_LAYERS = 16
NUM_HEADS = 16
NUM_KV_HEADS = 4
HEAD_DIM = 64
MAX_MODEL_TOKENS = 4096

# Parameters that a decode step reads: all but the input embedding, of which it reads one row.
NUM_STEP_PARAMETERS = NUM_LAYERS * (
    HIDDEN * (2 * NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
) + HIDDEN * (VOCAB_SIZE + 1)


def kv_bytes_per_token(dtype_bytes: int) -> int:
    """Bytes of keys and values of one token in all layers."""
    return NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * dtype_bytes


def cache_folder() -> Path:
    """The folder for generated models; BATON_BENCH_CACHE overrides it."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "baton-bench"
    return Path(os.environ.get("BATON_BENCH_CACHE", default))


def bench_model() -> Path:
    """The folder of the bench model, created on first use (half a gigabyte, seconds)."""
    folder = cache_folder() / NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed, so that a folder of that name is always complete.
    made = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        _write(made)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _write(folder: Path) -> None:
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": MAX_MODEL_TOKENS,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}) + "\n")
    demo_tokenizer.save(demo_tokenizer.build(vocab_size=VOCAB_SIZE), folder, MAX_MODEL_TOKENS)
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})


def _weights() -> dict[str, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        return values.to(torch.bfloat16)

    kv_size = NUM_KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (NUM_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (kv_size, HIDDEN),
        "self_attn.v_proj": (kv_size, HIDDEN),
        "self_attn.o_proj": (HIDDEN, NUM_HEADS * HEAD_DIM),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    weights = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN), "lm_head.weight": matrix(VOCAB_SIZE, HIDDEN)}
    for layer in range(NUM_LAYERS):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    weights["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return weights
