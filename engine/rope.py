"""Rotary position embedding: inverse frequencies of every supported scaling, and the cosines and sines of a step.

A row's values depend on (position, prompt length) alone, never on what else is in the step. Dynamic and longrope
frequencies follow the length a sequence has when the token is computed: the whole prompt for prompt tokens, position
+ 1 for generated ones, as `generate` of transformers does, and unlike it also after a re-run.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor

from engine.model_config import RopeConfig

# Cosines are made for whole tiles of positions, so that a position's bits do not depend on its neighbours.
_TILE = 256
_MAX_CACHED_TILES = 4096


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int) -> tuple[Tensor, float]:
    """([head_dim / 2] float32, factor for cos and sin) for a sequence of ``length`` tokens."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    if rope.rope_type == "dynamic":
        longest = max(length, rope.max_position_embeddings)
        stretch = rope.factor * longest / rope.max_position_embeddings - (rope.factor - 1)
        return 1.0 / (rope.theta * stretch ** (head_dim / (head_dim - 2))) ** exponents, 1.0
    if rope.rope_type == "longrope":
        is_long = length > rope.original_max_position_embeddings
        factors = torch.tensor(rope.long_factor if is_long else rope.short_factor, dtype=torch.float32)
        return 1.0 / (factors * rope.theta**exponents), _longrope_attention_factor(rope)
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, exponents)
    inverse = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return inverse / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, inverse), 1.0
    return inverse, 1.0


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


def _yarn(rope: RopeConfig, head_dim: int, exponents: Tensor) -> tuple[Tensor, float]:
    """Interpolates slow dimensions, keeps fast ones, ramps between (arXiv:2309.00071)."""

    def dimension(rotations: float) -> float:
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    frequencies = rope.theta**exponents
    kept = 1 - ramp
    inverse = 1.0 / (rope.factor * frequencies) * (1 - kept) + 1.0 / frequencies * kept
    return inverse, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _llama3(rope: RopeConfig, inverse: Tensor) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    length = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    blend = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    scaled = torch.where(wavelength > length / rope.low_freq_factor, inverse / rope.factor, inverse)
    is_between = (wavelength >= length / rope.high_freq_factor) & (wavelength <= length / rope.low_freq_factor)
    return torch.where(is_between, (1 - blend) * inverse / rope.factor + blend * inverse, scaled)


class RopeTable:
    """Cosines and sines by position, made on demand and kept."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self._rope = rope
        self._head_dim = head_dim
        # [2 (cos, sin), positions so far, head_dim / 2]; unused where frequencies depend on the length.
        self._table = torch.empty(2, 0, head_dim // 2)
        self._tiles: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def rows(self, positions: Tensor, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [rows, head_dim / 2] float32, of int64 ``positions`` in prompts of given lengths."""
        if not self._rope.depends_on_length:
            self._grow(int(positions.max()) + 1)
            cos, sin = self._table
            return cos[positions], sin[positions]
        both = torch.empty(2, len(positions), self._head_dim // 2)
        lengths = torch.maximum(prompt_lengths, positions + 1)
        keys = torch.stack((self._effective(lengths), positions // _TILE), dim=1)
        found, inverse = torch.unique(keys, dim=0, return_inverse=True)
        for i, (length, tile) in enumerate(found.tolist()):
            rows = (inverse == i).nonzero()[:, 0]
            both[:, rows] = self._tile(length, tile)[:, positions[rows] % _TILE]
        return both[0], both[1]

    def _effective(self, lengths: Tensor) -> Tensor:
        """Lengths that give equal frequencies, mapped to one of them."""
        if self._rope.rope_type == "dynamic":
            return lengths.clamp(min=self._rope.max_position_embeddings)
        limit = self._rope.original_max_position_embeddings
        return torch.where(lengths > limit, limit + 1, limit)

    def _grow(self, num_positions: int) -> None:
        have = self._table.shape[1]
        if num_positions <= have:
            return
        tiles = range(have // _TILE, max(-(-num_positions // _TILE), 2 * have // _TILE))
        self._table = torch.cat([self._table, *(self._make(0, tile) for tile in tiles)], dim=1)

    def _tile(self, length: int, tile: int) -> Tensor:
        key = (length, tile)
        values = self._tiles.get(key)
        if values is None:
            values = self._tiles[key] = self._make(length, tile)
            if len(self._tiles) > _MAX_CACHED_TILES:
                self._tiles.popitem(last=False)
        else:
            self._tiles.move_to_end(key)
        return values

    def _make(self, length: int, tile: int) -> Tensor:
        inverse, factor = inverse_frequencies(self._rope, self._head_dim, length)
        positions = torch.arange(tile * _TILE, (tile + 1) * _TILE, dtype=torch.float32)
        angles = positions[:, None] * inverse
        return torch.stack((angles.cos() * factor, angles.sin() * factor))
