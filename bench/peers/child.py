"""A measured program: in a process group of its own, asked over pipes with a deadline, stopped between its turns.

Nothing it does or fails to do raises anything but ``Failed``.
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
from pathlib import Path
from typing import Any

from bench.peers.environments import last_lines

_END_S = 10.0
# A stopped program sees no end of its input: the kernel ends it with the bench, however that ended (PR_SET_PDEATHSIG).
_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "os.getppid() == int(sys.argv[1]) or sys.exit('the bench has ended'); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)
_TICKS_S = float(os.sysconf("SC_CLK_TCK"))


class Failed(Exception):
    """The program said so, ended, or let its deadline pass."""


class Child:
    """Started at once; its group ends with ``end`` whatever state it is in."""

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
        """One line there, one line back. Raises Failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise Failed(self._obituary()) from None
        return self.answer(limit_s)

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The next line; the first one comes unasked when the engine is ready. Raises Failed."""
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
        """Takes no processor time from now on, not even for waiting."""
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
            # What it started may outlive it.
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


def family_cpu_s(pid: int) -> float:
    """Processor time of a process, of its group and of all that descends from it, in groups of their own as well."""
    parents: dict[int, int] = {}
    groups: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        # Processes come and go.
        with contextlib.suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            one = int(folder.name)
            parents[one], groups[one] = int(fields[1]), int(fields[2])
            ticks[one] = int(fields[11]) + int(fields[12])
    members = {one for one, group in groups.items() if group == pid or one == pid}
    while more := {one for one, parent in parents.items() if parent in members} - members:
        members |= more
    return sum(ticks[one] for one in members) / _TICKS_S


def machine_cpu_s() -> float:
    """Processor time that anybody took, a hypervisor's other guests included."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS_S
