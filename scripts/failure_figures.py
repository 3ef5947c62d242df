"""Runs the tests that docs/failures.md names, and writes the figures that they tell into its last column.

python scripts/failure_figures.py [--rows 1-10,17] [--long] [--write]

Without --write the column is printed. --long runs the tests marked so as well. Rows that were not run keep their
figures; nothing is written unless every test passed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.failures import PAGE, Row, cells_of, rows, with_figures  # noqa: E402
from tests.support.figures import Figure, figure_of  # noqa: E402

_NO_TESTS = 5


def node_ids(found: Sequence[Row]) -> list[str]:
    """Each test once, in the order of the rows."""
    named = (
        f"tests/{reference.path}.py::{name}"
        for row in found
        for reference in row.references
        for name in reference.names()
    )
    return list(dict.fromkeys(named))


def run(tests: Sequence[str], *, is_long: bool) -> tuple[bool, list[Figure]]:
    """Whether all passed, and what they told."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "pytest", "-q", *tests, f"--log-file={log}", "--log-file-level=INFO"]
        command += ["--log-file-format=%(message)s"] + ([] if is_long else ["-m", "not long"])
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return code in (0, _NO_TESTS), [found for line in lines if (found := figure_of(line)) is not None]


def numbers_of(text: str) -> set[int]:
    """``1-10,17``."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=numbers_of, help="Such as 1-10,17. Default: all.")
    parser.add_argument("--long", action="store_true", help="Also the tests that take minutes.")
    parser.add_argument("--write", action="store_true", help="Write the figures into docs/failures.md.")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    chosen = [row for row in rows(text) if options.rows is None or row.number in options.rows]
    has_passed, figures = run(node_ids(chosen), is_long=options.long)
    numbers = {row.number for row in chosen}
    cells = {row: cell for row, cell in cells_of(figures).items() if row in numbers}
    if not has_passed:
        sys.stderr.write("a test failed: no figure is written\n")
        return 1
    if options.write:
        PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), cells), encoding="utf-8")
    else:
        sys.stdout.write("".join(f"{row}: {cell}\n" for row, cell in cells.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
