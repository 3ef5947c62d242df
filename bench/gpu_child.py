"""Runs one stage of `bench.gpu` in a process of its own. If the process dies, the parent starts another one, which
continues behind the part that was running.

The start of every part is written to the file of rows before it runs. Standard output and error go to the parent's log;
progress goes through the pipe and shows the parent that this process is alive.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.gpu_measure import CaptureFailedError, Case, Device, TooLittleMemoryError
from bench.gpu_rows import SPOILED, Line, Rows, facts, is_bad, results

_VERDICTS: dict[bool | None, str] = {True: "right", False: "WRONG", None: ""}


@dataclass(frozen=True, slots=True)
class Context:
    """The inputs of a stage's cases."""

    device: Device
    rows: Rows
    is_tiny: bool
    # A folder of wheels that are missing in this environment.
    wheels: Path | None = None


class Child:
    def __init__(self, stage: str, context: Context, tell: TextIO, *, retries: bool, only: str) -> None:
        self._stage = stage
        self._context = context
        self._tell = tell
        self._only = only
        self._known = results(context.rows.read(), retries=retries)

    def run(self, cases: Callable[[Context], Iterator[Case]]) -> int:
        """Runs the stage; returns the exit status."""
        with torch.inference_mode():
            try:
                for case in cases(self._context):
                    if self._only in f"{case.kernel} | {case.shape}" and not self._take(case):
                        return SPOILED
            except Exception as error:
                self._fault("", "cases", "exception", error)
        return 0

    def _take(self, case: Case) -> bool:
        """Runs one part; returns whether this process may continue."""
        name = f"{case.kernel} | {case.shape} | {case.dtype}"
        known = self._known.setdefault((self._stage, name), {})
        for part in case.parts(self._context.device):
            line = known.get(part.name)
            if line is None:
                self._context.rows.add("begin", stage=self._stage, case=name, part=part.name)
                try:
                    values = part.run()
                    # A kernel's fault is reported when the device is synchronized.
                    self._context.device.check_usable()
                except Exception as error:
                    line = self._fault(name, part.name, _kind(error), error)
                    if isinstance(error, CaptureFailedError) or not self._is_usable():
                        return False
                else:
                    row = {"kernel": case.kernel, "shape": case.shape, "dtype": case.dtype, **values}
                    line = self._context.rows.add("row", stage=self._stage, case=name, part=part.name, **row)
                    self._say(described(line))
            known[part.name] = line
            # A case with a wrong result is not timed, and one that cannot be timed gets no peers.
            if part.name in ("check", "time") and is_bad(line):
                break
        self._context.device.forget()
        return True

    def _is_usable(self) -> bool:
        try:
            self._context.device.check_usable()
        except Exception as error:
            self._say(f"  this process is spoiled: {_said(error)}")
            return False
        return True

    def _fault(self, case: str, part: str, kind: str, error: Exception) -> Line:
        line = self._context.rows.fault(self._stage, case, part, kind, _said(error))
        self._say(described(line))
        return line

    def _say(self, text: str) -> None:
        self._tell.write(text + "\n")
        self._tell.flush()


def _kind(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    if isinstance(error, TooLittleMemoryError):
        return "too little memory"
    return "capture failed" if isinstance(error, CaptureFailedError) else "exception"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def described(line: Line) -> str:
    """A part in one line."""
    name = f"{line['case']}: {line['part']}"
    if line["kind"] == "fault":
        return (
            f"! {name}: {line['fault']}: {line['said'].strip().splitlines()[-1][:300] if line['said'].strip() else ''}"
        )
    if "facts" in line:
        return f"  {name}: " + ", ".join(f"{key} {value}" for key, value in line["facts"].items())
    verdict = _VERDICTS[line.get("is_right")]
    parts = [f"! {name}:" if line.get("is_right") is False else f"  {name}:", verdict]
    if isinstance(line.get("error"), float):
        parts.append(f"error {line['error']:.1e}")
    if "us" in line:
        parts.append(f"{line['us']:.1f} us")
    parts += [f"{line[key]:.1f} % of {key[11:]}" for key in ("percent_of_copy", "percent_of_products") if key in line]
    parts += [f"ours x{line['ratio']:.2f}"] if "ratio" in line else []
    parts += [str(line[key]) for key in ("time", "said") if key in line]
    return " ".join(part for part in parts if part)


def resolved(entry: str) -> Any:
    """``module:name``"""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_child", description=__doc__)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--cases", required=True, help="module:function, which takes a Context")
    parser.add_argument("--device", required=True, help="module:function, which gives a Device")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tell", type=int, required=True, help="descriptor of the pipe to the parent")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--wheels", type=Path)
    options = parser.parse_args()
    # This process ends when the parent ends, whatever it has started.
    os.set_inheritable(options.tell, False)
    rows = Rows(options.out)
    with contextlib.closing(os.fdopen(options.tell, "w")) as tell:
        device: Device = resolved(options.device)()
        known = facts(rows.read())
        limits = {key: known[key] for key in ("copy_bytes_per_s", "flops_per_s") if key in known}
        context = Context(replace(device, **limits), rows, options.tiny, options.wheels)
        child = Child(options.stage, context, tell, retries=options.retry, only=options.only)
        return child.run(resolved(options.cases))


if __name__ == "__main__":
    sys.exit(main())
