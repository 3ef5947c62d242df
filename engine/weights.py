"""Reads safetensors checkpoints, memory-mapped and checked name by name, and computes the digest that nodes compare.

Never converts or quantizes; engine/tensors refuses tensors that do not match the config. For tied embeddings the file
decides, as in transformers: a saved head that differs is used.

The digest covers every byte, and is computed while loading, from the pages that the load reads anyway. XXH3 with 128
bits detects other weights and damaged ones; it does not resist files made to collide, but a person who can put such
files on a node needs no collision. No digest is kept between starts, so none can be outdated.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

import torch
import xxhash
from torch import Tensor

from engine.model_config import ModelConfig
from engine.tensors import EMBEDDING, HEAD, TensorFiles, expected_shapes


class Checkpoint(TensorFiles):
    """The tensors of a model folder, mapped into memory. A context manager; tensors are read while it is open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "pt")
        # By tensor: what a thread of its own makes of it, once it was asked for.
        self._digests: dict[str, Future[str]] = {}
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="baton-weights")

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._hasher.shutdown(cancel_futures=True)
        super().__exit__(kind, value, tb)

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
        if name not in self._digests:
            self._digests[name] = self._hasher.submit(_digest, tensor)
        return tensor

    def fingerprint(self, config: ModelConfig) -> str:
        """Digest of ``config``, as returned by ``check``, and of all weights, independent of sharding; nodes with
        different ones never exchange KV. Reads the tensors that were not read yet."""
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


def quantized_fingerprint(digest: str, quantization: str) -> str:
    """Of the numbers that the model computes with: other weights are made of the same files."""
    return digest if quantization == "none" else f"{digest}-{quantization}"
