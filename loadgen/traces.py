"""Reads request traces: when each request arrived, and how long its prompt and its output were.

``data/README.md`` says where the two that come with Baton are from.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from baton.errors import BadConfig, quoted

_DATA = Path(__file__).resolve().parent / "data"
# The traces that come with Baton, by the name of the service that they are of.
NAMES = ("code", "conv")
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
# Python reads microseconds; the files have a digit more.
_MICROSECOND_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Row:
    """One request; ``at_s`` is its arrival, in seconds since the first one of the trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Scale:
    """How lengths are changed to fit the machine: a factor for each, then a limit."""

    prompt: float = 1.0
    output: float = 1.0
    max_prompt_tokens: int = 1_000_000
    max_output_tokens: int = 1_000_000

    def apply(self, row: Row) -> tuple[int, int]:
        """Tokens of the prompt and of the output; at least 1 of each."""
        prompt, output = round(row.prompt_tokens * self.prompt), round(row.output_tokens * self.output)
        return max(1, min(prompt, self.max_prompt_tokens)), max(1, min(output, self.max_output_tokens))


def read(name: str) -> tuple[Row, ...]:
    """A trace by name, or of a file in the same format (CSV, also compressed with gzip). Raises BadConfig."""
    path = _DATA / f"azure-2023-{name}.csv.gz" if name in NAMES else Path(name)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadConfig(
            f"the trace {quoted(name)} cannot be read: {error}; expected {' or '.join(NAMES)}, or a CSV file",
            param="trace",
        ) from error
    return _parsed(text, name)


def _parsed(text: str, name: str) -> tuple[Row, ...]:
    table = csv.DictReader(io.StringIO(text))
    if missing := [column for column in _COLUMNS if column not in (table.fieldnames or ())]:
        raise BadConfig(
            f"the trace {quoted(name)} has no column {', '.join(missing)}; expected {', '.join(_COLUMNS)}",
            param="trace",
        )
    rows = []
    for number, found in enumerate(table, start=2):
        try:
            rows.append((_moment(found[_COLUMNS[0]]), int(found[_COLUMNS[1]]), int(found[_COLUMNS[2]])))
        except (ValueError, TypeError) as error:
            raise BadConfig(f"the trace {quoted(name)}, line {number}: {error}", param="trace") from error
    if not rows:
        raise BadConfig(f"the trace {quoted(name)} has no request", param="trace")
    rows.sort(key=lambda row: row[0])
    first = rows[0][0]
    return tuple(Row((at - first).total_seconds(), prompt, output) for at, prompt, output in rows)


def _moment(text: str) -> datetime:
    """In UTC, whether the text says so or not."""
    whole, _, fraction = text.partition(".")
    digits = fraction.partition("+")[0].rstrip("Z")[:_MICROSECOND_DIGITS]
    return datetime.fromisoformat(f"{whole}.{digits.ljust(_MICROSECOND_DIGITS, '0')}")


def window(rows: Sequence[Row], from_s: float, count: int) -> tuple[Row, ...]:
    """The ``count`` requests that arrived at ``from_s`` or later. Raises BadConfig if there are not as many."""
    first = bisect_left(rows, from_s, key=lambda row: row.at_s)
    found = tuple(rows[first : first + count])
    if len(found) < count:
        raise BadConfig(
            f"the trace has {len(rows) - first} requests from second {from_s:g} on, expected {count}: "
            "ask for fewer, or from an earlier second",
            param="trace",
        )
    return found


def arrivals(rows: Sequence[Row], rate: float) -> tuple[float, ...]:
    """Seconds from the beginning at which the requests of a window are due, at ``rate`` requests a second on average.

    All intervals are stretched by one factor, so that bursts stay as they were, in units of the mean interval. Taking a
    share of the requests instead would turn the trace into a Poisson process.
    """
    length_s = rows[-1].at_s - rows[0].at_s
    # With n intervals for n requests: the last request also has its time.
    factor = (len(rows) - 1) / rate / length_s if length_s else 0.0
    return tuple((row.at_s - rows[0].at_s) * factor for row in rows)
