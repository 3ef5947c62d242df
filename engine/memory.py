"""How much memory weights and KV cache take, and how much there is within a container's limits. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from baton.errors import BadConfig
from baton.types import DTYPE_BYTES, KvLayout
from engine.config import EngineConfig, ModelConfig
from engine.cost import CostModel

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """What can be taken without swapping, and what sets that bound."""

    available_bytes: int
    bound: str


def of_machine(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> Memory:
    """The least of what the machine has and what each control group above this process leaves."""
    machine = Memory(_machine_bytes(proc), "this machine's available memory")
    return min([machine, *_of_groups(proc, cgroups)], key=lambda memory: memory.available_bytes)


def kv_layout(model: ModelConfig, config: EngineConfig, dtype: str) -> KvLayout:
    """Cache geometry: as many blocks as asked for, or as fit into ``kv_bytes``."""
    per_block = model.num_layers * model.num_kv_heads * 2 * config.block_tokens * model.head_dim * DTYPE_BYTES[dtype]
    num_blocks = config.kv_bytes // per_block if config.num_blocks is None else config.num_blocks
    if num_blocks < 1:
        raise BadConfig(
            f"engine.kv_bytes {config.kv_bytes} holds no block of {per_block} bytes; give more", param="kv_bytes"
        )
    return KvLayout(
        num_layers=model.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_tokens=config.block_tokens,
        dtype=dtype,
    )


def weight_bytes(model: ModelConfig, dtype: str) -> int:
    """The layers, the embedding and the head, which kernels hold twice where they are tied."""
    cost = CostModel.of(model, dtype)
    return int(cost.layer_weight_bytes + 2 * cost.head_weight_bytes)


def check_fits(memory: Memory, *, kv_bytes: int, weight_bytes: int = 0, num_workers: int = 1) -> None:
    """Raise BadConfig unless ``num_workers`` with so many bytes each fit into ``memory``."""
    needed = num_workers * (kv_bytes + weight_bytes)
    if needed <= memory.available_bytes:
        return
    weights = f" and weights of {_mib(weight_bytes)}" if weight_bytes else ""
    workers = f"{num_workers} workers, each with a" if num_workers > 1 else "a"
    raise BadConfig(
        f"{workers} KV cache of {_mib(kv_bytes)}{weights}: {_mib(needed)} in all, expected at most "
        f"{_mib(memory.available_bytes)}, {memory.bound}; give a smaller --kv-mib or --num-blocks"
        + (", or fewer workers" if num_workers > 1 else ""),
        param="kv_bytes",
    )


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // (1 << 20))} MiB"


def _machine_bytes(proc: Path) -> int:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _of_groups(proc: Path, cgroups: Path) -> Iterator[Memory]:
    """Version 2 has one tree, version 1 one of its own for memory; the limit of every group on the way counts."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _on_the_way(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _on_the_way(cgroups / "memory", path, *names)


def _on_the_way(root: Path, path: str, limit_name: str, usage_name: str, cache_name: str) -> Iterator[Memory]:
    own = PurePosixPath(path.lstrip("/"))
    # In a container the tree starts at its own group, while the path may still count from the machine's root.
    for group in (root / own, *(root / parent for parent in own.parents)):
        limit, usage = _number(group / limit_name), _number(group / usage_name)
        if limit is not None and usage is not None:
            # Pages of files that nobody uses, such as weights that were read and packed, are given back.
            cache = next(
                (int(x.split()[1]) for x in _lines(group / "memory.stat") if x.startswith(f"{cache_name} ")), 0
            )
            available = max(0, limit - max(0, usage - cache))
            yield Memory(available, f"what the limit of {_mib(limit)} in {group / limit_name} leaves")


def _number(path: Path) -> int | None:
    word = next(iter(_lines(path)), "").strip()
    return int(word) if word.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
