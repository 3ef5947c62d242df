"""Reports of GPU runs: ``python -m bench.kernel_table DIR`` writes DIR/report.md from a folder of `bench.gpu`.

With ``--save`` the run is saved to bench/results and its tiles to the kernels' folder. Without DIR it writes
docs/kernels.md from the newest results of `bench.gpu` and `bench.aot`. Does not import torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import measure
from bench.gpu_goals import verdicts
from bench.gpu_rows import Line, Rows, facts, results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TUNED = ROOT / "engine" / "kernels" / "triton" / "tuned"
_MEASURED = ("baton", "bench", "cli", "decode_node", "demo", "engine", "kvtransfer", "prefill_node", "router")
_RIGHT: dict[bool | None, str] = {True: "yes", False: "**NO**", None: "-"}
_COUNTED = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")


def source_digest() -> str:
    """A digest of the measured code, for machines without git: equal to that of the commit."""
    digest = hashlib.sha256()
    found = (path for folder in _MEASURED for kind in ("*.py", "*.json") for path in (ROOT / folder).rglob(kind))
    for path in sorted(path for path in found if path.parent != RESULTS):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def record(lines: list[Line]) -> dict[str, Any]:
    """The folder of one run as one result: every case with the results of its parts."""
    runs = [line for line in lines if line["kind"] == "run"]
    last = runs[-1] if runs else {}
    known = facts(lines)
    is_same = bool(last) and last.get("source") == source_digest()
    return {
        "date": datetime.fromtimestamp(last.get("at", 0), UTC).isoformat(timespec="seconds"),
        "commit": last.get("commit") or (measure.commit() if is_same else ""),
        "source": last.get("source", ""),
        "device": known.get("device", "not known"),
        "is_gpu": known.get("is_gpu", False),
        "versions": last.get("versions", {}),
        "facts": known,
        "runs": [{key: run.get(key) for key in ("argv", "minutes", "commit", "source", "at")} for run in runs],
        "stages": [line for line in lines if line["kind"] == "stage" and line["state"] != "begun"],
        "rows": [_merged(stage, case, parts) for (stage, case), parts in results(lines).items()],
    }


def _merged(stage: str, case: str, parts: dict[str, Line]) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage, "case": case, "peers": {}, "faults": [], "goals": []}
    for name, line in parts.items():
        if line["kind"] == "fault":
            row["faults"].append({key: line[key] for key in ("part", "fault", "said")})
            continue
        row["goals"] += [f"{name.removeprefix('peer ')} {text}" if "peer" in name else text for text in verdicts(line)]
        values = {key: value for key, value in line.items() if key not in ("kind", "at", "stage", "case", "part")}
        if name.startswith("peer "):
            row["peers"][name.removeprefix("peer ")] = {k: values[k] for k in ("us", "ours_us", "ratio") if k in values}
        else:
            row |= values
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | right | us | of the limit | beside | goal |", "|---|---|---|---|---|---|"]
    for row in rows:
        right = _RIGHT[row.get("is_right")]
        if isinstance(row.get("error"), float):
            right += f", {row['error']:.1e}"
        limits = [
            f"{row[f'percent_of_{key}']:.0f} % of {key}" for key in ("copy", "products") if f"percent_of_{key}" in row
        ]
        peers = [f"{name} {peer['ratio']:.2f}x" for name, peer in row["peers"].items() if "ratio" in peer]
        us = f"{row['us']:.1f}" if isinstance(row.get("us"), float) else ""
        cells = [_case(row), right, us, ", ".join(limits), ", ".join(peers), "; ".join(row["goals"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _case(row: dict[str, Any]) -> str:
    return row["case"].rstrip(" |").replace(" | ", ", ") or "(the stage)"


def report(folder: Path) -> str:
    """Writes report.md; returns its head."""
    found = record(Rows(folder).read())
    head = summary(found)
    parts = [head, ""]
    for stage in dict.fromkeys(row["stage"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["stage"] == stage]
        if stage == "machine":
            continue
        parts += [f"## {stage}", "", table(rows), ""]
        said = [f"- {_case(row)}: {row['said']}" for row in rows if row.get("said")]
        parts += [*said, ""] if said else []
    (folder / "report.md").write_text("\n".join(parts))
    return head


def summary(found: dict[str, Any]) -> str:
    """The facts of the run, its failures, and the goals that were reached."""
    rows = found["rows"]
    lines = [
        f"# {found['device']}, {found['date']}",
        "",
        f"Commit {found['commit'] or 'not known'}, source {found['source']}. "
        + ", ".join(f"{key} {value}" for key, value in found["facts"].items() if key != "device"),
        "",
        "| stage | ended | seconds |",
        "|---|---|---|",
        *(f"| {s['stage']} | {s['state']} | {s.get('took_s', '')} |" for s in found["stages"]),
        "",
    ]
    right = sum(row.get("is_right") is True for row in rows)
    wrong = [_case(row) for row in rows if row.get("is_right") is False]
    lines.append(f"{len(rows)} cases, {right} right, {len(wrong)} wrong{': ' + '; '.join(wrong) if wrong else '.'}")
    faults = [(row, fault) for row in rows for fault in row["faults"]]
    lines.append(f"{len(faults)} faults{':' if faults else '.'}")
    lines += [
        f"- {row['stage']}, {_case(row)}, {fault['part']}: {fault['fault']}: {_last_line(fault['said'])}"
        for row, fault in faults
    ]
    goals = [goal.rpartition(": ")[2] for row in rows for goal in row["goals"]]
    reached = {name: goals.count(name) for name in dict.fromkeys(goals)}
    lines.append(f"Goals: {', '.join(f'{count} {name}' for name, count in reached.items()) or 'nothing was timed'}.")
    return "\n".join(lines)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def save(folder: Path) -> list[Path]:
    """Save the folder's record to bench/results, and its tiles, if measured on a GPU, to the kernels' folder."""
    found = record(Rows(folder).read())
    if not found["commit"]:
        raise SystemExit(
            f"{folder} was measured from other sources than these, {found['source']}: "
            "check its commit out, or run with --commit"
        )
    stamp = found["date"].replace(":", "").partition("+")[0]
    path = RESULTS / f"{'gpu' if found['is_gpu'] else 'gpu-interpreter'}-{stamp}Z.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return [path, *save_tiles(folder)]


def save_tiles(folder: Path) -> list[Path]:
    """Save the tiles to the kernels' folder; does nothing if no GPU measured any."""
    tuned = folder / "tuned.json"
    if not tuned.exists():
        return []
    data = json.loads(tuned.read_text())
    if not data["is_measured"]:
        return []
    from engine.kernels.triton.tuning import file_name, parse

    parse(data, str(tuned))
    path = TUNED / file_name(data["gpu"])
    shutil.copyfile(tuned, path)
    return [path]


def _newest(pattern: str) -> Path | None:
    found = sorted(RESULTS.glob(pattern))
    return found[-1] if found else None


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
    """The largest error of each kernel by dtype, and whether a row alone had the same bits as in its batch."""
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
    """Each kernel by architecture and Triton version, over all its configurations."""
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


# For a row: launches that do work, and the minimum and maximum bytes per logit. The maximum applies if every chunk
# holds a value near the bound of top_k and top_p. Reading or writing all logits is 4 bytes each.
_DRAWN = (
    ("greedy", 2, 4, 4, "best value"),
    ("plain, min_p", 3, 8, 8, "best value, masses; then one chunk"),
    ("top_k, top_p", 6, 8, 16, "best value, masses above cuts, values between two, masses kept; then one chunk"),
    ("penalties, bias, bans, mask: more", 1, 12, 16, "logits (and counts) in, a copy out, which is read beside them"),
    ("log-probabilities: more", 2, 4, 4, "mass, rank and the most likely"),
)


def drawn(vocab_size: int = 128256, rows: int = 256, bytes_per_s: float = 4.3e12) -> str:
    """The reads and writes of sampling, and the minimum time for them."""
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


def document() -> str:
    """The text of docs/kernels.md."""
    interpreter, measured = _newest("gpu-interpreter-*.json"), _newest("gpu-2*.json")
    assert interpreter, f"no result of the interpreter in {RESULTS}"
    ahead = sorted(RESULTS.glob("aot-triton-*.json"))
    records = [json.loads(path.read_text()) for path in ahead]
    names = ",\n".join(f"`{path.name}`" for path in (interpreter, *((measured,) if measured else ()), *ahead))
    speeds = (
        "**Speeds: not measured on a GPU.** With one, `python -m bench.gpu` checks and times all of it (docs/gpu.md)."
    )
    if measured:
        found = json.loads(measured.read_text())
        timed = [row for row in found["rows"] if row["stage"] in ("time", "steps-0.6b", "steps-8b") and "us" in row]
        speeds = f"## Fast: {found['device']}, {found['date']}, commit {found['commit']}\n\n{table(timed)}"
    tiny = json.loads(interpreter.read_text())
    tiny["rows"] = [row for row in tiny["rows"] if row.get("stage", "tiny") == "tiny"]
    return f"""# GPU kernels: what is proven without a GPU

Written by `python -m bench.kernel_table` from `bench/results`:
{names}.

{speeds}

## Right: worst error under Triton's interpreter

Largest |found - reference| as a share of the largest |reference|, over the shapes of `python -m bench.gpu --tiny`. The
reference is in float64, of products in float32; of the shared prefix it is our own plain path, whose bits it has. More
shapes (every group size, head_dim 16 to 256, windows, blocks of 16 to 128, empty rows, NaN in all unused memory) are in
`tests/kernels/triton_interpreter`. Batch-invariant: a row alone, or a prompt in other chunks, has the same bits. Where
there is "-": contiguous prefill gives the bits of the paged one and rows draw the same in any batch (tests), embedding
and blocks are copies, shared prefixes are left out where bits must not depend on neighbours. The interpreter multiplies
with NumPy: what tensor cores round is for `bench.gpu` to say.

{errors(tiny)}

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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_table", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="that bench.gpu wrote")
    parser.add_argument("--save", action="store_true", help="into bench/results and docs/kernels.md")
    parser.add_argument("--tiles", action="store_true", help="only the tiles, to where the kernels look for them")
    options = parser.parse_args()
    if options.folder is not None:
        print(report(options.folder))
        if options.tiles:
            print("\n".join(map(str, save_tiles(options.folder))) or "no tiles were measured")
        if not options.save:
            return
        print("\n".join(map(str, save(options.folder))))
    (ROOT / "docs" / "kernels.md").write_text(document())


if __name__ == "__main__":
    main()
