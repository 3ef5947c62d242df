"""Runs the benchmarks: ``python -m bench [--quick] [NAME ...]`` prints tables and saves JSON. Without names it runs all
of BENCHES.

``python -m bench peers``, ``python -m bench serve`` and ``python -m bench clients`` have options of their own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import measure
from loadgen import machine

# Each module has ``run(quick: bool) -> dict``. A list of flat mappings in the result is printed as a table, a mapping
# as a section, anything else as a line. Keys that start with "samples" are saved but not printed.
BENCHES = (
    *("engine", "quantization", "transfer", "router", "cluster", "observability", "hostile", "session"),
    *("prefix", "prefix_placement", "policy", "overload", "interference", "access", "masks", "planner"),
)
# They take gigabytes or most of an hour, so they are not part of "all".
_WITH_OPTIONS = ("peers", "serve", "clients")
RESULTS = Path(__file__).resolve().parent / "results"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return "-" if value is None else str(value)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def show(console: Console, title: str, result: Mapping[str, Any]) -> None:
    """Print the result of a bench: its flat values, its tables, its sections."""
    console.print(f"\n[bold]{title}[/bold]")
    for key, value in result.items():
        if key.startswith("samples"):
            continue
        if _is_rows(value):
            columns = [c for c in dict.fromkeys(c for row in value for c in row) if not c.startswith("samples")]
            table = Table(*columns)
            for row in value:
                table.add_row(*(_text(row.get(column)) for column in columns))
            console.print(table)
        elif isinstance(value, Mapping):
            show(console, f"{title} / {key}", value)
        elif isinstance(value, list | tuple):
            console.print(f"  {key}: {', '.join(map(_text, value))}", highlight=False)
        else:
            console.print(f"  {key}: {_text(value)}", highlight=False)


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in _WITH_OPTIONS:
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        importlib.import_module(f"bench.{sys.argv[1]}.command").main(sys.argv[2:], RESULTS)
        return
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Baton beside its peers and limits.")
    parser.add_argument("what", nargs="*", choices=[*BENCHES, "all"], default=["all"], help="default: all")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats; for a look, not for the record")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    args = parser.parse_args()

    # Set before grpc is imported: else it logs connections to processes that a bench has ended among the tables.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Treated as Ctrl-C: context managers end the processes that a bench has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = BENCHES if "all" in args.what else tuple(dict.fromkeys(args.what))
    started = datetime.now(UTC)
    # Tables are wide, and a pipe or a log file has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 160)
    record: dict[str, Any] = {
        "date": started.isoformat(timespec="seconds"),
        "quick": args.quick,
        "commit": measure.commit(),
        "machine": measure.machine(),
        "versions": machine.versions(),
        "results": {},
    }
    for name in wanted:
        console.print(f"measuring {name} ...")
        record["results"][name] = importlib.import_module(f"bench.{name}").run(args.quick)
        show(console, name, record["results"][name])
    args.out.mkdir(parents=True, exist_ok=True)
    label = "all" if wanted == BENCHES else "-".join(wanted)
    path = args.out / f"{label}-{started.strftime('%Y-%m-%dT%H%M%SZ')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"\nsaved {path}")


if __name__ == "__main__":
    main()
