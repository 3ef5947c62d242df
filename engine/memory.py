"""Computes the memory of weights and KV cache, the available memory, and the cache's share of it. No torch.

On a processor everything is computed before any weight is read, within every container's limit. On a GPU the caller
measures, and this module does the sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from baton.errors import BadConfig
from baton.types import DTYPE_BYTES, KvLayout, blocks_for
from engine.config import EngineConfig
from engine.cost import CostModel
from engine.model_config import ModelConfig

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Share of the memory that remains on a processor after weights and activations. Other processes may grow, the kernel
# decides which process to kill when memory is short, and the page cache keeps the model's files for the next start.
_HOST_SHARE = 0.5
# Python, torch and gRPC beside weights, cache and activations: about 320 MiB were resident in a worker of the demo's
# model, files that are mapped included.
_PROCESS_BYTES = 512 << 20
# CUDA's own on a GPU that several workers share: what each of them has of it cannot be told while others load. About
# what a context and the modules of kernels take.
_CONTEXT_BYTES = 1 << 30
# Token id, slot and a tile of attention.
_INPUT_WORDS = 6


@dataclass(frozen=True, slots=True)
class Memory:
    """What can be taken without swapping, and what sets that bound."""

    available_bytes: int
    bound: str


def of_machine(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> Memory:
    """The least of what the machine has and what each control group above this process leaves."""
    machine = Memory(_machine_bytes(proc), "this machine's available memory")
    return min([machine, *_of_groups(proc, cgroups)], key=lambda memory: memory.available_bytes)


def block_bytes(model: ModelConfig, config: EngineConfig, dtype: str) -> int:
    """Of one KV block, all layers."""
    return model.num_layers * model.num_kv_heads * 2 * config.block_tokens * model.head_dim * DTYPE_BYTES[dtype]


def kv_layout(model: ModelConfig, config: EngineConfig, dtype: str, *, kv_bytes: int | None = None) -> KvLayout:
    """Cache geometry: as many blocks as asked for, or as fit into the bytes asked for, else into ``kv_bytes``."""
    per_block = block_bytes(model, config, dtype)
    size = config.kv_bytes if kv_bytes is None else kv_bytes
    if config.num_blocks is None and size is None:
        raise BadConfig("neither engine.num_blocks nor engine.kv_bytes is set, expected one of them", param="kv_bytes")
    num_blocks = (size or 0) // per_block if config.num_blocks is None else config.num_blocks
    if num_blocks < 1:
        raise BadConfig(f"engine.kv_bytes {size} holds no block of {per_block} bytes; give more", param="kv_bytes")
    return KvLayout(
        num_layers=model.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_tokens=config.block_tokens,
        dtype=dtype,
    )


def shown(layout: KvLayout) -> str:
    """The size of the pool in blocks, tokens and bytes."""
    num_tokens = layout.num_blocks * layout.block_tokens
    size = layout.total_bytes
    if size >= 10 << 30:
        amount = f"{size / 2**30:,.1f} GiB"
    else:
        amount = f"{size / 2**20:,.0f} MiB" if size >= 1 << 20 else f"{size / 2**10:,.0f} KiB"
    return f"KV cache: {layout.num_blocks:,} blocks, {num_tokens:,} tokens, {amount}"


def weight_bytes(model: ModelConfig, dtype: str, quantization: str) -> int:
    """The layers, the head, and the embedding, held beside the head even where they are tied, and never quantized."""
    cost = CostModel.of(model, dtype, quantization)
    embedding = model.vocab_size * model.hidden_size * DTYPE_BYTES[dtype]
    return int(cost.layer_weight_bytes + cost.head_weight_bytes) + embedding


def recorded_size(most: int) -> int:
    """Rows that a recorded step has room for: powers of two, so that a batch that grows is not recorded each time."""
    return 1 << (most - 1).bit_length() if most else 0


def step_bytes(model: ModelConfig, config: EngineConfig, dtype: str) -> int:
    """Most that the tensors of a step on a processor take, from above. A recorded step keeps them: of every token all
    of one layer's, of every sequence the logits, in the model's dtype and twice in float32."""
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    per_token = 4 * model.hidden_size + 3 * heads + 2 * kv_heads + 3 * model.intermediate_size
    limits = config.scheduler
    num_tokens = recorded_size(limits.max_batch_tokens)
    num_samples = recorded_size(min(limits.max_num_seqs, limits.max_batch_tokens))
    num_blocks = recorded_size(limits.max_num_seqs * blocks_for(model.max_model_tokens, config.block_tokens))
    size = DTYPE_BYTES[dtype]
    if config.quantization == "int8":
        # Rows as products take them: levels of at most two bytes, and for every group a scale and a sum.
        per_token += 3 * (model.hidden_size + heads + model.intermediate_size) // size
    # Beside them ids, slots, tiles and the rotation, of float32.
    inputs = num_tokens * (8 * _INPUT_WORDS + 4 * model.head_dim) + num_samples * 8 * _INPUT_WORDS + num_blocks * 8
    # Scores of one context that is computed in pieces.
    inputs += recorded_size(model.max_model_tokens) * (model.num_heads * 4 + 1)
    return num_tokens * per_token * size + num_samples * model.vocab_size * (size + 2 * 4) + inputs


def host_kv_bytes(memory: Memory, model: ModelConfig, config: EngineConfig, dtype: str, *, num_workers: int = 1) -> int:
    """KV cache of each of ``num_workers`` on a processor if no size was given: half of what remains after weights,
    activations and processes, and at most what ``max_num_seqs`` sequences of full length can use. Raises BadConfig if
    that is no block.

    Pages of the cache that are never written cost nothing, so a small load does not pay for a generous pool.
    """
    weights = weight_bytes(model, dtype, config.quantization)
    own_bytes = weights + step_bytes(model, config, dtype) + _PROCESS_BYTES
    left_bytes = memory.available_bytes - num_workers * own_bytes
    size = int(left_bytes * _HOST_SHARE / num_workers)
    per_block = block_bytes(model, config, dtype)
    if size < per_block:
        workers = f"{num_workers} workers with" if num_workers > 1 else "a worker with"
        raise BadConfig(
            f"{workers} {_mib(own_bytes)} of weights, activations and process each leave no KV block of "
            f"{_mib(per_block)} in {_mib(memory.available_bytes)}, {memory.bound}; free memory, give a smaller "
            "--max-batch-tokens, fewer workers, or the size of the cache with --kv-mib",
            param="kv_bytes",
        )
    most_blocks = config.scheduler.max_num_seqs * blocks_for(model.max_model_tokens, config.block_tokens)
    return min(size, most_blocks * per_block)


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What was measured on a GPU, in bytes, before its KV cache is allocated."""

    name: str
    total_bytes: int
    # Used before this worker loaded anything, by all processes, CUDA's own memory for this process included.
    before_bytes: int
    # Most that torch took while weights were loaded and the largest step was computed.
    peak_bytes: int
    # Taken beside torch meanwhile: modules of kernels, workspaces of libraries.
    beside_bytes: int
    # Recorded steps.
    graph_bytes: int
    # After that: free, and taken by torch.
    free_bytes: int
    taken_bytes: int


def gpu_kv_bytes(use: GpuUse, *, utilization: float, num_workers: int, block_bytes: int) -> int:
    """What is left for the KV cache of ``utilization`` of the GPU. Raises BadConfig if that is no block.

    A worker alone counts what others took before it came. Several that share the GPU have equal parts, and what each
    finds taken may be the others' part: of that only what is not free counts.
    """
    budget = utilization * use.total_bytes / num_workers
    if num_workers == 1:
        budget -= use.before_bytes + use.beside_bytes
    else:
        budget -= _CONTEXT_BYTES
    own_bytes = use.peak_bytes + use.graph_bytes
    still_free = use.free_bytes - (own_bytes - use.taken_bytes)
    left = int(min(budget - own_bytes, still_free))
    if left >= block_bytes:
        return left
    among = f", shared by {num_workers} workers" if num_workers > 1 else ""
    taken = (
        f"{_mib(use.before_bytes)} in use before this worker, {_mib(use.free_bytes)} free now; weights and the largest "
        f"step take {_mib(use.peak_bytes)}, recorded steps {_mib(use.graph_bytes)}"
    )
    raise BadConfig(
        f"no KV block of {_mib(block_bytes)} fits on {use.name}, at {utilization:.0%} of its {_mib(use.total_bytes)}"
        f"{among}: {taken}. End what else runs there, raise --gpu-memory-utilization, or lower --max-batch-tokens, "
        "--max-num-seqs or --max-graph-seqs",
        param="gpu_memory_utilization",
    )


def layout_before_loading(
    model: ModelConfig,
    config: EngineConfig,
    dtype: str,
    memory: Memory,
    *,
    num_workers: int = 1,
    is_measured: bool = False,
) -> KvLayout | None:
    """The KV cache of each of ``num_workers``; None if no size was given and it ``is_measured``, on a GPU.

    Raises BadConfig, before anything is read, for what does not fit.
    """
    layout = None
    if config.num_blocks is not None or config.kv_bytes is not None:
        layout = kv_layout(model, config, dtype)
    elif not is_measured:
        size = host_kv_bytes(memory, model, config, dtype, num_workers=num_workers)
        layout = kv_layout(model, config, dtype, kv_bytes=size)
    check_fits(
        memory,
        kv_bytes=0 if layout is None else layout.total_bytes,
        weight_bytes=weight_bytes(model, dtype, config.quantization),
        # On a GPU it is measured as well.
        step_bytes=0 if is_measured else step_bytes(model, config, dtype),
        num_workers=num_workers,
    )
    return layout


def check_fits(
    memory: Memory, *, kv_bytes: int, weight_bytes: int = 0, step_bytes: int = 0, num_workers: int = 1
) -> None:
    """Raise BadConfig unless ``num_workers`` with so many bytes each fit into ``memory``."""
    needed = num_workers * (kv_bytes + weight_bytes + step_bytes)
    if needed <= memory.available_bytes:
        return
    sizes = ("a KV cache", kv_bytes), ("weights", weight_bytes), ("tensors of a step", step_bytes)
    *parts, last = [f"{what} of {_mib(size)}" for what, size in sizes if size]
    workers = f"{num_workers} workers, each with " if num_workers > 1 else ""
    cure = "give a smaller --kv-mib or --num-blocks" if kv_bytes else "free memory there, or take a smaller model"
    if step_bytes:
        cure += ", or a smaller --max-batch-tokens"
    raise BadConfig(
        f"{workers}{', '.join(parts)}{' and ' if parts else ''}{last}: {_mib(needed)} in all, expected at most "
        f"{_mib(memory.available_bytes)}, {memory.bound}; {cure}" + (", or fewer workers" if num_workers > 1 else ""),
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
            # Unused file pages, such as weights that were read and packed, can be reclaimed.
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
