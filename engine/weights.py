"""Reads safetensors checkpoints, memory-mapped, checked name by name; knows the digest that two nodes compare.

Never converts, quantizes or guesses: a tensor that is missing, superfluous or of another shape stops the start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.errors import UnsupportedModel
from engine.config import ModelConfig

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Buffers that older checkpoints saved and that are computed here.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model has, by its checkpoint name."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for layer in range(c.num_layers):
        at = f"model.layers.{layer}."
        for name, out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{at}self_attn.{name}.weight"] = (out, c.hidden_size)
            if c.qkv_bias:
                shapes[f"{at}self_attn.{name}.bias"] = (out,)
        shapes[f"{at}self_attn.o_proj.weight"] = (c.hidden_size, q)
        if c.output_bias:
            shapes[f"{at}self_attn.o_proj.bias"] = (c.hidden_size,)
        if c.qk_norm:
            shapes[f"{at}self_attn.q_norm.weight"] = shapes[f"{at}self_attn.k_norm.weight"] = (c.head_dim,)
        for name, out, width in (
            ("gate_proj", c.intermediate_size, c.hidden_size),
            ("up_proj", c.intermediate_size, c.hidden_size),
            ("down_proj", c.hidden_size, c.intermediate_size),
        ):
            shapes[f"{at}mlp.{name}.weight"] = (out, width)
            if c.mlp_bias:
                shapes[f"{at}mlp.{name}.bias"] = (out,)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (c.hidden_size,)
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tied_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


class Checkpoint:
    """The tensors of a model folder, mapped into memory. A context manager; tensors are read while it is open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        try:
            for path in _shards(self._folder):
                shard = self._stack.enter_context(safe_open(path, framework="pt"))
                self._files.update(dict.fromkeys(shard.keys(), shard))
        except (OSError, SafetensorError) as error:
            self._stack.close()
            raise UnsupportedModel(f"weights in {self._folder} cannot be read: {error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._files.clear()
        self._stack.close()

    def names(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def check(self, config: ModelConfig) -> None:
        """Raise UnsupportedModel unless the tensors are exactly those of the config."""
        expected = expected_shapes(config)
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise UnsupportedModel(_named(f"weights in {self._folder} lack", missing))
        allowed = {"lm_head.weight"} if config.tied_embeddings else set()
        unexpected = [
            name
            for name in self.names()
            if name not in expected and name not in allowed and not name.endswith(_IGNORED_SUFFIXES)
        ]
        if unexpected:
            raise UnsupportedModel(
                _named(f"weights in {self._folder} hold what {config.architecture} does not have:", unexpected)
            )
        for name, shape in expected.items():
            view = self._files[name].get_slice(name)
            found = tuple(view.get_shape())
            if found != shape:
                raise UnsupportedModel(
                    f"tensor {name} in {self._folder} has shape {found}, expected {shape} by config.json"
                )
            if view.get_dtype() not in _FLOATS:
                raise UnsupportedModel(
                    f"tensor {name} in {self._folder} has dtype {view.get_dtype()}, supported are {', '.join(_FLOATS)}"
                )

    def tensor(self, name: str) -> Tensor:
        """The tensor as it lies on disk."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _named(text: str, names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{text} {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shards(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise UnsupportedModel(f"{index} is not a safetensors index: {error!r}") from error
        if any(Path(name).name != name for name in files):
            raise UnsupportedModel(f"{index} names files outside its folder")
        return [folder / name for name in files]
    if single.exists():
        return [single]
    found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights"
    raise UnsupportedModel(f"{folder} holds {found}; expected model.safetensors or model.safetensors.index.json")


def fingerprint(folder: Path) -> str:
    """Digest of config and all weights, independent of sharding; nodes that differ in it never exchange KV."""
    config = ModelConfig.from_folder(folder)
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    with Checkpoint(folder) as checkpoint:
        checkpoint.check(config)
        for name in expected_shapes(config):
            tensor = checkpoint.tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
