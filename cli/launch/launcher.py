"""Runs a local cluster: performs the supervisor's actions and reports events to it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton.clock import Clock
from baton.errors import BatonError
from cli.launch.process import Child
from cli.launch.supervise import (
    Announce,
    Begin,
    Event,
    Exited,
    Finish,
    Kill,
    Phase,
    Ready,
    Say,
    Spawn,
    StopAsked,
    SuperviseConfig,
    Supervisor,
    Terminate,
    Tick,
)


@dataclass(frozen=True, slots=True)
class Program:
    """How to run one child and how to find out that it is ready (the probe returns then, however long it takes).

    ``environment`` is what it gets beside what all get.
    """

    name: str
    command: tuple[str, ...]
    probe: Callable[[int], Awaitable[None]]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


class ClusterFailed(BatonError):
    """A local cluster could not be started or kept running; the message has the failed child's own words."""


class Launcher:
    """``run`` returns once nothing runs any more; raises ClusterFailed if that was not asked for with ``stop``."""

    def __init__(
        self,
        routers: Sequence[Program],
        workers: Sequence[Program],
        *,
        log_dir: Path,
        environment: Mapping[str, str],
        clock: Clock,
        config: SuperviseConfig,
        say: Callable[[str], None],
        announce: Callable[[Mapping[str, int]], None],
    ) -> None:
        self._programs = {program.name: program for program in (*workers, *routers)}
        self._machine = Supervisor([p.name for p in routers], [p.name for p in workers], config)
        self._log_dir = log_dir
        self._environment = environment
        self._clock = clock
        self._say = say
        self._announce = announce
        self._children: dict[str, Child] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        # At most a few per child are ever under way; the supervisor takes them as they come.
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def stop(self) -> None:
        """May be called from a signal handler of the event loop; a second call stops at once, without grace."""
        self._events.put_nowait(StopAsked())

    def _on_signal(self) -> None:
        if self._machine.phase in (Phase.STARTING, Phase.RUNNING):
            self._say("stopping: routers end their streams, then the workers end; Ctrl-C again kills all at once")
        self.stop()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with asyncio.TaskGroup() as tasks:
                error = await self._drive(tasks)
                for watcher in self._watchers:
                    watcher.cancel()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            # Reached with children alive only through a defect of ours or a cancelled run.
            for name in self._machine.alive:
                if name in self._children:
                    self._children[name].send(signal.SIGKILL)
        if error is not None:
            raise ClusterFailed(error)

    async def _drive(self, tasks: asyncio.TaskGroup) -> str | None:
        event: Event = Begin()
        while True:
            for action in self._machine.handle(event, self._clock.now()):
                if isinstance(action, Finish):
                    return action.error
                await self._act(action, tasks)
            event = await self._next_event()

    async def _next_event(self) -> Event:
        due_at = self._machine.next_due_at
        timeout_s = None if due_at is None else max(0.0, due_at - self._clock.now())
        try:
            async with asyncio.timeout(timeout_s):
                return await self._events.get()
        except TimeoutError:
            return Tick()

    async def _act(self, action: Spawn | Terminate | Kill | Announce | Say, tasks: asyncio.TaskGroup) -> None:
        match action:
            case Spawn(name):
                log, program = self._log_dir / f"{name}.log", self._programs[name]
                child = await Child.start(program.command, log, {**self._environment, **program.environment})
                self._children[name] = child
                watcher = tasks.create_task(self._watch(name, child))
                self._watchers.add(watcher)
                watcher.add_done_callback(self._watchers.discard)
            case Terminate(name):
                self._children[name].send(signal.SIGTERM)
            case Kill(name):
                self._children[name].send(signal.SIGKILL)
            case Announce():
                self._announce({name: child.pid for name, child in self._children.items()})
            case Say(message):
                self._say(message)

    async def _watch(self, name: str, child: Child) -> None:
        """From start to end of one child; one that answers its probe wrongly is killed, and that is why it died."""
        ended = asyncio.create_task(child.ended())
        probe = asyncio.create_task(self._probe(name, child.pid))
        complaint = ""
        try:
            await asyncio.wait([ended, probe], return_when=asyncio.FIRST_COMPLETED)
            if probe.done() and (error := probe.exception()) is not None:
                complaint = f"{error}\n"
                child.send(signal.SIGKILL)
            end = await ended
        finally:
            ended.cancel()
            probe.cancel()
            await asyncio.wait([ended, probe])
        self._events.put_nowait(Exited(name, complaint + end.message, is_clean=end.is_clean))

    async def _probe(self, name: str, pid: int) -> None:
        await self._programs[name].probe(pid)
        self._events.put_nowait(Ready(name))
