"""A host whose processors several processes share: engines that compute at the same time take longer, and so does the
event loop that all tokens pass.

Beside as many nodes as were measured a step takes as long as it did there. Beside more, and where none were, threads
get equal parts of the processors, and a node needs as much of them as it was measured to use.
"""

from __future__ import annotations

from typing import Protocol

from engine.step import StepShape
from planner.fitted import Sharing
from planner.overhead import NO_OVERHEAD, LoopTimes, Overhead
from planner.sim.events import Events


class Tenant(Protocol):
    def disturbed(self) -> None:
        """Others have begun or ended."""


class Host:
    def __init__(self, sharing: Sharing, overhead: Overhead = NO_OVERHEAD) -> None:
        self._sharing = sharing
        self._overhead = overhead
        # Those that compute, in the order they began, for the order of events.
        self._busy: dict[Tenant, None] = {}

    @property
    def crowding(self) -> float:
        """How many times as long a process takes that is none of these."""
        return self._overhead.crowding(len(self._busy))

    def factor(self, tenant: Tenant, shape: StepShape) -> float:
        """How many times as long a step of it takes now."""
        beside = len(self._busy) - (tenant in self._busy)
        known = min(beside, self._sharing.num_known(shape))
        return self._sharing.factor(shape, beside) * self._overhead.more_crowded(beside + 1, known + 1)

    def changed(self, tenant: Tenant, *, is_busy: bool) -> None:
        if (tenant in self._busy) is is_busy:
            return
        if is_busy:
            self._busy[tenant] = None
        else:
            del self._busy[tenant]
        for other in list(self._busy) if self._sharing or self._overhead.num_cores else ():
            if other is not tenant:
                other.disturbed()


class Loop:
    """The slowest event loop that all tokens pass, the router's or the client's. It takes up what comes in that order;
    tokens between the first and the last of a stream are work at a rate, as no rule looks at each of them."""

    def __init__(self, events: Events, times: LoopTimes, host: Host | None) -> None:
        self._events = events
        self._times = times
        self._host = host
        # Processor time that waits, as of a time, and what comes of it in each second.
        self._work_s = 0.0
        self._at_s = 0.0
        self._load = 0.0
        # Nothing that comes later is done before.
        self._done_s = 0.0

    def load(self, num_tokens: int, step_s: float) -> float:
        """Work in each second of steps that bring so many tokens each."""
        return (self._times.step_s + num_tokens * self._times.token_s) / step_s if num_tokens else 0.0

    def streams(self, more: float) -> None:
        """So much more load comes from now on, or less."""
        self._settle()
        self._load = max(0.0, self._load + more)

    def begins_s(self, num_requests: int = 0, num_tokens: int = 0) -> float:
        """When it takes up what comes now: requests, or messages with so many tokens."""
        self._settle()
        self._done_s = max(self._done_s, self._events.now_s + self._work_s * self._crowding)
        self._work_s += num_requests * self._times.request_s + self.load(num_tokens, 1.0)
        return self._done_s

    @property
    def _crowding(self) -> float:
        return 1.0 if self._host is None else self._host.crowding

    def _settle(self) -> None:
        now = self._events.now_s
        self._work_s = max(0.0, self._work_s + (now - self._at_s) * (self._load - 1 / self._crowding))
        self._at_s = now
