"""Reads safetensors checkpoints, memory-mapped, checked name by name; knows the digest that two nodes compare.

Never converts, quantizes or guesses: a tensor that is missing, superfluous, saved twice or of another shape stops the
start. Of tied embeddings the file decides, as in transformers: a head that was saved and differs is the model's.

The digest is over every byte, and made beside the loading, from the pages that it reads anyway. XXH3 with 128 bits
tells other weights and damaged ones apart; it is no defence against files that somebody makes up to collide, and who
can put such files on a node needs no collision. Nothing is kept from one start to the next, so nothing is outdated.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from baton.errors import UnsupportedModel
from engine.config import ModelConfig
from engine.shards import check_map, named, open_weights, weight_files

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Buffers that older checkpoints saved and that are computed here, from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model has, by its checkpoint name."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (c.vocab_size, c.hidden_size)}
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
        shapes[_HEAD] = (c.vocab_size, c.hidden_size)
    return shapes


class Checkpoint:
    """The tensors of a model folder, mapped into memory. A context manager; tensors are read while it is open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        # By tensor: the open file, its name, and what the tensor is called there.
        self._files: dict[str, tuple[Any, str, str]] = {}
        # By tensor: what a thread of its own makes of it, once it was asked for.
        self._digests: dict[str, Future[str]] = {}
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="baton-weights")

    def __enter__(self) -> Checkpoint:
        try:
            shards, weight_map = weight_files(self._folder)
            for path in shards:
                self._open(path)
            check_map(self._folder, weight_map, self._places())
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._hasher.shutdown(cancel_futures=True)
        self._files.clear()
        self._stack.close()

    def check(self, config: ModelConfig) -> ModelConfig:
        """``config`` as the tensors have it: whether embeddings are tied, they decide.

        Raises UnsupportedModel unless they are exactly those of the config.
        """
        if config.tied_embeddings and _HEAD in self._files:
            # Transformers finds the one that was saved under the other's name.
            self._files.setdefault(_EMBEDDING, self._files[_HEAD])
            self._check_tensors(replace(config, tied_embeddings=False))
            is_same = torch.equal(self.tensor(_EMBEDDING), self.tensor(_HEAD))
            return replace(config, tied_embeddings=is_same)
        self._check_tensors(config)
        return config

    def _open(self, path: Path) -> None:
        shard = self._stack.enter_context(open_weights(path))
        names = shard.keys()
        twice = [name for name in names if name in self._files]
        if twice:
            raise UnsupportedModel(named(f"{path} and another file of its folder both hold", twice))
        self._files.update({name: (shard, path.name, name) for name in names})

    def _places(self) -> dict[str, str]:
        return {name: place for name, (_, place, _) in self._files.items()}

    def _check_tensors(self, config: ModelConfig) -> None:
        expected = expected_shapes(config)
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise UnsupportedModel(named(f"weights in {self._folder} lack", missing))
        unexpected = [n for n in sorted(self._files) if n not in expected and not n.endswith(_IGNORED_SUFFIXES)]
        if unexpected:
            raise UnsupportedModel(
                named(f"weights in {self._folder} hold what {config.architecture} does not have:", unexpected)
            )
        for name, shape in expected.items():
            shard, _, stored_name = self._files[name]
            view = shard.get_slice(stored_name)
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
        shard, _, stored_name = self._files[name]
        tensor: Tensor = shard.get_tensor(stored_name)
        if name not in self._digests:
            self._digests[name] = self._hasher.submit(_digest, tensor)
        return tensor

    def fingerprint(self, config: ModelConfig) -> str:
        """Digest of ``config``, as ``check`` gave it, and of all weights, independent of sharding; nodes that differ in
        it never exchange KV. Reads what nobody has asked for yet."""
        digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
        for name in expected_shapes(config):
            if name not in self._digests:
                self.tensor(name)
            digest.update(f"{name} {self._digests[name].result()}".encode())
        return digest.hexdigest()


def _digest(tensor: Tensor) -> str:
    """Type, shape and bytes. Lets go of the GIL while it hashes."""
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(content)}"


def fingerprint(folder: Path) -> str:
    """Of a folder that is not loaded."""
    with Checkpoint(folder) as checkpoint:
        return checkpoint.fingerprint(checkpoint.check(ModelConfig.from_folder(folder)))
