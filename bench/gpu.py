"""``python -m bench.gpu``: every kernel right, then fast, beside its peers and the limits of the GPU it runs on.

One JSON and one table, within nine minutes on one GPU. ``--tiny`` takes the same path on Triton's interpreter (set
TRITON_INTERPRET=1), where results are checked and nothing is timed. The kernels need torch, triton, numpy and
transformers alone, the cluster at the end what Baton needs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from bench import gpu_kernels, gpu_model, measure
from bench.cases import relative_error
from bench.gpu_measure import NOT_MEASURED, Budget, Device, Work, find_device
from bench.gpu_measure import measure as measure_work
from engine.kernels.triton.tuning import Tuning, load

_COLUMNS = ("kernel", "shape", "is_right", "error", "us", "percent_of_copy", "percent_of_products")

_VERDICTS = {True: "right", False: "WRONG", None: "ran"}


def tuning_for(device: Device) -> Tuning:
    if not device.is_gpu:
        return load("interpreter", (8, 0), 1)
    has = torch.cuda.get_device_properties(0)
    return load(has.name, (has.major, has.minor), has.multi_processor_count)


def all_works(device: Device, tuning: Tuning, *, is_tiny: bool) -> Iterator[Work]:
    """Whole models first: they are what the kernels are for."""
    for sizes in gpu_kernels.TINY if is_tiny else (gpu_kernels.LLAMA_8B,):
        whole = gpu_model.WholeModel(sizes, tuning, device, 2 if is_tiny else 32, 256 if is_tiny else 64 * 4096)
        yield from gpu_model.works(whole, sizes, device)
        del whole
        if device.is_gpu:
            torch.cuda.empty_cache()
        yield from gpu_kernels.works(sizes, tuning, device)


def run(device: Device, *, is_tiny: bool, budget: Budget, only: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    tuning = tuning_for(device)
    for work in all_works(device, tuning, is_tiny=is_tiny):
        if only not in work.kernel:
            continue
        if budget.is_spent:
            skipped.append(f"{work.kernel}, {work.shape}")
            continue
        with torch.inference_mode():
            rows.append(measure_work(work, device, relative_error))
        print(_line(rows[-1]), flush=True)
        if device.is_gpu:
            torch.cuda.empty_cache()
    return {"rows": rows, "skipped_for_lack_of_time": skipped, "tuning": tuning.gpu, "is_tuned": tuning.is_measured}


def _cluster(*, is_gpu: bool) -> dict[str, Any]:
    """The cluster needs all that Baton needs; without it the kernels are measured alone, and this says so."""
    try:
        from bench import gpu_cluster
    except ImportError as error:
        return {"is_right": None, "said": f"not run: {error}"}
    try:
        return gpu_cluster.run(is_gpu=is_gpu)
    except Exception as error:
        # What the kernels gave is not lost with it.
        return {"is_right": False, "wrong": [f"1+1 cluster: {type(error).__name__}: {error}"[-2000:]]}


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['kernel']:36} {row['shape']:32} {_VERDICTS[row['is_right']]:5}"]
    if isinstance(row.get("error"), float):
        parts.append(f"error {row['error']:.1e}")
    if "us" in row:
        parts.append(f"{row['us']:9.1f} us")
    parts += [f"{row[key]:5.1f} % of {key[11:]}" for key in _COLUMNS[5:] if key in row]
    parts += [f"{key[3:]} x{value:.2f}" for key, value in row.items() if key.startswith("vs_")]
    parts += [f"{key[:-5]}: {value}" for key, value in row.items() if key.endswith("_said")]
    if "time" in row:
        parts.append(str(row["time"]))
    if not isinstance(row.get("error", 0.0), float):
        parts.append(str(row["error"]))
    return "  ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for the interpreter")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument(
        "--budget-s", type=float, default=400.0, help="of the kernels; what does not fit is skipped, by name"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not (options.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error(
            "there is no GPU here; `TRITON_INTERPRET=1 python -m bench.gpu --tiny` proves the path without one"
        )
    started = time.monotonic()
    budget = Budget(options.budget_s)
    device = find_device()
    print(f"{device.name}: " + (_limits(device) if device.is_gpu else NOT_MEASURED))
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": measure.commit(),
        "machine": measure.machine(),
        "versions": {**measure.versions(), "triton": triton.__version__},
        "device": device.name,
        "copy_tb_per_s": device.copy_bytes_per_s / 1e12 if device.is_gpu else NOT_MEASURED,
        "products_tflop_per_s": device.flops_per_s / 1e12 if device.is_gpu else NOT_MEASURED,
        **run(device, is_tiny=options.tiny, budget=budget, only=options.only),
    }
    if options.only in "1+1 cluster":
        record["cluster"] = _cluster(is_gpu=device.is_gpu)
        print(f"1+1 cluster: {json.dumps(record['cluster'])}")
    record["took_s"] = round(time.monotonic() - started, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    label = "gpu" if device.is_gpu else "gpu-interpreter"
    path = options.out / f"{label}-{datetime.now(UTC).strftime('%Y-%m-%dT%H%M%SZ')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    wrong = [f"{row['kernel']}, {row['shape']}" for row in record["rows"] if row["is_right"] is False]
    wrong += record.get("cluster", {}).get("wrong", [])
    print(f"{len(record['rows'])} rows, {len(wrong)} wrong {wrong or ''}, {record['took_s']} s: {path}")
    return 1 if wrong else 0


def _limits(device: Device) -> str:
    return f"copies {device.copy_bytes_per_s / 1e12:.2f} TB/s, multiplies {device.flops_per_s / 1e12:.0f} TFLOP/s"


if __name__ == "__main__":
    sys.exit(main())
