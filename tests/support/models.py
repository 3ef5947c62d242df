"""Small random models in Hugging Face folders: every family, head layout, window and RoPE scaling that is served.

The same cases drive the engine's oracle and the cluster's; weights are drawn wide enough that greedy choices are far
apart compared with float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 211
MAX_POSITIONS = 2048


@dataclass(frozen=True)
class ModelCase:
    """One small model; ``options`` go to the transformers config as they are."""

    name: str
    family: str = "Llama"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 64
    intermediate: int = 96
    layers: int = 2
    tied: bool = False
    rope: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_length_dependent(self) -> bool:
        return self.rope.get("rope_type") == "dynamic"

    def config(self) -> transformers.PreTrainedConfig:
        rope = {"rope_type": "default", "rope_theta": 10_000.0, **self.rope}
        values: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": MAX_POSITIONS,
            "tie_word_embeddings": self.tied,
            "rope_parameters": rope,
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        if self.family == "Mistral":
            values["sliding_window"] = None
        config_class = getattr(transformers, f"{self.family}Config")
        return config_class(**{**values, **self.options})

    def build(self) -> transformers.PreTrainedModel:
        """The model with weights drawn by name; biases and norms are random too, so that ignoring one shows."""
        seed = sum(ord(c) * 31**i for i, c in enumerate(self.name)) % 2**31
        model = getattr(transformers, f"{self.family}ForCausalLM")(self.config()).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                is_norm = "norm" in name
                parameter.copy_(1 + 0.2 * drawn if is_norm else 0.15 * drawn)
        return model

    def save(self, folder: Path, **options: Any) -> Path:
        self.build().save_pretrained(folder, **options)
        return folder


_LONG = [1.0 + 0.25 * i for i in range(16)]
_SHORT = [1.0 + 0.02 * i for i in range(16)]
_ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
    "longrope": {
        "rope_type": "longrope",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "short_factor": _SHORT,
        "long_factor": _LONG,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
_DYNAMIC = {"max_position_embeddings": 400}

ORACLE_CASES: tuple[ModelCase, ...] = (
    ModelCase("llama-mha-d16", heads=4, kv_heads=4, head_dim=16),
    ModelCase("llama-gqa2-d32"),
    ModelCase("llama-gqa4-d64", heads=8, kv_heads=2, head_dim=64, tied=True),
    ModelCase("llama-gqa8-d128", heads=8, kv_heads=1, head_dim=128),
    ModelCase("llama-gqa3-d24", heads=6, kv_heads=2, head_dim=24, hidden=96, tied=True),
    ModelCase("llama-biases", options={"attention_bias": True, "mlp_bias": True}),
    ModelCase("llama-theta", rope={"rope_theta": 500_000.0}, layers=3),
    ModelCase("llama-linear", rope=_ROPE["linear"]),
    ModelCase("llama-dynamic", rope=_ROPE["dynamic"], options=_DYNAMIC),
    ModelCase("llama-yarn", rope=_ROPE["yarn"], heads=8, kv_heads=2),
    ModelCase("llama-longrope", rope=_ROPE["longrope"]),
    ModelCase("llama-llama3", rope=_ROPE["llama3"], tied=True),
    ModelCase("mistral-full", family="Mistral", heads=4, kv_heads=4),
    ModelCase("mistral-window-40", family="Mistral", options={"sliding_window": 40}),
    ModelCase("mistral-window-64", family="Mistral", heads=8, kv_heads=1, options={"sliding_window": 64}),
    ModelCase("mistral-window-200-d80", family="Mistral", head_dim=80, options={"sliding_window": 200}, tied=True),
    ModelCase("mistral-yarn", family="Mistral", rope=_ROPE["yarn"], options={"sliding_window": 129}),
    ModelCase("qwen2-gqa7", family="Qwen2", heads=7, kv_heads=1, hidden=112, head_dim=16, tied=True),
    ModelCase("qwen2-mha", family="Qwen2", heads=2, kv_heads=2, hidden=64, head_dim=32),
    ModelCase(
        "qwen2-window",
        family="Qwen2",
        layers=3,
        options={"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
    ),
    ModelCase(
        "qwen2-yarn-mscale",
        family="Qwen2",
        rope={**_ROPE["yarn"], "mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False},
    ),
    ModelCase("qwen2-dynamic", family="Qwen2", rope=_ROPE["dynamic"], options=_DYNAMIC),
    ModelCase("qwen3-gqa2-d128", family="Qwen3", head_dim=128),
    ModelCase("qwen3-gqa8-d96", family="Qwen3", heads=8, kv_heads=1, head_dim=96, tied=True),
    ModelCase("qwen3-bias", family="Qwen3", heads=4, kv_heads=4, options={"attention_bias": True}),
    ModelCase(
        "qwen3-window",
        family="Qwen3",
        options={"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1},
    ),
    ModelCase("qwen3-longrope", family="Qwen3", rope=_ROPE["longrope"]),
    ModelCase("qwen3-llama3", family="Qwen3", rope=_ROPE["llama3"], tied=True),
)
