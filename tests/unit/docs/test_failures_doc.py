"""docs/failures.md: every row names tests that exist, none is partly tested, and its figures are those of a run."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.support import failures
from tests.support.figures import Figure, figure_of
from tests.support.root import ROOT

TEXT = failures.PAGE.read_text(encoding="utf-8")
ROWS = failures.rows(TEXT)
EXAMPLE = """
| # | reported in | what | test | figure |
|---|---|---|---|---|
| 1 | a #1 | b | unit/docs/test_failures_doc `test_every_row_*`, unit/docs/test_gone `test_*` | old |
| 2 | c #2 | d | nothing | kept |
"""


def test_the_rows_are_numbered_and_complete() -> None:
    assert [row.number for row in ROWS] == list(range(1, len(ROWS) + 1))
    assert len(ROWS) >= 31
    assert all(re.search(r"#\d+", row.reported) and row.happened for row in ROWS)


def test_every_row_names_tests_that_exist() -> None:
    missing = {
        (row.number, reference) for row in ROWS for reference in row.references if not reference.names()
    }  # fmt: skip
    assert missing == set()
    assert [row.number for row in ROWS if not row.references] == []
    first, second = failures.rows(EXAMPLE)
    assert [bool(reference.names()) for reference in first.references] == [True, False]
    assert second.references == []


def test_no_row_is_open_or_partly_tested() -> None:
    assert [row.number for row in ROWS if re.search(r"\b(open|partly)\b", row.tests)] == []


def test_figures_of_a_log_become_the_last_column() -> None:
    lines = ["failure 1: kill to free: 0.4213 s", "failure 1: kill to free: 1.5 s", "failure 1: cancels: 60 clients"]
    told = [found for line in [*lines, "failure x", "INFO other"] if (found := figure_of(line)) is not None]
    assert told[0] == Figure(1, "kill to free", 0.4213, "s")
    cells = failures.cells_of(told)
    assert cells == {1: "kill to free: 0.42 to 1.5 s; cancels: 60 clients"}
    written = failures.with_figures(EXAMPLE, cells)
    assert [row.figures for row in failures.rows(written)] == [cells[1], "kept"]
    assert failures.with_figures(written, {1: "old"}) == EXAMPLE
    assert failures.with_figures(TEXT, {}) == TEXT


def test_the_script_that_writes_the_figures_explains_itself() -> None:
    command = [sys.executable, "scripts/failure_figures.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--rows" in done.stdout


def test_the_tests_that_the_limits_name_exist() -> None:
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    section = text.partition("\n## Limits\n")[2].partition("\n## ")[0]
    limits = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| from ")]
    named = {line: failures.references_in(line) for line in limits}
    assert len(limits) > 30
    assert [line for line, found in named.items() if not found] == []
    assert [x for found in named.values() for x in found if not x.names()] == []
