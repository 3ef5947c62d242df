"""One child process of the launcher: its start, its log file, its end and its last lines of output."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LAST_WORDS_BYTES = 16384
_LAST_WORDS_LINES = 15
ERROR_PREFIX = "error: "


def die_with(parent_pid: int) -> None:
    """Called by a child first of all: the kernel kills it when its parent ends, however that ends.

    The request covers only a parent that still lives, so one that ended before is looked for afterwards.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def end_on_sigterm() -> None:
    """Until the event loop takes over nothing is worth ending in good order, and what SIGTERM ends has ended well.

    Not by an exception: one that strikes while Python imports may be ignored, and the process would start after all.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def last_words(log: Path, start: int = 0) -> str:
    """The error that a child ended with, or else the end of its log; ``start`` is where in the file its life began."""
    with log.open("rb") as file:
        file.seek(max(start, os.fstat(file.fileno()).st_size - _LAST_WORDS_BYTES))
        lines = file.read().decode(errors="replace").rstrip().splitlines()
    for i in reversed(range(len(lines))):
        if lines[i].startswith(ERROR_PREFIX):
            return "\n".join(lines[i:]).removeprefix(ERROR_PREFIX)
    return "\n".join(lines[-_LAST_WORDS_LINES:]) or "it said nothing"


def how_it_ended(return_code: int) -> str:
    if return_code < 0:
        return f"killed by {signal.Signals(-return_code).name}"
    return f"exit code {return_code}"


@dataclass(frozen=True, slots=True)
class End:
    """Of a child. ``message`` says how and why it came."""

    is_clean: bool
    message: str


class Child:
    """A running child. It is its own session, so that Ctrl-C in a terminal reaches the launcher alone."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, log_start: int) -> None:
        self._process = process
        self._log = log
        self._log_start = log_start

    @classmethod
    async def start(cls, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Child:
        with log.open("ab") as output:
            log_start = output.tell()
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
            )
        return cls(process, log, log_start)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ended(self) -> End:
        return_code = await self._process.wait()
        return End(return_code == 0, f"{how_it_ended(return_code)}\n{last_words(self._log, self._log_start)}")

    def send(self, number: signal.Signals) -> None:
        # It may have ended meanwhile.
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


class ReservedPort:
    """A TCP port that no other process is given while this lives, although nothing listens on it here.

    With SO_REUSEADDR on both sides Linux lets a server bind it too, as long as no other listens: a worker that died
    finds its port free when it comes back. Raises OSError if another process listens there.
    """

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()
