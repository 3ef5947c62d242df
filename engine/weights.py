"""Reads safetensors checkpoints, memory-mapped, checked name by name; knows the digest that two nodes compare.

Never converts, quantizes or guesses; engine/tensors refuses what is not the config's. Of tied embeddings the file
decides, as in transformers: a head that was saved and differs is the model's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.tensors import EMBEDDING, HEAD, TensorFiles, expected_shapes


class Checkpoint(TensorFiles):
    """The tensors of a model folder, mapped into memory. A context manager; tensors are read while it is open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "pt")

    def check(self, config: ModelConfig) -> ModelConfig:
        """``config`` as the tensors have it: whether embeddings are tied, they decide.

        Raises UnsupportedModel unless they are exactly those of the config.
        """
        if not self.has_own_head(config):
            return config
        return replace(config, tied_embeddings=torch.equal(self.tensor(EMBEDDING), self.tensor(HEAD)))

    def tensor(self, name: str) -> Tensor:
        """The tensor as it lies on disk."""
        shard, _, stored_name = self._files[name]
        tensor: Tensor = shard.get_tensor(stored_name)
        return tensor


def fingerprint(folder: Path) -> str:
    """Digest of config and all weights, independent of sharding; nodes that differ in it never exchange KV."""
    with Checkpoint(folder) as checkpoint:
        config = checkpoint.check(ModelConfig.from_folder(folder))
        digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
        for name in expected_shapes(config):
            tensor = checkpoint.tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
