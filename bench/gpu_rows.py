"""The result file of a GPU run: one JSON line for each event, on disk before the next part begins.

Kinds of lines: ``run`` (versions, commit, options), ``stage`` (begun, ended, cut, left out), ``begin`` (a part of a
case), and the part's result, ``row`` or ``fault``. A part that was begun and has no result was running when its process
ended. Does not import torch: the parent and the report read it too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
# Exit status of a stage's process that must be replaced because the code it ran has damaged it.
SPOILED = 75
_MAX_SAID = 1500


class Rows:
    """``rows.jsonl`` of a folder, appended to by one process at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / "rows.jsonl"

    def add(self, kind: str, **values: Any) -> Line:
        line = {"kind": kind, "at": round(time.time(), 3), **values}
        data = (json.dumps(line) + "\n").encode()
        with self.path.open("ab") as file:
            # A line cut off by the end of a process must not swallow this one.
            if file.tell() and not self._ends_whole():
                file.write(b"\n")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return line

    def fault(self, stage: str, case: str, part: str, fault: str, said: str) -> Line:
        """Writes a fault. Kinds: exception, out of memory, too little memory, capture failed, died, hung."""
        return self.add("fault", stage=stage, case=case, part=part, fault=fault, said=said[-_MAX_SAID:])

    def read(self) -> list[Line]:
        """All whole lines."""
        if not self.path.exists():
            return []
        return [*_parsed(self.path.read_bytes().split(b"\n"))]

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _parsed(lines: Iterable[bytes]) -> Iterable[Line]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            # An empty or incomplete line.
            continue


def results(lines: Iterable[Line], *, retries: bool = False) -> dict[tuple[str, str], dict[str, Line]]:
    """By (stage, case), then by part: the newest row or fault. With ``retries``, faults and wrong results from
    before the newest run are dropped."""
    found: dict[tuple[str, str], dict[str, Line]] = {}
    for line in lines:
        if line["kind"] == "run" and retries:
            found = {key: {n: p for n, p in parts.items() if not is_bad(p)} for key, parts in found.items()}
        if line["kind"] in ("row", "fault"):
            found.setdefault((line["stage"], line["case"]), {})[line["part"]] = line
    return found


def is_bad(line: Line) -> bool:
    return line["kind"] == "fault" or line.get("is_right") is False


def under_way(lines: Iterable[Line], stage: str) -> tuple[str, str] | None:
    """The (case, part) that was begun last in a stage, if it has no result."""
    open_part: tuple[str, str] | None = None
    for line in lines:
        if line.get("stage") != stage:
            continue
        if line["kind"] == "begin":
            open_part = line["case"], line["part"]
        elif line["kind"] in ("row", "fault") and (line["case"], line["part"]) == open_part:
            open_part = None
    return open_part


def facts(lines: Iterable[Line]) -> dict[str, Any]:
    """The machine's facts from the first stage: the newest value of each row."""
    found: dict[str, Any] = {}
    for line in lines:
        if line["kind"] == "row":
            found |= line.get("facts", {})
    return found
