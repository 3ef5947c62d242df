"""Figures of docs/failures.md: a test tells what it measured, scripts/failure_figures.py collects it from the log."""

from __future__ import annotations

import logging
import re
from typing import NamedTuple

_log = logging.getLogger("tests.figures")
_LINE = re.compile(r"failure (\d+): (.+): (\S+) (\S+)")


class Figure(NamedTuple):
    row: int
    what: str
    value: float
    unit: str


def figure(row: int, what: str, value: float, unit: str = "s") -> None:
    """``what`` names the figure; several values of one name become a range. Nothing is asserted of the value."""
    assert ": " not in what
    _log.info("failure %d: %s: %g %s", row, what, value, unit)


def figure_of(line: str) -> Figure | None:
    """None for any other line of a log."""
    found = _LINE.fullmatch(line.strip())
    return None if found is None else Figure(int(found[1]), found[2], float(found[3]), found[4])
