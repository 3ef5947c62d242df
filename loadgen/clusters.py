"""Starts local Baton clusters to be measured, and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import BadConfig, Unavailable, quoted

# Beside this package, in a checkout and in a wheel.
_PROGRAM = Path(__file__).resolve().parents[1] / "cli" / "__main__.py"
# The launcher ends its cluster in good order if this process is killed (PR_SET_PDEATHSIG).
_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)
_ROLES = ("--prefill", "--decode", "--mixed")
_START_S = 300.0
_STOP_S = 30.0
_LOOK_EVERY_S = 0.1
_LAST_WORDS_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Shape:
    """A cluster by name, with the options of `baton up` that make it."""

    name: str
    options: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``[NAME=]P+D [OPTIONS]`` for prefill and decode workers, ``[NAME=]N [OPTIONS]`` for mixed ones; the options
        are those of `baton up`. Raises BadConfig."""
        name, equals, asked = text.partition("=")
        if not equals or "--" in name:
            name, asked = "", text
        try:
            shape, *options = shlex.split(asked)
            counts = [int(count) for count in shape.split("+")]
            roles = ("--mixed",) if len(counts) == 1 else _ROLES[: max(2, len(counts))]
            pairs = tuple(zip(roles, counts, strict=True))
        except ValueError as error:
            expected = "expected [NAME=]PREFILL+DECODE or [NAME=]MIXED, then options of `baton up`"
            raise BadConfig(f"--cluster is {quoted(text)}: {error}; {expected}", param="--cluster") from error
        return cls(name or asked, (*(word for role, n in pairs for word in (role, str(n))), *options))


@dataclass(frozen=True, slots=True)
class Node:
    id: str
    role: str
    pid: int
    address: str
    metrics: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """One that is ready. ``http`` is a URL, ``grpc`` host:port; the key, if any, is what its workers ask of routers."""

    shape: Shape
    http: str
    grpc: str
    nodes: tuple[Node, ...]
    cluster_key_file: Path | None


@contextlib.asynccontextmanager
async def started(shape: Shape, model: str, folder: Path) -> AsyncIterator[Cluster]:
    """Runs `baton up` on free ports until the end of the context; its log is in ``folder``. Raises Unavailable."""
    up = (sys.executable, "-P", str(_PROGRAM), "up", "--http-port", "0", "--grpc-port", "0")
    stem = "".join(c if c.isalnum() else "-" for c in shape.name)
    ready = folder / f"{stem}.json"
    command = (*up, "--model", model, "--ready-file", str(ready), *shape.options)
    async with running(f"the cluster {shape.name}", command, ready, folder / f"{stem}.log") as said:
        nodes = tuple(Node(**node) for node in said["nodes"])
        key = said.get("cluster_key_file")
        yield Cluster(shape, str(said["http"]), str(said["grpc"]), nodes, Path(key) if key else None)


@contextlib.asynccontextmanager
async def running(name: str, command: Sequence[str], ready: Path, log: Path) -> AsyncIterator[dict[str, Any]]:
    """Runs a command until the end of the context; what it writes into its ready file. Raises Unavailable."""
    whole = (sys.executable, "-c", _WITH_PARENT, str(os.getpid()), *command)
    process = _launch(whole, log)
    try:
        yield await asyncio.to_thread(_ready, process, name, ready, log)
    finally:
        process.terminate()
        await asyncio.shield(asyncio.to_thread(_end, process))


def _launch(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)  # noqa: S603


def _ready(process: subprocess.Popen[bytes], name: str, ready: Path, log: Path) -> dict[str, Any]:
    deadline_s = time.monotonic() + _START_S
    while not ready.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_EVERY_S)
        if process.returncode is not None:
            raise Unavailable(f"{name} did not start: {_last_words(log)}")
        if time.monotonic() > deadline_s:
            raise Unavailable(f"{name} was not ready in {_START_S:g} s: {_last_words(log)}")
    found: dict[str, Any] = json.loads(ready.read_text())
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise Unavailable(f"a process of a cluster did not stop in {_STOP_S:g} s and was killed") from None


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-_LAST_WORDS_CHARS:] or "it said nothing"


@contextlib.asynccontextmanager
async def all_started(shapes: Sequence[Shape], model: str, folder: Path) -> AsyncIterator[tuple[Cluster, ...]]:
    """Several side by side, started one after the other: those that are not asked take next to no processor time."""
    async with contextlib.AsyncExitStack() as stack:
        yield tuple([await stack.enter_async_context(started(shape, model, folder)) for shape in shapes])
