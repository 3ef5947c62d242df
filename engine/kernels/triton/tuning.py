"""The tiles of each kernel by GPU: data, looked up when the engine starts. Serving measures nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any, TypeVar

import torch

from baton.errors import BadConfig

_log = logging.getLogger(__name__)
_Data = TypeVar("_Data")


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """``split_tokens`` is part of the numerics: changing it changes bits, so it is one value per GPU, not per shape."""

    split_tokens: int
    block_n: int
    num_warps: int
    num_stages: int
    # Rows of a tile of the shared-prefix kernel.
    prefix_block_m: int = 64


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """``num_programs`` 0: one program per tile, scheduled by the hardware; otherwise programs that loop over tiles."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_programs: int = 0


@dataclass(frozen=True, slots=True)
class StreamTile:
    """Products of few rows: ``block_n`` rows of weights by up to ``max_block_m`` rows of activations."""

    max_block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    has_descriptors: bool = False


@dataclass(frozen=True, slots=True)
class GridTile:
    """Products of many rows; ``num_programs`` as in PrefillTile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_programs: int = 0
    has_descriptors: bool = False


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """The plan for one (out, in). ``splits`` and ``block_k`` are part of the numerics, the tiles are not."""

    splits: int
    block_k: int
    stream: StreamTile
    grid: GridTile
    # From this many rows on, the tiles for many rows are used.
    grid_from_rows: int
    # From this many rows on the vendor's product is used, if batch-invariance is off; None: never.
    vendor_from_rows: int | None = None

    def one_kernel(self) -> GemmPlan:
        """For hardware that fails `gemm.probe`: one kernel with one tile for any number of rows."""
        return replace(self, grid_from_rows=1)


@dataclass(frozen=True, slots=True)
class Tuning:
    """All choices for one GPU. Attention tiles are by head_dim: the smallest key that is large enough."""

    gpu: str
    is_measured: bool
    num_processors: int
    decode: dict[int, DecodeTile]
    prefill: dict[int, PrefillTile]
    # Layers with a window have a third loop and fewer free registers.
    prefill_windowed: dict[int, PrefillTile]
    # By (out, in); other shapes are planned from the default.
    gemm: dict[tuple[int, int], GemmPlan]
    gemm_default: GemmPlan
    # For any shape in float32: exact tensor cores do not exist, and a value needs twice the memory.
    decode_float32: DecodeTile
    prefill_float32: PrefillTile
    gemm_float32: GemmPlan
    # A digest of the data; nodes of one numeric class have the same.
    digest: str

    def decode_tile(self, head_dim: int, dtype: torch.dtype) -> DecodeTile:
        tile = _by_head_dim(self.decode, head_dim)
        return self.decode_float32 if dtype == torch.float32 else tile

    def prefill_tile(self, head_dim: int, dtype: torch.dtype, *, is_windowed: bool) -> PrefillTile:
        tile = _by_head_dim(self.prefill_windowed if is_windowed else self.prefill, head_dim)
        return self.prefill_float32 if dtype == torch.float32 else tile

    def gemm_plan(self, out_features: int, in_features: int, dtype: torch.dtype) -> GemmPlan:
        """The measured plan, or the default, split so that the programs of a decode step fill the processors."""
        measured = self.gemm.get((out_features, in_features))
        if measured is not None and dtype != torch.float32:
            return measured
        plan = self.gemm_float32 if dtype == torch.float32 else self.gemm_default
        tiles = -(-out_features // plan.stream.block_n)
        steps = -(-in_features // plan.block_k)
        # Two programs per processor, each with no fewer than eight steps.
        splits = max(1, min(2 * self.num_processors // tiles, steps // 8, 16))
        # With more than one part, sums of parts are kept beside the running part: half the tile.
        grid = plan.grid if splits == 1 else replace(plan.grid, block_n=min(128, plan.grid.block_n))
        return replace(plan, splits=splits, grid=grid)


def _by_head_dim(tiles: dict[int, _Data], head_dim: int) -> _Data:
    fitting = [key for key in tiles if key >= head_dim]
    if not fitting:
        raise BadConfig(f"head_dim {head_dim} is not supported, expected at most {max(tiles)}", param="kernels")
    return tiles[min(fitting)]


def file_name(gpu: str) -> str:
    """The file name for a GPU, from the driver's name for it."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def load(gpu: str, capability: tuple[int, int], num_processors: int) -> Tuning:
    """The tuning of this GPU; otherwise the defaults of its architecture, with one warning."""
    folder = resources.files(__package__) / "tuned"
    own = folder / file_name(gpu)
    if own.is_file():
        return parse(json.loads(own.read_text()), own.name, num_processors)
    default = folder / ("sm90.json" if capability >= (9, 0) else "sm80.json")
    _log.warning("no tuning for %s: using the unmeasured defaults of %s; `make tune` measures", gpu, default.name)
    return parse(json.loads(default.read_text()), default.name, num_processors)


_KEYS = {
    "gpu", "is_measured", "num_processors", "split_tokens", "decode", "prefill", "prefill_windowed", "gemm",
    "gemm_default", "decode_float32", "prefill_float32", "gemm_float32",
}  # fmt: skip


def parse(data: dict[str, Any], source: str, num_processors: int | None = None) -> Tuning:
    """Raises BadConfig with file and key for invalid data."""
    if set(data) != _KEYS:
        raise BadConfig(f"{source} has the keys {sorted(data)}, expected {sorted(_KEYS)}", param="tuning")
    count = data["num_processors"] if num_processors is None else num_processors
    split = data["split_tokens"]
    decode = {int(k): _build(DecodeTile, {"split_tokens": split, **v}, source) for k, v in data["decode"].items()}
    decode_float32 = _build(DecodeTile, {"split_tokens": split, **data["decode_float32"]}, source)
    for tile in (*decode.values(), decode_float32):
        if split % tile.block_n:
            raise BadConfig(f"{source}: split_tokens {split} is no multiple of block_n {tile.block_n}", param="tuning")
    gemm = {}
    for key, value in data["gemm"].items():
        out_features, _, in_features = key.partition("x")
        gemm[int(out_features), int(in_features)] = _gemm_plan(value, source, count)
    return Tuning(
        gpu=data["gpu"],
        is_measured=data["is_measured"],
        num_processors=count,
        decode=decode,
        prefill=_prefill_tiles(data["prefill"], source, count),
        prefill_windowed=_prefill_tiles(data["prefill_windowed"], source, count),
        gemm=gemm,
        gemm_default=_gemm_plan(data["gemm_default"], source, count),
        decode_float32=decode_float32,
        prefill_float32=_build(PrefillTile, _programs(data["prefill_float32"], count), source),
        gemm_float32=_gemm_plan(data["gemm_float32"], source, count),
        digest=hashlib.sha256(json.dumps([data, count], sort_keys=True).encode()).hexdigest()[:8],
    )


def _prefill_tiles(data: dict[str, Any], source: str, num_processors: int) -> dict[int, PrefillTile]:
    return {int(key): _build(PrefillTile, _programs(value, num_processors), source) for key, value in data.items()}


def _programs(data: dict[str, Any], num_processors: int) -> dict[str, Any]:
    """Files have programs per processor, tiles the total number."""
    rest = {key: value for key, value in data.items() if key != "programs_per_processor"}
    return {**rest, "num_programs": data.get("programs_per_processor", 0) * num_processors}


def _gemm_plan(data: dict[str, Any], source: str, num_processors: int) -> GemmPlan:
    parts = {
        "stream": _build(StreamTile, data.get("stream", {}), source),
        "grid": _build(GridTile, _programs(data.get("grid", {}), num_processors), source),
    }
    return _build(GemmPlan, {**data, **parts}, source)


def _build(kind: type[_Data], data: dict[str, Any], source: str) -> _Data:
    try:
        return kind(**data)
    except TypeError as error:
        known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
        raise BadConfig(f"{source}: {kind.__name__} got {sorted(data)}, expected {known}", param="tuning") from error
