"""Faults of one process: asks the injector, writes down what strikes, ends or stops the process, and keeps the time.

Exists only in a process that was started with a schedule. May be asked from any thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from baton.clock import Clock
from baton.errors import BadConfig, Unavailable
from baton.faults.config import FaultsConfig
from baton.faults.injector import Injector, Point, Strike
from baton.faults.kinds import FaultKind, Layer
from baton.faults.plan import OPTION, Plan, Rule

_log = logging.getLogger("baton.faults")

# How often a point of the process itself comes.
TICK_S = 0.1
# With more the process goes on without faults: its record must not fill a disk.
_MAX_STRIKES = 100_000
_MAX_LIVES = 10_000
# Wakes its parent after so many seconds, unless it is gone by then.
_WAKER = (
    "import os,signal,sys,time\n"
    "parent, until = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])\n"
    "while os.getppid() == parent and time.monotonic() < until: time.sleep(0.02)\n"
    "os.getppid() == parent and os.kill(parent, signal.SIGCONT)\n"
)
_WAKER_LIMIT_S = 10.0


class Elapsed:
    """Seconds since times count."""

    def __init__(self, clock: Clock, file: Path | None) -> None:
        self._clock = clock
        self._file = file
        self._began_s = clock.now() if file is None else None
        self.look()
        # Of this process; None: times were not counted yet, or began with it.
        self.at_start_s = None if file is None else self.now()

    def look(self) -> None:
        """Whether they count by now."""
        if self._began_s is None and self._file is not None and self._file.exists():
            self._began_s = float(json.loads(self._file.read_text()))

    def now(self) -> float | None:
        return None if self._began_s is None else self._clock.now() - self._began_s


class Record:
    """What one life of a process drew, as a schedule. Each entry is in the file before its fault strikes."""

    def __init__(self, folder: Path, node: str) -> None:
        """Raises BadConfig if it cannot be written."""
        self._node = node
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.life, self.path = _made(folder, re.sub(r"[^\w.-]", "_", node))
        except OSError as error:
            message = f"{OPTION}: cannot write what is drawn into {folder}: {error.strerror}; give --faults-record"
            raise BadConfig(message, param="record") from error

    def add(self, strike: Strike, elapsed_s: float | None) -> None:
        """Raises OSError."""
        rule = replaying(strike, self._node, self.life, elapsed_s)
        when = "" if elapsed_s is None else f"# {elapsed_s:.3f} s\n"
        # Closed each time: what a process wrote must be there when it is killed.
        with self.path.open("a") as file:
            file.write(f"{when}{rule.as_toml()}\n")


def _made(folder: Path, name: str) -> tuple[int, Path]:
    """The next life of this node, and an empty file for it."""
    for life in range(1, _MAX_LIVES):
        path = folder / f"{name}.{life}.toml"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return life, path
    raise BadConfig(f"{OPTION}: {folder} has {_MAX_LIVES} lives of {name}, expected a new folder", param="record")


def replaying(strike: Strike, node: str, life: int, elapsed_s: float | None) -> Rule:
    """The rule that makes this fault strike again: by its request wherever that runs then, on a node of another role
    too, else by node and count or time."""
    point, fault = strike.point, strike.fault
    seconds = (strike.seconds, strike.seconds)
    position = strike.position if fault is FaultKind.CORRUPT else None
    if point.request:
        return Rule(
            point.layer, fault, kind=point.kind, request=_literal(point.request), nth=(strike.number,),
            times=1, seconds=seconds, position=position,
        )  # fmt: skip
    is_timed = point.layer in (Layer.PROCESS, Layer.REGISTRY) and elapsed_s is not None
    return Rule(
        point.layer, fault, kind=point.kind, node=_literal(node), life=life,
        peer=_literal(point.peer) if point.peer else "*",
        at_s=elapsed_s if is_timed else None, nth=() if is_timed else (strike.number,),
        seconds=seconds, position=position,
    )  # fmt: skip


def _literal(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)


class Faults:
    """``at`` is asked wherever a fault may strike."""

    def __init__(
        self,
        plan: Plan,
        node: str,
        role: str,
        clock: Clock,
        *,
        elapsed: Elapsed | None = None,
        record: Record | None = None,
        kill: Callable[[int, int], None] = os.kill,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._elapsed = elapsed or Elapsed(clock, None)
        self._record = record
        self._kill = kill
        self._sleep = sleep
        self._lock = threading.Lock()
        life = 1 if record is None else record.life
        self._injector = Injector(plan, node, role, life, self._elapsed.at_start_s)
        self._num_left = _MAX_STRIKES
        # The registry counts as gone until then.
        self._gone_until_s = 0.0

    @classmethod
    def of(cls, config: FaultsConfig, node: str, role: str, clock: Clock) -> Faults | None:
        """None, unless there is a schedule. Raises BadConfig."""
        if config.file is None:
            return None
        record = Record(config.folder, node)
        _log.warning("faults strike as %s says (%s); they are written to %s", config.file, OPTION, record.path)
        return cls(config.plan(), node, role, clock, elapsed=Elapsed(clock, config.clock), record=record)

    def at(self, layer: Layer, kind: str, peer: str = "", request: str = "") -> Strike | None:
        """The fault that strikes here. One that ends the process does not return; one that stops it returns None when
        it goes on."""
        with self._lock:
            if self._num_left <= 0:
                return None
            elapsed_s = self._elapsed.now()
            strike = self._injector.decide(Point(layer, kind, peer, request), elapsed_s)
            if strike is None or not self._written(strike, elapsed_s):
                return None
        _log.warning(
            "fault: %s of %s %s %d, peer %s, request %s, %.3g s", strike.fault, layer, kind, strike.number,
            peer or "-", request or "-", strike.seconds,
        )  # fmt: skip
        match strike.fault:
            case FaultKind.DIE:
                self._kill(os.getpid(), signal.SIGKILL)
                return None
            case FaultKind.FREEZE:
                self._freeze(strike.seconds)
                return None
        return strike

    def _written(self, strike: Strike, elapsed_s: float | None) -> bool:
        """A fault that could not be told of afterwards does not strike."""
        self._num_left -= 1
        if self._num_left == 0:
            _log.error("%d faults have struck, the limit: no more do", _MAX_STRIKES)
        if self._record is None:
            return True
        try:
            self._record.add(strike, elapsed_s)
        except OSError as error:
            self._num_left = 0
            _log.error("no fault strikes any more: %s cannot be written: %s", self._record.path, error)
            return False
        return True

    def _freeze(self, seconds: float) -> None:
        command = (sys.executable, "-I", "-S", "-c", _WAKER, str(os.getpid()), str(seconds))
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as waker:  # noqa: S603
            self._kill(os.getpid(), signal.SIGSTOP)
            waker.wait(seconds + _WAKER_LIMIT_S)

    def pause(self, layer: Layer, kind: str) -> None:
        """Where nothing but time can be lost: holds the calling thread for as long as the fault says."""
        strike = self.at(layer, kind)
        if strike is not None:
            self._sleep(strike.seconds)

    async def reach_registry(self) -> None:
        """Before a call of the registry. Raises Unavailable if it is gone."""
        strike = self.at(Layer.REGISTRY, "call")
        match strike and strike.fault:
            case FaultKind.DELAY:
                assert strike is not None
                await asyncio.sleep(strike.seconds)
            case FaultKind.DROP:
                raise Unavailable("a fault of the schedule: the registry did not answer this call")
            case FaultKind.DISCONNECT:
                assert strike is not None
                self._gone_until_s = self._clock.now() + strike.seconds
        if (left_s := self._gone_until_s - self._clock.now()) > 0:
            raise Unavailable(f"a fault of the schedule: the registry is gone for {left_s:.1f} s more")

    async def run(self) -> None:
        """Until it is cancelled: faults that come by the clock."""
        while True:
            self._elapsed.look()
            self.at(Layer.PROCESS, "tick")
            await asyncio.sleep(TICK_S)
