"""``python -m bench.tune``: measures tiles on the GPU at hand and writes its file of tunings.

Tiles of keys are part of the numerics, and so the file's digest is part of the kernels' name: nodes with other files
refuse each other. Splits, and the parts and steps of products, are kept as they are. A candidate that is wrong on any
shape, or does not fit, is out. Serving reads the file and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import gpu_kernels
from bench.cases import relative_error
from bench.gpu import tuning_for
from bench.gpu_kernels import Product, Sizes
from bench.gpu_measure import Budget, Device, Work, find_device, measure
from engine.kernels.triton.tuning import GemmPlan, Tuning, parse

_DECODE = [{"block_n": n, "num_warps": w, "num_stages": s} for n in (32, 64, 128) for w in (4, 8) for s in (3, 5, 7)]
_PREFILL = [
    {"block_m": m, "block_n": n, "num_warps": w, "num_stages": s, "programs_per_processor": p}
    for m, w in ((64, 4), (128, 8))
    for n in (32, 64, 128)
    for s in (2, 3, 5)
    for p in (0, 1, 2)
]
_STREAM = [
    {"max_block_m": m, "block_n": n, "num_warps": w, "num_stages": s}
    for m in (32, 64)
    for n in (32, 64, 128)
    for w in (4, 8)
    for s in (3, 5)
]
_GRID = [
    {"block_m": m, "block_n": n, "num_warps": w, "num_stages": s, "programs_per_processor": p}
    for m, n, w in ((64, 128, 4), (128, 128, 8), (128, 256, 8))
    for s in (3, 4)
    for p in (0, 1)
]
# Rows at which the ways to multiply are compared; those of few rows and of many have tiles measured at one size each.
_ROWS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
_FEW_ROWS, _MANY_ROWS = 32, 2048
_NEVER = 1 << 30


def best(
    data: dict[str, Any],
    change: Callable[[dict[str, Any], Any], dict[str, Any]],
    candidates: Iterable[Any],
    works: Callable[[Tuning], Iterator[Work]],
    device: Device,
    budget: Budget,
) -> dict[str, Any]:
    """``data`` changed to the candidate that takes least time over all works, each relative to the first candidate."""
    chosen, least = data, float("inf")
    first: dict[str, float] = {}
    for candidate in candidates:
        if budget.is_spent:
            break
        changed = change(data, candidate)
        with torch.inference_mode():
            # Peers are of no interest here.
            alone = (dataclasses.replace(w, peers={}) for w in works(parse(changed, "candidate")))
            rows = [measure(work, device, relative_error) for work in alone]
        if not all(row["is_right"] for row in rows):
            continue
        taken = {f"{row['kernel']} {row['shape']}": row.get("us", 1.0) for row in rows}
        first = first or taken
        share = sum(taken[name] / first[name] for name in first) / len(first)
        print(f"{share:6.3f}  {candidate}", flush=True)
        if share < least:
            chosen, least = changed, share
    return chosen


def with_tile(section: str, key: str) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    return lambda data, tile: {**data, section: {**data[section], key: {**data[section].get(key, {}), **tile}}}


class Paths(NamedTuple):
    """Microseconds of each way to multiply so many rows."""

    rows: int
    stream: float
    grid: float
    vendor: float


def thresholds(measured: Sequence[Paths]) -> tuple[int, int | None]:
    """(grid_from_rows, vendor_from_rows): where each is faster at that size and at all larger ones. Grid never: behind
    the largest."""
    grid = _from(measured, lambda p: p.grid < p.stream)
    vendor = _from(measured, lambda p: p.vendor < min(p.stream, p.grid))
    return (measured[-1].rows + 1 if grid is None else grid), vendor


def _from(measured: Sequence[Paths], is_better: Callable[[Paths], bool]) -> int | None:
    better = list(itertools.takewhile(is_better, reversed(measured)))
    return better[-1].rows if better else None


def entry(plan: GemmPlan, num_processors: int) -> dict[str, Any]:
    """A plan as a file has it."""
    data = dataclasses.asdict(plan)
    num_programs = data["grid"].pop("num_programs")
    return {**data, "grid": {**data["grid"], "programs_per_processor": num_programs // num_processors}}


def tune_product(
    data: dict[str, Any], product: Product, sizes: Sizes, device: Device, budget: Budget, few: int | None
) -> dict[str, Any]:
    """``data`` with the plan of one shape of weights: tiles first, then which way is taken from how many rows on."""
    key = f"{product.out}x{product.inner}"
    tuning = parse(data, "candidate")
    first = entry(tuning.gemm_plan(product.out, product.inner, sizes.dtype), tuning.num_processors)

    def changed(data: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
        plan = data["gemm"].get(key, first)
        parts = {name: {**plan[name], **value} if isinstance(value, dict) else value for name, value in change.items()}
        return {**data, "gemm": {**data["gemm"], key: {**plan, **parts}}}

    def works(rows: int) -> Callable[[Tuning], Iterator[Work]]:
        chosen = dataclasses.replace(sizes, rows=(rows,))
        return lambda tuning: gpu_kernels.gemm_works(chosen, tuning, device, [product])

    few_rows, many_rows = (sizes.rows[0], sizes.rows[1]) if few else (_FEW_ROWS, _MANY_ROWS)
    stream = [{"stream": tile, "grid_from_rows": few_rows + 1} for tile in ({}, *_STREAM)][:few]
    data = best(data, changed, stream, works(few_rows), device, budget)
    if product.name != "head":  # Many rows of it are never wanted.
        grid = [{"grid": tile, "grid_from_rows": few_rows + 1} for tile in ({}, *_GRID)][:few]
        data = best(data, changed, grid, works(many_rows), device, budget)
    measured = []
    for rows in () if few else _ROWS:
        us: dict[str, dict[str, Any]] = {}
        for way, grid_from_rows in (("stream", rows + 1), ("grid", 1)):
            tuning = parse(changed(data, {"grid_from_rows": grid_from_rows}), "candidate")
            for work in works(rows)(tuning):
                # Both ways' bits were compared when their tiles were chosen.
                us[way] = measure(dataclasses.replace(work, alone=None), device, relative_error)
        if budget.is_spent or not all("us" in row for row in us.values()) or not us:
            break
        ours = us["grid"]
        measured.append(Paths(rows, us["stream"]["us"], ours["us"], ours["us"] * ours.get("vs_cublas", _NEVER)))
    grid_from_rows, vendor_from_rows = thresholds(measured) if measured else (first["grid_from_rows"], None)
    return changed(data, {"grid_from_rows": grid_from_rows, "vendor_from_rows": vendor_from_rows})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(str(resources.files("engine.kernels.triton") / "tuned")))
    parser.add_argument("--budget-s", type=float, default=1500.0)
    parser.add_argument("--tiny", action="store_true", help="the same path under TRITON_INTERPRET=1; chooses nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not (options.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("there is no GPU here")
    device, budget = find_device(), Budget(options.budget_s)
    folder = resources.files("engine.kernels.triton") / "tuned"
    if device.is_gpu:
        base = "sm90.json" if torch.cuda.get_device_capability() >= (9, 0) else "sm80.json"
        sizes = dataclasses.replace(gpu_kernels.LLAMA_8B, prefill=((4, 4096),), chunked=((2048, 8192),))
    else:
        base, sizes = "interpreter.json", dataclasses.replace(gpu_kernels.TINY[1], block_tokens=(64,))
    data = json.loads((folder / base).read_text())
    count = tuning_for(device).num_processors
    data |= {"gpu": device.name, "is_measured": device.is_gpu, "num_processors": count}
    few = 2 if options.tiny else None
    key = min((k for k in data["decode"] if int(k) >= sizes.shape.head_dim), key=int)
    block_tokens = sizes.block_tokens[0]
    data = best(
        data, with_tile("decode", key), [data["decode"][key], *_DECODE][:few],
        lambda tuning: gpu_kernels.decode_works(sizes, tuning, device, block_tokens), device, budget,
    )  # fmt: skip
    data = best(
        data, with_tile("prefill", key), [data["prefill"][key], *_PREFILL][:few],
        lambda tuning: gpu_kernels.prefill_works(sizes, tuning, device, block_tokens), device, budget,
    )  # fmt: skip
    for product in gpu_kernels.products(sizes):
        data = tune_product(data, product, sizes, device, budget, few)
    path = options.out / f"{device.name.lower().replace(' ', '-').replace(',', '')}.json"
    path.write_text(json.dumps(data, indent=2) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
