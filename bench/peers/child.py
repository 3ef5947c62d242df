"""Runs a measured program in a process group of its own: requests over pipes with a deadline, stopped between its
turns.

All its failures are raised as ``Failed``.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.environments import last_lines

_END_S = 10.0
# A stopped program does not notice the end of its input, so the kernel ends it with the bench (PR_SET_PDEATHSIG).
_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "os.getppid() == int(sys.argv[1]) or sys.exit('the bench has ended'); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)
_TICKS_S = float(os.sysconf("SC_CLK_TCK"))


class Failed(Exception):
    """The program reported a failure, ended, or missed its deadline."""


class Child:
    """Started on construction; ``end`` ends its group whatever state it is in."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str], *, has_pipes: bool = True) -> None:
        self._log = log
        if shutil.which(command[0]) is None:
            raise Failed(f"{command[0]} is not a program here")
        pipe = subprocess.PIPE if has_pipes else None
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WITH_PARENT, str(os.getpid()), *command],
                stdin=pipe or subprocess.DEVNULL, stdout=pipe or out, stderr=out,
                env=os.environ | env, start_new_session=True,
            )  # fmt: skip
        self._rest = b""

    @property
    def group(self) -> int:
        return self._process.pid

    def ask(self, question: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """One line to the program, one line back. Raises Failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise Failed(self._obituary()) from None
        return self.answer(limit_s)

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The next line; the first one comes without a request when the engine is ready. Raises Failed."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise Failed(f"no answer after {limit_s:.0f} s")
                part = os.read(self._process.stdout.fileno(), 65536)
                if not part:
                    raise Failed(self._obituary())
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            raise Failed(f"the answer is {line[:200]!r}, expected JSON") from None
        if not isinstance(answer, dict):
            raise Failed(f"the answer is {line[:200]!r}, expected an object")
        if "error" in answer:
            raise Failed(str(answer["error"])[:600])
        return answer

    def check(self) -> None:
        """Raises Failed if the program has ended."""
        if self._process.poll() is not None:
            raise Failed(self._obituary())

    def pause(self) -> None:
        """Stop the group (SIGSTOP), so that it uses no processor time at all."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        self.resume()
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Its children may outlive it.
            self._signal(signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def _obituary(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        return f"ended with {self._process.returncode}: {last_lines(self._log)}"


@dataclass(frozen=True, slots=True)
class _Process:
    name: str
    parent: int
    group: int
    cpu_s: float


class Usage:
    """Processor time so far: of the whole machine, other guests of the hypervisor included, and of each live
    process."""

    def __init__(self) -> None:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
        self.machine_s = (user + nice + system + irq + softirq + steal) / _TICKS_S
        self.processes: dict[int, _Process] = {}
        for folder in Path("/proc").iterdir():
            # Processes come and go.
            with contextlib.suppress(OSError, IndexError, ValueError):
                head, _, rest = (folder / "stat").read_text().rpartition(")")
                fields = rest.split()
                cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_S
                name = head.partition("(")[2]
                self.processes[int(folder.name)] = _Process(name, int(fields[1]), int(fields[2]), cpu_s)

    def family(self, pid: int) -> set[int]:
        """A process, its group and all its descendants, which may have groups of their own."""
        members = {one for one, found in self.processes.items() if pid in (one, found.group)}
        while more := {one for one, found in self.processes.items() if found.parent in members} - members:
            members |= more
        return members

    def family_s(self, pid: int) -> float:
        return sum(self.processes[one].cpu_s for one in self.family(pid))


@dataclass(frozen=True, slots=True)
class Others:
    """Cores used by other processes beside a sample, and the process that used most."""

    cores: float
    busiest: str

    @classmethod
    def between(cls, before: Usage, after: Usage, pid: int, elapsed_s: float) -> Others:
        """``pid`` is the measured process; members of its family that ended in between have used more than is seen."""
        own_s = after.family_s(pid) - before.family_s(pid)
        cores = max(0.0, after.machine_s - before.machine_s - own_s) / elapsed_s
        taken: dict[int, float] = {}
        for one in after.processes.keys() - after.family(pid):
            earlier = before.processes.get(one)
            taken[one] = after.processes[one].cpu_s - (earlier.cpu_s if earlier else 0.0)
        busiest = max(taken, key=lambda one: taken[one], default=None)
        if busiest is None or not taken[busiest]:
            return cls(cores, "")
        mine = " (this bench)" if busiest == os.getpid() else ""
        return cls(cores, f"{after.processes[busiest].name}{mine} {taken[busiest] / elapsed_s:.2f}")
