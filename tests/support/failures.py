"""docs/failures.md as data: its rows, the tests that a row names, and the column of figures."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from tests.support.figures import Figure
from tests.support.root import ROOT

PAGE = ROOT / "docs" / "failures.md"
_ROW = re.compile(r"^\| (\d+) \|(.*)\|$", re.MULTILINE)
_REFERENCE = re.compile(r"([a-z_]+(?:/[a-z_0-9]+)+) `([A-Za-z_0-9*]+)`")
_NUM_CELLS = 4


class Reference(NamedTuple):
    """A file in tests/, without its ending, and the names of tests in it; ``*`` stands for any text."""

    path: str
    pattern: str

    @property
    def file(self) -> Path:
        return ROOT / "tests" / f"{self.path}.py"

    def names(self) -> list[str]:
        """The tests that the pattern means."""
        return [name for name in _tests_of(self.file) if fnmatch(name, self.pattern)] if self.file.is_file() else []


class Row(NamedTuple):
    number: int
    reported: str
    happened: str
    tests: str
    figures: str

    @property
    def references(self) -> list[Reference]:
        return references_in(self.tests)


def references_in(text: str) -> list[Reference]:
    return [Reference(*found) for found in _REFERENCE.findall(text)]


def rows(text: str) -> list[Row]:
    found = []
    for number, cells in _ROW.findall(text):
        parts = [part.strip() for part in cells.split(" | ")]
        assert len(parts) == _NUM_CELLS, f"row {number} has {len(parts) + 1} cells, expected {_NUM_CELLS + 1}"
        found.append(Row(int(number), *parts))
    return found


def with_figures(text: str, cells: Mapping[int, str]) -> str:
    """The page with these cells in the last column; other rows stay as they are."""
    lines = text.split("\n")
    for at, line in enumerate(lines):
        match = _ROW.fullmatch(line)
        if match is not None and (cell := cells.get(int(match[1]))) is not None:
            (row,) = rows(line)
            lines[at] = f"| {row.number} | {row.reported} | {row.happened} | {row.tests} | {cell} |"
    return "\n".join(lines)


def cells_of(figures: Iterable[Figure]) -> dict[int, str]:
    """By row: each figure once, with the range of its values."""
    values: dict[int, dict[tuple[str, str], list[float]]] = {}
    for row, what, value, unit in figures:
        values.setdefault(row, {}).setdefault((what, unit), []).append(value)
    return {
        row: "; ".join(f"{what}: {_shown(found, unit)}" for (what, unit), found in named.items())
        for row, named in sorted(values.items())
    }


def _shown(found: list[float], unit: str) -> str:
    low, high = (f"{value:.2g}" if unit == "s" else f"{value:g}" for value in (min(found), max(found)))
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _tests_of(file: Path) -> list[str]:
    """Functions, classes, and names that a state machine's tests are given."""
    names: list[str] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in names if name.startswith(("test_", "Test"))]
