"""Keeps a worker's record in the registry: a pure machine for the registration, and its driver, which talks to Redis.

A registry that cannot be reached disturbs nothing: the worker goes on and tries again until it is there.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace

from baton.clock import Clock
from baton.defects import Defects
from baton.driver import Driver
from baton.errors import Unavailable
from baton.machine import Tick
from baton.registry import NodeRecord, Registry
from baton.settings import check, setting
from baton.types import Role

_log = logging.getLogger("baton.worker.registry")


@dataclass(frozen=True, slots=True)
class LeaseConfig:
    # A record lives so long without being renewed, and is renewed three times as often.
    ttl_s: float = field(
        default=10.0,
        metadata=setting(
            "--registry-lease",
            "Seconds a registration lives without being renewed.",
            least=0.1,
            most=3600,
            up_flag=False,
        ),
    )
    backoff_base_s: float = 0.1

    def __post_init__(self) -> None:
        check(self)

    @property
    def renew_s(self) -> float:
        return self.ttl_s / 3


# -- events


@dataclass(frozen=True, slots=True)
class Begin:
    pass


@dataclass(frozen=True, slots=True)
class Accepted:
    pass


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another incarnation holds the address."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class Failed:
    reason: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    pass


Event = Begin | Accepted | Superseded | Failed | Withdraw | Tick

# -- actions


@dataclass(frozen=True, slots=True)
class Register:
    """Answer with Accepted, Superseded or Failed."""

    takes_over: bool


@dataclass(frozen=True, slots=True)
class Leave:
    pass


@dataclass(frozen=True, slots=True)
class Say:
    level: int
    message: str


Action = Register | Leave | Say


class LeaseKeeper:
    """The first registration takes the address over from an earlier incarnation; a renewal never does."""

    def __init__(self, config: LeaseConfig) -> None:
        self._config = config
        self._has_been_accepted = False
        self._is_over = False
        self._failures = 0
        self._failing_since_s = 0.0
        # When to send Tick; None while an answer is awaited, and when it is over.
        self.wake_at_s: float | None = None

    def handle(self, event: Event, now: float) -> list[Action]:
        if self._is_over:
            return []
        match event:
            case Begin():
                return self._register()
            case Tick():
                return self._register() if self.wake_at_s is not None and now >= self.wake_at_s else []
            case Accepted():
                return self._accepted(now)
            case Failed(reason):
                return self._failed(reason, now)
            case Superseded(incarnation):
                self._is_over, self.wake_at_s = True, None
                message = (
                    f"incarnation {incarnation} is registered at this worker's address: two workers advertise one "
                    "address; this one is not registered any more, give each its own --listen or --advertise"
                )
                return [Say(logging.ERROR, message)]
            case Withdraw():
                self._is_over, self.wake_at_s = True, None
                return [Leave()]

    def _register(self) -> list[Action]:
        self.wake_at_s = None
        return [Register(takes_over=not self._has_been_accepted)]

    def _accepted(self, now: float) -> list[Action]:
        self.wake_at_s = now + self._config.renew_s
        failures, self._failures = self._failures, 0
        is_first, self._has_been_accepted = not self._has_been_accepted, True
        if failures:
            return [Say(logging.INFO, f"registered again, {now - self._failing_since_s:.1f} s after the registry left")]
        return [Say(logging.INFO, "registered")] if is_first else []

    def _failed(self, reason: str, now: float) -> list[Action]:
        wait_s = self._config.backoff_base_s * 2.0 ** min(self._failures, 16)
        self.wake_at_s = now + min(wait_s, self._config.renew_s)
        self._failures += 1
        if self._failures > 1:
            return []
        self._failing_since_s = now
        return [Say(logging.WARNING, f"cannot register: {reason}; the worker serves on and tries again")]


class Registration:
    """Drives a LeaseKeeper over a Registry, one call at a time. ``withdraw`` never raises and is bounded in time."""

    def __init__(
        self,
        registry: Registry,
        record: NodeRecord,
        config: LeaseConfig,
        clock: Clock,
        defects: Defects | None = None,
    ) -> None:
        self._defects = defects or Defects(_log, clock)
        self._registry = registry
        self._record = record
        self._ttl_s = config.ttl_s
        self._driver: Driver[Event, Action] = Driver(
            LeaseKeeper(config), self._perform, clock, on_error=self._on_error, tick=Tick
        )
        # The call of the registry that is under way, or was the last one.
        self._call: asyncio.Task[None] | None = None
        self._is_starting = True

    def change_home(self, role: Role) -> None:
        """The record has this home role from its next renewal on."""
        self._record = replace(self._record, home_role=role)

    async def start(self) -> None:
        """Returns after the first attempt, whatever came of it. Raises BadConfig if Redis does not let us in."""
        self._driver.feed(Begin())
        assert self._call is not None
        await self._call
        self._is_starting = False

    async def withdraw(self) -> None:
        await self._settled()  # A registration under way would write the record again.
        self._driver.feed(Withdraw())
        await self._settled()
        self._driver.close()

    async def close(self) -> None:
        await self.withdraw()
        await self._registry.close()

    async def _settled(self) -> None:
        if self._call is not None:
            await asyncio.wait([self._call])

    def _perform(self, action: Action) -> None:
        match action:
            case Register(takes_over):
                self._call = asyncio.get_running_loop().create_task(self._register(takes_over), name="registration")
            case Leave():
                self._call = asyncio.get_running_loop().create_task(self._leave(), name="registration")
            case Say(level, message):
                _log.log(level, "%s: %s", self._record.node_id, message)

    def _on_error(self, about: Event | Action, error: Exception) -> None:
        defect = self._defects.caught("registration", error, type(about).__name__)
        if not isinstance(about, Failed):  # The record must not expire under a worker that lives.
            asyncio.get_running_loop().call_soon(self._driver.feed, Failed(defect.message))

    async def _register(self, takes_over: bool) -> None:
        event: Event
        try:
            holder = await self._registry.register(self._record, self._ttl_s, takes_over=takes_over)
        except Exception as error:
            # Later on BadConfig means that credentials are being changed: access was granted before.
            if self._is_starting and not isinstance(error, Unavailable):
                raise
            event = Failed(self._defects.failure("registration", error).message)
        else:
            event = Accepted() if holder is None else Superseded(holder)
        self._driver.feed(event)

    async def _leave(self) -> None:
        try:
            await self._registry.leave(self._record)
        except Exception as error:
            failure = self._defects.failure("registration", error)
            _log.warning("%s: the record stays until it expires: %s", self._record.node_id, failure.message)
