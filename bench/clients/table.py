"""Writes the table of docs/clients.md from the newest result: ``python -m bench.clients.table [check]``."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.clients.recipes import FEATURES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "clients.md"
BEGIN = "<!-- clients: written by `python -m bench.clients.table` -->\n"
END = "<!-- end of clients -->"
_MAX_SAID = 160
_COLUMNS = 120

Cell = Mapping[str, Any]


def newest(results: Path = RESULTS) -> Path | None:
    return max(results.glob("clients-*.json"), default=None)


def table(clients: Sequence[Mapping[str, Any]]) -> str:
    """A row for each client: how many of a feature's cases passed."""
    lines = [f"| client | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 1) + "|"]
    for client in clients:
        name = client["name"]
        if client["not_installed"]:
            lines.append(f"| {name} | not installed: {_plain(client['not_installed'])} |{' |' * (len(FEATURES) - 1)}")
            continue
        version = next(iter(client["versions"].values()), "")
        cells = (_shown([cell for cell in client["cells"] if cell["feature"] == feature]) for feature in FEATURES)
        lines.append(f"| {name} {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(cells: Sequence[Cell]) -> str:
    tried = [cell for cell in cells if cell["state"] != "not offered"]
    if not tried:
        return "–" if cells else ""
    right = sum(cell["state"] == "ok" for cell in tried)
    return f"{right} of {len(tried)}" if right < len(tried) else f"yes, {right}" if right > 1 else "yes"


def failures(clients: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Client, feature with case, and what was said."""
    return [
        (client["name"], f"{cell['feature']}, {cell['case']}", _plain(cell["said"]))
        for client in clients
        for cell in client["cells"]
        if cell["state"] == "failed"
    ]


def not_offered(clients: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Client, feature and reason: those of the table's dashes."""
    return [
        (client["name"], cell["feature"], _plain(cell["said"]))
        for client in clients
        for cell in client["cells"]
        if cell["state"] == "not offered"
    ]


def _plain(text: str) -> str:
    line = " ".join(str(text).split()).replace("|", "/").replace("`", "'")
    return line if len(line) <= _MAX_SAID else line[:_MAX_SAID] + " ..."


def section(record: Mapping[str, Any]) -> str:
    """The part of the document."""
    clients = record["clients"]
    also = [f"{name} {version}" for client in clients for name, version in [*client["versions"].items()][1:]]
    passed = sum(cell["state"] == "ok" for client in clients for cell in client["cells"])
    tried = sum(cell["state"] != "not offered" for client in clients for cell in client["cells"])
    about = (
        f"`python -m bench clients` on {record['date'][:10]}: {passed} of {tried} cases passed. A number says how many "
        "cases a feature has; – is what a client does not offer."
    )
    parts = [textwrap.fill(about, _COLUMNS), "", table(clients), ""]
    if also:
        parts += [
            textwrap.fill(f"Also installed: {', '.join(dict.fromkeys(also))}.", _COLUMNS, break_on_hyphens=False),
            "",
        ]
    parts += [_rows("| feature | what is tried |", FEATURES.items()), ""]
    if failed := failures(clients):
        parts += [_rows("| failed | case | |", failed), ""]
    if absent := not_offered(clients):
        parts += [_rows("| not offered by | feature | |", absent), ""]
    return "\n".join(parts)


def _rows(head: str, rows: Iterable[Sequence[str]]) -> str:
    lines = [head, "|---" * (head.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def filled(text: str, record: Mapping[str, Any]) -> str:
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{DOCUMENT} has no place for the table of clients")
    return head + BEGIN + section(record) + "\n" + END + tail


def main() -> None:
    path = newest()
    if path is None:
        raise SystemExit(f"no result of the clients in {RESULTS}: run `python -m bench clients`")
    text = DOCUMENT.read_text()
    fresh = filled(text, json.loads(path.read_text()))
    if sys.argv[1:] == ["check"]:
        if fresh != text:
            raise SystemExit(f"docs/clients.md is not what {path.name} says: run `python -m bench.clients.table`")
    else:
        DOCUMENT.write_text(fresh)


if __name__ == "__main__":
    main()
