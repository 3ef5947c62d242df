"""``python -m bench.kernel_table``: docs/kernels.md from the newest results of `bench.gpu` and `bench.aot`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
_COUNTED = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")


def _newest(pattern: str) -> Path:
    found = sorted(RESULTS.glob(pattern))
    assert found, f"no {pattern} in {RESULTS}"
    return found[-1]


def _range(values: Iterable[int]) -> str:
    values = [*values]
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"


def _by(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[key] for key in keys), []).append(row)
    return grouped


def errors(record: dict[str, Any]) -> str:
    """Worst error of each kernel by dtype, and whether a row alone had the bits it had in its batch."""
    rows = [{**row, "kernel": row["kernel"].partition(" ")[0] if row["kernel"].startswith("product") else row["kernel"]}
            for row in record["rows"]]  # fmt: skip
    lines = ["| kernel | shapes | float32 | float16 | bfloat16 | batch-invariant |", "|---|---|---|---|---|---|"]
    for (kernel,), group in _by([{**r, "kernel": r["kernel"].rstrip(",")} for r in rows], "kernel").items():
        worst = {
            dtype: max((r["error"] for r in group if r.get("dtype") == dtype and "error" in r), default=None)
            for dtype in ("float32", "float16", "bfloat16")
        }
        same = [r["is_batch_invariant"] for r in group if "is_batch_invariant" in r]
        if all(value is None for value in worst.values()):
            continue
        cells = ["-" if value is None else f"{value:.1e}" for value in worst.values()]
        shapes = len({r["shape"] for r in group})
        lines.append(
            f"| {kernel} | {shapes} | {' | '.join(cells)} | {('yes' if all(same) else 'NO') if same else '-'} |"
        )
    return "\n".join(lines)


def compiled(records: list[dict[str, Any]]) -> str:
    """Each kernel by architecture and version of Triton, over all its configurations."""
    lines = [
        "| kernel | target | Triton | configurations | registers | shared memory, bytes | spills | "
        + " | ".join(_COUNTED) + " |",
        "|---" * (7 + len(_COUNTED)) + "|",
    ]  # fmt: skip
    rows = [row for record in records for row in record["kernels"]]
    for (kernel, arch, version), group in sorted(_by(rows, "kernel", "arch", "triton").items()):
        spills = sum(bool(row["stack_bytes"] or row["instructions"]["STL"]) for row in group)
        cells = [
            f"`{kernel}`", f"sm_{arch}", version, str(len(group)), _range(r["registers"] for r in group),
            _range(r["shared_bytes"] for r in group), str(spills),
            *(_range(r["instructions"][name] for r in group) for name in _COUNTED),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def faults(records: list[dict[str, Any]]) -> str:
    found = [
        f"- `{row['kernel']}`, sm_{row['arch']}, Triton {row['triton']}, {row['case']}: {'; '.join(row['faults'])}"
        for record in records
        for row in record["kernels"]
        if row["faults"]
    ]
    return "\n".join(found) if found else "None."


# Of a row: launches that do something, and bytes per logit at least and at most. The most is where every chunk holds a
# value near the bound of top_k and top_p. A read or a write of all logits is 4 bytes each.
_DRAWN = (
    ("greedy", 2, 4, 4, "best value"),
    ("plain, min_p", 3, 8, 8, "best value, masses; then one chunk"),
    ("top_k, top_p", 6, 8, 16, "best value, masses above cuts, values between two, masses kept; then one chunk"),
    ("penalties, bias, bans, mask: more", 1, 12, 16, "logits (and counts) in, a copy out, which is read beside them"),
    ("log-probabilities: more", 2, 4, 4, "mass, rank and the most likely"),
)


def drawn(vocab_size: int = 128256, rows: int = 256, bytes_per_s: float = 4.3e12) -> str:
    """What drawing reads and writes, and the least time of that alone."""
    lines = [
        f"| row | launches at work | bytes a logit | MB at {rows} x {vocab_size:,} | us for these alone | passes |",
        "|---|---|---|---|---|---|",
    ]
    for name, launches, least, most, passes in _DRAWN:
        sizes = [rows * vocab_size * size for size in sorted({least, most})]
        cells = (
            name, str(launches), _range((least, most)), "-".join(f"{size / 1e6:.0f}" for size in sizes),
            "-".join(f"{size / bytes_per_s * 1e6:.0f}" for size in sizes), passes,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    interpreter = _newest("gpu-interpreter-*.json")
    ahead = sorted(RESULTS.glob("aot-triton-*.json"))
    records = [json.loads(path.read_text()) for path in ahead]
    names = ", ".join(f"`{path.name}`" for path in ahead)
    text = f"""# GPU kernels: what is proven without a GPU

Written by `python -m bench.kernel_table` from `bench/results/{interpreter.name}` and
{names}.
**Speeds: not measured on a GPU.** With one, `python -m bench.gpu` checks and times all of it at Llama-3-8B's shapes.

## Right: worst error under Triton's interpreter

Largest |found - reference| as a share of the largest |reference|, over the shapes of `python -m bench.gpu --tiny`. The
reference is in float64, of products in float32; of the shared prefix it is our own plain path, whose bits it has. More
shapes (every group size, head_dim 16 to 256, windows, blocks of 16 to 128, empty rows, NaN in all unused memory) are in
`tests/kernels/triton_interpreter`. Batch-invariant: a row alone, or a prompt in other chunks, has the same bits. Where
there is "-": contiguous prefill gives the bits of the paged one and rows draw the same in any batch (tests), embedding
and blocks are copies, shared prefixes are left out where bits must not depend on neighbours. The interpreter multiplies
with NumPy: what tensor cores round is for `bench.gpu` to say.

{errors(json.loads(interpreter.read_text()))}

## Compiled: every configuration in use, ahead of time

`python -m bench.aot`: kernels x models (Llama-3-8B, 1B, Qwen3, Mistral with its window, head_dim 80, 96, 256) x dtypes
on the default tiles. Spills is the number of configurations with any stack. HGMMA is Hopper's warp-group product,
UTMALDG a load by descriptor, LDGSTS an asynchronous copy. Decode attention uses HMMA on purpose: a group of query heads
fills 16 rows, not 64.

{compiled(records)}

Configurations with a fault (spill, too much shared memory, no HGMMA where meant):

{faults(records)}

## Counted: what drawing tokens moves

A step draws in nine launches, recorded with it; a row leaves those that it does not need after a look. Before, one
program a row read its logits about 35 times for top_p. Time is bytes over 4.3 TB/s, what a copy reaches on an H200: a
bound, not a measurement.

{drawn()}
"""
    (ROOT / "docs" / "kernels.md").write_text(text)


if __name__ == "__main__":
    main()
