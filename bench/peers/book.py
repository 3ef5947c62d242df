"""The record of a run: one JSON line for each row, on disk before the next row begins."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Book:
    """The lines of results and failures, also kept in memory for the tables."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._file = path.open("a")

    def write(self, kind: str, **row: Any) -> None:
        self.rows.append({"kind": kind, **row})
        self._file.write(json.dumps(self.rows[-1]) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def failed(self, who: str, stage: str, reason: str) -> None:
        self.write("failure", who=who, stage=stage, reason=reason)
        print(f"  {who}: {stage} failed: {reason}", flush=True)

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a run, also of one that was cut off: an incomplete last line is skipped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
