"""How a worker leaves, as a pure machine: load, serve, drain, linger, close.

    LOADING -> SERVING -> DRAINING -> LINGERING -> CLOSED
        |                     |
        +---------------------+--> CLOSED at once: the second signal, or the end of the grace time

It decides when new work is refused, when the worker exits, and whether that cuts off requests, which the router then
runs again on other nodes. It does not track sequences; their number is an input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.machine import Tick
from baton.settings import setting


@dataclass(frozen=True, slots=True)
class DrainConfig:
    # How long running work may go on.
    grace_s: float = field(
        default=10.0,
        metadata=setting(
            "--grace",
            "Seconds that running work may take to end after SIGTERM.",
            least=0.1,
            most=86_400,
            up_flag=False,
        ),
    )
    # How long a worker without work stays to be told what was under way to it, and to say no.
    linger_s: float = 0.25


# -- events


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything is served now."""


@dataclass(frozen=True, slots=True)
class Signalled:
    """SIGTERM or SIGINT."""


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """Node/Drain was called; 0 means the worker's own grace time."""

    grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Emptied:
    """New work has been refused since RefuseNew, and no sequence is left."""


@dataclass(frozen=True, slots=True)
class EngineDied:
    pass


Event = Loaded | Signalled | DrainAsked | Emptied | EngineDied | Tick

# -- actions


@dataclass(frozen=True, slots=True)
class RefuseNew:
    """Accept nothing more, tell every router so, and report Emptied."""


@dataclass(frozen=True, slots=True)
class Close:
    """Leave now. ``reason`` is why work may be cut off, empty if there is none."""

    reason: str = ""


Action = RefuseNew | Close


class Phase(Enum):
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    LINGERING = "lingering"
    CLOSED = "closed"


class Departure:
    """Invariant: RefuseNew comes at most once and before any Close without a reason; Close comes exactly once."""

    def __init__(self, config: DrainConfig) -> None:
        self._config = config
        self._num_signals = 0
        self._gone_by_s = 0.0
        # None while only events count.
        self.wake_at_s: float | None = None
        self.phase = Phase.LOADING

    def handle(self, event: Event, now: float) -> list[Action]:
        if self.phase is Phase.CLOSED:
            return []
        match event:
            case Loaded():
                assert self.phase is Phase.LOADING
                self.phase = Phase.SERVING
                return []
            case Signalled():
                self._num_signals += 1
                return self._close("told twice to stop") if self._num_signals > 1 else self._drain(0.0, now)
            case DrainAsked(grace_s):
                return self._drain(grace_s, now)
            case Emptied():
                return self._linger(now)
            case EngineDied():
                return self._close("the engine died")
            case Tick():
                return self._on_tick(now)

    def grace_left_s(self, now: float) -> float:
        """How long a draining worker stays at the most."""
        return max(0.0, self._gone_by_s - now)

    def _drain(self, grace_s: float, now: float) -> list[Action]:
        gone_by_s = now + (grace_s or self._config.grace_s)
        match self.phase:
            case Phase.LOADING:
                return self._close("it was still loading")
            case Phase.SERVING:
                self.phase = Phase.DRAINING
                self._gone_by_s = self.wake_at_s = gone_by_s
                return [RefuseNew()]
            case Phase.DRAINING:
                self._gone_by_s = self.wake_at_s = min(self._gone_by_s, gone_by_s)
        return []

    def _linger(self, now: float) -> list[Action]:
        if self.phase is Phase.DRAINING:
            self.phase = Phase.LINGERING
            self.wake_at_s = now + self._config.linger_s
        return []

    def _on_tick(self, now: float) -> list[Action]:
        if self.wake_at_s is None or now < self.wake_at_s:
            return []
        return self._close("" if self.phase is Phase.LINGERING else "the grace time is over")

    def _close(self, reason: str) -> list[Action]:
        self.phase, self.wake_at_s = Phase.CLOSED, None
        return [Close(reason)]
