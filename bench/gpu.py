"""Checks and measures Baton on a GPU within a time limit: ``python -m bench.gpu --out DIR --minutes N``.

This is the parent process. It runs every stage in a child process with a time limit, and starts another child if one
died of what it ran. Each result is written at once as a line of DIR/rows.jsonl (`bench.gpu_rows`); a second run into
the same DIR continues where the first one ended. DIR/report.md is written at the end, and on demand by
``python -m bench.kernel_table DIR``. The parent does not import torch, so a broken import ends a child only.
docs/gpu.md has the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from bench import kernel_table, measure
from bench.gpu_rows import SPOILED, Rows, is_bad, results, under_way
from bench.gpu_stages import STAGES, Clock, Stage, planned_lines, shares
from loadgen import machine

ROOT = Path(__file__).resolve().parents[1]
_END_S = 10.0
# Importing torch from a cold disk takes a while without output.
_START_LIMIT_S = 90.0
# How long timed stages wait for kernels that are still being compiled.
_COMPILE_WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Options:
    """The options that every child gets."""

    device: str = "bench.gpu_measure:find_device"
    is_tiny: bool = False
    retries: bool = False
    only: str = ""
    wheels: Path | None = None

    def arguments(self) -> list[str]:
        flags = ["--tiny"] * self.is_tiny + ["--retry"] * self.retries
        wheels = ["--wheels", str(self.wheels)] if self.wheels else []
        return ["--device", self.device, *flags, "--only", self.only, *wheels]


class Parent:
    """Runs stages, one after the other, into one folder."""

    def __init__(
        self, rows: Rows, options: Options, say: Callable[[str], None] = print, compiler: Compiler | None = None
    ) -> None:
        self._rows = rows
        self._options = options
        self._say = say
        self._compiler = compiler
        self._log_path = rows.folder / "log.txt"

    def run(self, stages: Sequence[Stage], minutes: float) -> None:
        clock = Clock(minutes, shares(stages, minutes), time.monotonic())
        if self._compiler is not None and any(not stage.ahead for stage in stages):
            self._compiler.start()
        for stage in stages:
            limit_s = clock.limit(stage, time.monotonic())
            if not limit_s:
                self._rows.add("stage", stage=stage.name, state="left out")
                self._say(f"{stage.name}: left out, no time for it")
                continue
            if self._compiler is not None:
                if stage.is_timed or stage.ahead:
                    self._compiler.end(_COMPILE_WAIT_S)
                    limit_s = max(stage.least_s, min(limit_s, clock.left(time.monotonic())))
                if stage.ahead:
                    self._compiler.start(*stage.ahead)
            self._stage(stage, limit_s)

    def _stage(self, stage: Stage, limit_s: float) -> None:
        started = time.monotonic()
        self._rows.add("stage", stage=stage.name, state="begun", limit_s=round(limit_s, 1))
        self._say(f"{stage.name}: {stage.about}, at most {limit_s:.0f} s")
        state = "spoiled"
        while state == "spoiled":
            state = self._child(stage, started + limit_s)
        took_s = round(time.monotonic() - started, 1)
        self._rows.add("stage", stage=stage.name, state=state, took_s=took_s)
        self._say(f"{stage.name}: {state} after {took_s} s")

    def _child(self, stage: Stage, ends_at: float) -> str:
        """Runs one child; returns its end: ended, cut (time limit), spoiled (another child must continue) or failed."""
        num_before = len(self._rows.read())
        with (
            self._log_path.open("ab") as log,
            _started(stage, self._rows.folder, self._options, log) as (process, pipe),
        ):
            log_from = log.tell()
            ending = self._listen(stage, pipe, ends_at)
            if ending == "over":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_S)
            _kill(process)
        if ending == "cut":
            return "cut"
        if ending == "over" and process.returncode == 0:
            return "ended"
        if ending == "over" and process.returncode == SPOILED:
            return "spoiled"
        return self._blame(stage, num_before, log_from, ending, process.returncode)

    def _listen(self, stage: Stage, pipe: int, ends_at: float) -> str:
        """Why reading stopped: over (the process closed the pipe), cut, or hung."""
        limit_s = max(_START_LIMIT_S, stage.part_limit_s)
        while True:
            now = time.monotonic()
            if now >= ends_at:
                return "cut"
            wait_s = min(limit_s, ends_at - now)
            if not select.select([pipe], [], [], wait_s)[0]:
                if wait_s < limit_s:
                    return "cut"
                return "hung"
            text = os.read(pipe, 1 << 16)
            if not text:
                return "over"
            limit_s = stage.part_limit_s
            self._say(text.decode(errors="replace").rstrip("\n"))

    def _blame(self, stage: Stage, num_before: int, log_from: int, ending: str, status: int | None) -> str:
        """Records a fault for the part that was running, or for the stage if there was none: another child would end
        alike."""
        part = under_way(self._rows.read()[num_before:], stage.name)
        how, said = "hung", f"no word for {stage.part_limit_s:.0f} s"
        if ending == "over":
            how, said = (
                "died",
                f"signal {signal.Signals(-status).name}" if status and status < 0 else f"exit status {status}",
            )
        tail = self._log_path.read_bytes()[log_from:].decode(errors="replace").strip()[-1200:]
        case, name = part or ("", "process")
        self._rows.fault(stage.name, case, name, how, f"{tail}\n{said}".strip())
        self._say(f"! {case or stage.name}: {name}: {how}: {said}")
        return "spoiled" if part else "failed"


@contextlib.contextmanager
def _started(
    stage: Stage, folder: Path, options: Options, log: BinaryIO
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Starts a child and the pipe for its progress, in a process group of its own that is killed at the end."""
    reading, writing = os.pipe()
    command = [
        sys.executable, "-m", "bench.gpu_child", "--stage", stage.name, "--cases", stage.cases, "--out", str(folder),
        "--tell", str(writing), *options.arguments(),
    ]  # fmt: skip
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writing,),
            start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        try:
            yield process, reading
        finally:
            _kill(process)
    finally:
        os.close(reading)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that hangs in the driver cannot be killed; the next stage shows the consequences.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)


class Compiler:
    """Compiles kernels for later stages on idle cores, into Triton's cache. Its failure is harmless."""

    def __init__(self, folder: Path) -> None:
        self._log_path = folder / "log.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        self.end(0)
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.aot", "--ahead", *arguments], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def end(self, wait_s: float) -> None:
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        _kill(self._process)
        self._process = None


def _chosen(names: str) -> list[Stage]:
    wanted = [name for name in names.split(",") if name]
    unknown = [name for name in wanted if name not in {stage.name for stage in STAGES}]
    if unknown:
        raise SystemExit(f"no stage {', '.join(unknown)}; there are {', '.join(stage.name for stage in STAGES)}")
    if not wanted:
        return [*STAGES]
    # Stages that were requested by name run whatever the budget, as far as it goes.
    return [replace(s, shares_s=(max(s.shares_s),) * 3) for s in STAGES if s.name in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; one that is there is gone on with")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run, report included")
    parser.add_argument("--stages", default="", help="comma-separated; all that fit where not given")
    parser.add_argument("--only", default="", help="cases whose kernel and shape hold this")
    parser.add_argument("--retry", action="store_true", help="again what failed or was wrong in an earlier run")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; with TRITON_INTERPRET=1 for where no GPU is")
    parser.add_argument("--wheels", type=Path, help="folder of what the cluster needs and this environment lacks")
    parser.add_argument("--commit", default="", help="of this code, where there is no git to ask")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    options = parser.parse_args()
    stages = _chosen(options.stages)
    if not options.plan and options.out is None:
        parser.error("the following arguments are required: --out")
    if options.plan:
        print("\n".join(planned_lines(stages, options.minutes)))
        return 0
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if is_interpreted and not options.tiny:
        parser.error("under the interpreter real shapes take hours: add --tiny")
    rows = Rows(options.out.resolve())
    rows.add(
        "run", argv=sys.argv[1:], minutes=options.minutes, commit=options.commit or measure.commit(),
        source=kernel_table.source_digest(), versions=machine.versions(), is_interpreted=is_interpreted,
        is_tiny=options.tiny,
    )  # fmt: skip
    told = Options(
        is_tiny=options.tiny,
        retries=options.retry,
        only=options.only,
        wheels=options.wheels and options.wheels.resolve(),
    )
    compiler = None if is_interpreted or options.tiny else Compiler(rows.folder)
    # On a signal it still ends its children and writes the results that exist.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        Parent(rows, told, partial(print, flush=True), compiler).run(stages, options.minutes)
    finally:
        if compiler is not None:
            compiler.end(0)
        print(kernel_table.report(rows.folder), flush=True)
    found = [part for parts in results(rows.read()).values() for part in parts.values()]
    bad = sum(map(is_bad, found))
    print(f"{len(found)} results, {bad} of them faults or wrong: {rows.folder / 'report.md'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
