"""``python -m bench clients``: client programs of other projects against a cluster, each in an environment of its own.

Makes the environments and the model that are missing, starts a cluster of one prefill and one decode node, runs the
script of each client, prints the table and saves JSON. `python -m bench.clients.table` writes docs/clients.md from it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import measure
from bench import model as bench_model
from bench.clients import environments, lm_eval, table
from bench.clients.model import agent_model
from bench.clients.recipes import CLIENTS, Client
from bench.peers.environments import Environment, Unavailable
from loadgen import machine
from loadgen.clusters import Shape, started

_MODELS_S = 30.0


def main(arguments: Sequence[str], results: Path) -> None:
    args = _parse(arguments, results)
    # Treated as Ctrl-C: the context manager ends the cluster.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun = datetime.now(UTC)
    # Kept, and named in failures: the logs have the causes.
    log_dir = Path(tempfile.mkdtemp(prefix="baton-clients-"))
    print(f"logs: {log_dir}", flush=True)
    rows = [_prepared(client, args.envs, log_dir) for client in CLIENTS if client.key in args.only]
    if args.prepare:
        return
    record: dict[str, Any] = {
        "date": begun.isoformat(timespec="seconds"),
        "commit": measure.commit(),
        "machine": measure.machine(),
        "versions": machine.versions(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"clients-{begun.strftime('%Y-%m-%dT%H%M%SZ')}.json"

    def save() -> None:
        """After each client, so that a run that is cut is worth something."""
        done = [row for row in rows if row["cells"] or row["not_installed"]]
        record["clients"] = _joined(done, args.onto)
        path.write_text(json.dumps(record, indent=1) + "\n")

    _try_out(rows, args, log_dir, save)
    save()
    print(table.table(record["clients"]))
    for failure in table.failures(record["clients"]):
        print("- " + ": ".join(failure))
    print(f"saved {path}")


def _parse(arguments: Sequence[str], results: Path) -> argparse.Namespace:
    keys = [client.key for client in CLIENTS]
    parser = argparse.ArgumentParser(prog="python -m bench clients", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=keys, metavar="NAME", help=f"of {', '.join(keys)}")
    parser.add_argument(
        "--envs", type=Path, default=bench_model.cache_folder(), help="where environments are made and kept"
    )
    parser.add_argument("--prepare", action="store_true", help="make the environments only")
    parser.add_argument("--documents", type=int, default=100, help="documents of each task of lm-eval")
    parser.add_argument(
        "--onto", type=Path, metavar="JSON", help="an earlier result: its rows of clients that do not run now are kept"
    )
    parser.add_argument("--out", type=Path, default=results, help="folder of the JSON file")
    args = parser.parse_args(list(arguments))
    args.only = args.only or keys
    args.envs = args.envs.resolve()
    return args


def _prepared(client: Client, envs: Path, log_dir: Path) -> dict[str, Any]:
    """The row of a client, with its environment."""
    print(f"environment of {client.name} ...", flush=True)
    row: dict[str, Any] = {
        "name": client.name, "key": client.key, "versions": {}, "not_installed": "", "took_s": 0.0,
        "commit": measure.commit(), "cells": [],
    }  # fmt: skip
    try:
        folder = environments.made(client, envs, log_dir)
        row["versions"] = environments.versions(client, folder)
    except Unavailable as error:
        print(f"  not installed: {error}", flush=True)
        row["not_installed"] = str(error)
    return row


def _try_out(rows: Sequence[dict[str, Any]], args: argparse.Namespace, log_dir: Path, save: Callable[[], None]) -> None:
    clients = {client.key: client for client in CLIENTS}
    ready = [(clients[row["key"]], row) for row in rows if not row["not_installed"]]
    if any(client.script for client, _ in ready):
        model = agent_model()
        asyncio.run(_scripts([pair for pair in ready if pair[0].script], model, args.envs, log_dir, save))
    for client, row in ready:
        if not client.script:
            print(f"{client.name} ...", flush=True)
            begun_s = time.monotonic()
            python = Environment(environments.made(client, args.envs, log_dir)).python
            row["cells"] = lm_eval.cells(str(python), args.documents, log_dir)
            row["took_s"] = round(time.monotonic() - begun_s, 1)
            save()


async def _scripts(
    ready: Sequence[tuple[Client, dict[str, Any]]], model: Path, envs: Path, log_dir: Path, save: Callable[[], None]
) -> None:
    shape = Shape("clients", ("--prefill", "1", "--decode", "1", "--threads", "1", "--kv-mib", "256"))
    async with started(shape, str(model), log_dir) as cluster:
        served = await asyncio.to_thread(_served_name, cluster.http)
        for client, row in ready:
            print(f"{client.name} ...", flush=True)
            begun_s = time.monotonic()
            folder = environments.made(client, envs, log_dir)
            row["cells"] = await asyncio.to_thread(
                environments.cells, client, folder, cluster.http, served, log_dir
            )  # fmt: skip
            row["took_s"] = round(time.monotonic() - begun_s, 1)
            save()


def _served_name(http: str) -> str:
    with urllib.request.urlopen(f"{http}/v1/models", timeout=_MODELS_S) as answer:
        return str(json.load(answer)["data"][0]["id"])


def _joined(rows: Sequence[dict[str, Any]], onto: Path | None) -> list[dict[str, Any]]:
    """In the order of CLIENTS."""
    found = {row["key"]: row for row in (json.loads(onto.read_text())["clients"] if onto else [])}
    found |= {row["key"]: row for row in rows}
    return [found[client.key] for client in CLIENTS if client.key in found]
