"""The tensors of a model folder by name: file, offset, shape and type of each. No torch.

A tensor that is missing, superfluous, saved twice or of another shape is refused before any is read.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from baton.errors import UnsupportedModel
from engine.model_config import ModelConfig
from engine.shards import check_map, named, open_weights, weight_files

# As safetensors calls them.
FLOATS = ("F32", "BF16", "F16")
# Buffers that older checkpoints saved and that are computed here, from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model has, by its checkpoint name."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (c.vocab_size, c.hidden_size)}
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
        shapes[HEAD] = (c.vocab_size, c.hidden_size)
    return shapes


class TensorFiles:
    """The files of a folder's weights, open. A context manager; ``framework`` is what tensors would be read for."""

    def __init__(self, folder: Path, framework: str) -> None:
        self._folder = folder
        self._framework = framework
        self._stack = ExitStack()
        # By tensor: the open file, its name, and what the tensor is called there.
        self._files: dict[str, tuple[Any, str, str]] = {}

    def __enter__(self) -> Self:
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
        self._files.clear()
        self._stack.close()

    def has_own_head(self, config: ModelConfig) -> bool:
        """Whether embeddings that the config ties were saved twice.

        Raises UnsupportedModel unless the tensors are exactly those of the config.
        """
        if not config.tied_embeddings or HEAD not in self._files:
            self._check_tensors(config)
            return False
        # Transformers finds the one that was saved under the other's name.
        self._files.setdefault(EMBEDDING, self._files[HEAD])
        self._check_tensors(replace(config, tied_embeddings=False))
        return True

    def _open(self, path: Path) -> None:
        shard = self._stack.enter_context(open_weights(path, self._framework))
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
            if view.get_dtype() not in FLOATS:
                raise UnsupportedModel(
                    f"tensor {name} in {self._folder} has dtype {view.get_dtype()}, supported are {', '.join(FLOATS)}"
                )
