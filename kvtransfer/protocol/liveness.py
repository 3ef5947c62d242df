"""Decides when a silent peer is lost. Counts its own heartbeats, so a process that was itself stalled does not blame
its peer."""

from __future__ import annotations

from enum import Enum


class Pulse(Enum):
    QUIET = "quiet"
    BEAT = "beat"
    LOST = "lost"


class Heart:
    """Call ``heard`` for every message of the peer, ``beat`` when ``due_s`` has come."""

    __slots__ = ("_interval_s", "_max_missed", "_missed", "due_s")

    def __init__(self, interval_s: float, max_missed: int, now: float) -> None:
        self._interval_s = interval_s
        self._max_missed = max_missed
        # Beats of ours since the peer was last heard.
        self._missed = 0
        self.due_s = now + interval_s

    def heard(self) -> None:
        self._missed = 0

    def beat(self, now: float) -> Pulse:
        if now < self.due_s:
            return Pulse.QUIET
        self.due_s = now + self._interval_s
        self._missed += 1
        return Pulse.LOST if self._missed > self._max_missed else Pulse.BEAT
