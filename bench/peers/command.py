"""``python -m bench peers``: prepares what is missing, measures, prints tables, saves JSON, and ends what it
started."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import measure as facts
from bench import model as bench_model
from bench.peers import engines, report, servers
from bench.peers.book import Book, read
from bench.peers.cells import CELLS, QUICK_CELLS, Probes, processor
from bench.peers.environments import RECIPES, Unavailable, converted, environment
from bench.peers.loads import LOADS, QUICK_LOADS
from loadgen import machine

_ABOUT = "Other engines and servers beside ours: makes what is missing, measures in rounds, prints tables, saves JSON."
_START_SERVER_S = 240.0


def main(arguments: Sequence[str], results: Path) -> None:
    args = _parse(arguments, results)
    # Treated as Ctrl-C: everything started is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.report is not None:
        print(report.markdown(read(args.report)))
        return
    cores = sorted(os.sched_getaffinity(0)) if args.cores is None else args.cores
    # Inherited by all children: every engine has the same cores.
    os.sched_setaffinity(0, cores)
    args.out.mkdir(parents=True, exist_ok=True)
    args.envs.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
    book = Book(args.out / f"peers-{stamp}.jsonl")
    try:
        _measure(args, cores, book)
    finally:
        book.close()
        print("\n" + report.markdown(book.rows))
        print(f"\nrows: {book.path}", flush=True)
    if args.part == "prepare":
        book.path.unlink()
        return
    whole = args.out / f"peers-{stamp}.json"
    whole.write_text(json.dumps({"tables": report.summary(book.rows), "rows": book.rows}, indent=1) + "\n")
    book.path.unlink()
    print(f"saved {whole}")


def _parse(arguments: Sequence[str], results: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench peers", description=_ABOUT)
    parser.add_argument(
        "--quick", action="store_true", help="fewer cells, loads and rounds; for a look, not for the record"
    )
    parser.add_argument(
        "--part", choices=("all", "prepare", "engines", "servers"), default="all", help="prepare: environments only"
    )
    parser.add_argument("--rounds", type=int, default=None, help="default: 3, quick: 1")
    parser.add_argument(
        "--peers", type=_names, default=engines.PEERS, metavar="A,B", help="of " + ", ".join(engines.PEERS)
    )
    parser.add_argument("--cells", type=_names, default=None, metavar="A,B", help="cells or loads by name")
    parser.add_argument(
        "--envs", type=Path, default=bench_model.cache_folder(), help="where environments are made and kept"
    )
    parser.add_argument("--cores", type=_cores, default=None, metavar="0,1", help="default: all of this process")
    parser.add_argument("--out", type=Path, default=results, help="folder of the JSON files")
    parser.add_argument(
        "--report", type=Path, default=None, metavar="JSONL", help="print the tables of a run that was cut"
    )
    args = parser.parse_args(list(arguments))
    args.envs = args.envs.resolve()
    if args.rounds is None:
        args.rounds = 1 if args.quick else 3
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds}, expected at least 1")
    known = [*(cell.name for cell in CELLS), *(load.name for load in LOADS)]
    if unknown := [name for name in args.cells or () if name not in known]:
        parser.error(f"--cells: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    if unknown := [name for name in args.peers if name not in engines.PEERS]:
        parser.error(f"--peers: unknown {', '.join(unknown)}; expected some of {', '.join(engines.PEERS)}")
    return args


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _cores(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def _measure(args: argparse.Namespace, cores: list[int], book: Book) -> None:
    model = bench_model.bench_model()
    # Kept, and named in failures: the log has the cause.
    log_dir = Path(tempfile.mkdtemp(prefix="baton-peers-"))
    print(f"logs: {log_dir}", flush=True)
    book.write(
        "machine", commit=facts.commit(), machine=facts.machine(), processor=processor(), cores=cores, model=model.name,
        versions=machine.versions(), quick=args.quick, date=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    # All of them before the first measurement: an installation would disturb it.
    args.peers = _prepare(args, model, log_dir, book)
    if args.part == "prepare":
        return
    probes = Probes(len(cores))
    if args.part in ("all", "engines"):
        _measure_engines(args, cores, model, log_dir, probes, book)
    if args.part in ("all", "servers"):
        _measure_servers(args, cores, model, log_dir, probes, book)


def _prepare(args: argparse.Namespace, model: Path, log_dir: Path, book: Book) -> tuple[str, ...]:
    """Prepares the peers and returns those that can be measured here."""
    ready = []
    for name in args.peers:
        print(f"environment of {name} ...", flush=True)
        try:
            converted(RECIPES[name], environment(RECIPES[name], args.envs, log_dir), model, args.envs, log_dir)
            ready.append(name)
        except Unavailable as error:
            book.failed(name, "install", str(error))
    return tuple(ready)


def _measure_engines(
    args: argparse.Namespace, cores: list[int], model: Path, log_dir: Path, probes: Probes, book: Book
) -> None:
    cells = QUICK_CELLS if args.quick and args.cells is None else CELLS
    cells = tuple(cell for cell in cells if args.cells is None or cell.name in args.cells)
    if not cells:
        return
    limits, contestants = engines.Limits(), []
    try:
        for name in (engines.OURS, *args.peers):
            print(f"starting {name} ...", flush=True)
            if (one := engines.start(name, model, args.envs, log_dir, cores, limits, book)) is not None:
                contestants.append(one)
        engines.measure(cells, contestants, args.rounds, probes, limits, book)
    finally:
        engines.end(contestants)


def _measure_servers(
    args: argparse.Namespace, cores: list[int], model: Path, log_dir: Path, probes: Probes, book: Book
) -> None:
    loads = QUICK_LOADS if args.quick and args.cells is None else LOADS
    loads = tuple(load for load in loads if args.cells is None or load.name in args.cells)
    if not loads:
        return
    standing: list[servers.Server] = []
    try:
        with tempfile.TemporaryDirectory(prefix="baton-peers-run-") as run_dir:
            plans = servers.baton_plans(model, Path(run_dir), len(cores))
            if "vllm" in args.peers:
                plans.insert(0, servers.vllm_plan(model, args.envs, log_dir, cores))
            for plan in plans:
                print(f"starting {plan.name} ...", flush=True)
                if (server := servers.start(plan, log_dir, _START_SERVER_S, book)) is not None:
                    standing.append(server)
            servers.measure(loads, standing, args.rounds, probes, book)
    finally:
        for server in standing:
            server.child.end()
