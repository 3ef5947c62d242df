"""The life of a local cluster as a pure machine: what to start, stop and restart, and when.

All children start together. Until every one of them is ready, the death of one ends everything. After that a child
that ended is started again (a drained worker too: draining one after the other is a rolling restart), with a delay that
grows if it dies young; workers go on without a router. The only router, if it is told to end (SIGTERM, exit code 0),
ends everything, in good order and without an error; one of several is started again. Stopping begins with the routers,
so that no request is cut off by a worker that left before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class SuperviseConfig:
    start_timeout_s: float = 300.0
    # First the routers get this long to end their streams (5 s at most), then the workers as long, then SIGKILL.
    stop_grace_s: float = 10.0
    min_backoff_s: float = 0.25
    max_backoff_s: float = 15.0
    # A child that was ready this long before it died is started again without remembering earlier deaths.
    stable_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Begin:
    pass


@dataclass(frozen=True, slots=True)
class Ready:
    name: str


@dataclass(frozen=True, slots=True)
class Exited:
    name: str
    # What to tell a person: exit code or signal, and the child's own last words.
    message: str
    # With exit code 0, which is how a child ends that was told to.
    is_clean: bool = False


@dataclass(frozen=True, slots=True)
class StopAsked:
    pass


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = Begin | Ready | Exited | StopAsked | Tick


@dataclass(frozen=True, slots=True)
class Spawn:
    name: str


@dataclass(frozen=True, slots=True)
class Terminate:
    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    name: str


@dataclass(frozen=True, slots=True)
class Announce:
    """Everything is ready (again): publish where it is."""


@dataclass(frozen=True, slots=True)
class Say:
    message: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing runs any more. ``error`` is why, unless it was asked for."""

    error: str | None


Action = Spawn | Terminate | Kill | Announce | Say | Finish


class Phase(Enum):
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    DONE = "done"


class _Child:
    """``due_at``: when down, the time to start it again; when starting, the time to give up; else None."""

    __slots__ = ("deaths", "due_at", "is_alive", "is_ready", "name", "ready_at")

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_alive = False
        self.is_ready = False
        self.ready_at = 0.0
        self.due_at: float | None = None
        # In a row, each before it had been stable.
        self.deaths = 0


class Supervisor:
    """``handle(event, now)`` returns what to do; ``next_due_at`` is when it wants a Tick."""

    def __init__(self, routers: Sequence[str], workers: Sequence[str], config: SuperviseConfig) -> None:
        self._config = config
        self._children = {name: _Child(name) for name in (*workers, *routers)}
        self._routers = [self._children[name] for name in routers]
        self._error: str | None = None
        # Stopping only: the deadline of the process that was told to stop.
        self._grace_ends_at: float | None = None
        self._workers_told = False
        self._all_killed = False
        self.phase = Phase.STARTING

    @property
    def next_due_at(self) -> float | None:
        if self.phase is Phase.STOPPING:
            return self._grace_ends_at
        dues = [child.due_at for child in self._children.values() if child.due_at is not None]
        return min(dues, default=None)

    @property
    def alive(self) -> list[str]:
        return [child.name for child in self._children.values() if child.is_alive]

    def handle(self, event: Event, now: float) -> list[Action]:
        if self.phase is Phase.DONE:
            return []
        match event:
            case Begin():
                return [self._spawn(child, now) for child in self._children.values()]
            case Ready(name):
                return self._on_ready(self._children[name], now)
            case Exited(name):
                return self._on_exit(self._children[name], event, now)
            case StopAsked():
                return self._on_stop_asked(now)
            case Tick():
                return self._on_tick(now)

    def _spawn(self, child: _Child, now: float) -> Action:
        assert not child.is_alive
        child.is_alive, child.is_ready = True, False
        child.due_at = now + self._config.start_timeout_s
        return Spawn(child.name)

    def _on_ready(self, child: _Child, now: float) -> list[Action]:
        if self.phase is Phase.STOPPING or not child.is_alive or child.is_ready:
            return []
        child.is_ready, child.ready_at, child.due_at = True, now, None
        if self.phase is Phase.RUNNING:
            return [Say(f"{child.name} is back"), Announce()]
        if all(c.is_ready for c in self._children.values()):
            self.phase = Phase.RUNNING
            return [Announce()]
        return []

    def _on_exit(self, child: _Child, end: Exited, now: float) -> list[Action]:
        if not child.is_alive:
            return []
        was_stable = child.is_ready and now - child.ready_at >= self._config.stable_s
        child.is_alive = child.is_ready = False
        child.due_at = None
        if self.phase is Phase.STOPPING:
            return self._stop_next(now)
        is_last_router = child in self._routers and not any(router.is_alive for router in self._routers)
        if is_last_router and end.is_clean:
            # A clean end means that it was told to end: a planned end, and the workers are of no use without it.
            return [Say(f"{child.name} was told to end: the workers end too"), *self._stop(None, now)]
        if self.phase is Phase.STARTING:
            return self._stop(f"{child.name} did not start: {end.message}", now)
        child.deaths = 0 if was_stable else child.deaths
        backoff_s = min(self._config.min_backoff_s * 2.0 ** min(child.deaths, 16), self._config.max_backoff_s)
        child.deaths += 1
        child.due_at = now + backoff_s
        return [Say(f"{child.name} ended: {end.message}\nstarting it again in {backoff_s:.2g} s")]

    def _on_stop_asked(self, now: float) -> list[Action]:
        if self.phase is Phase.STOPPING:
            # Asked twice: no more patience.
            return [Kill(name) for name in self.alive]
        return self._stop(None, now)

    def _on_tick(self, now: float) -> list[Action]:
        if self.phase is Phase.STOPPING:
            if self._grace_ends_at is None or now < self._grace_ends_at:
                return []
            if not self._workers_told:
                return [*[Kill(router.name) for router in self._live_routers], *self._tell_workers(now)]
            if not self._all_killed:
                self._all_killed = True
                self._grace_ends_at = now + self._config.stop_grace_s
                return [Kill(name) for name in self.alive]
            self.phase, self._grace_ends_at = Phase.DONE, None
            return [Finish(f"{', '.join(self.alive)} cannot be killed")]
        actions: list[Action] = []
        for child in self._children.values():
            if child.due_at is None or now < child.due_at:
                continue
            if not child.is_alive:
                actions.append(self._spawn(child, now))
            elif self.phase is Phase.STARTING:
                limit_s = self._config.start_timeout_s
                return [*actions, *self._stop(f"{child.name} was not ready after {limit_s:.0f} s", now)]
            else:
                child.due_at = None
                actions.append(Kill(child.name))
        return actions

    def _stop(self, error: str | None, now: float) -> list[Action]:
        self.phase, self._error = Phase.STOPPING, error
        self._grace_ends_at = now + self._config.stop_grace_s
        if self._live_routers:
            return [Terminate(router.name) for router in self._live_routers]
        return self._stop_next(now)

    def _stop_next(self, now: float) -> list[Action]:
        if not self.alive:
            self.phase, self._grace_ends_at = Phase.DONE, None
            return [Finish(self._error)]
        if not self._workers_told and not self._live_routers:
            return self._tell_workers(now)
        return []

    def _tell_workers(self, now: float) -> list[Action]:
        self._workers_told = True
        self._grace_ends_at = now + self._config.stop_grace_s
        workers = [child for child in self._children.values() if child not in self._routers]
        return [Terminate(child.name) for child in workers if child.is_alive]

    @property
    def _live_routers(self) -> list[_Child]:
        return [router for router in self._routers if router.is_alive]
