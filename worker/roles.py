"""The roles of a node, as a pure machine: the pool that it belongs to, and the one whose work it takes now.

                       takes work of the other pool
    acts in its home ──────────────────────────────▶ acts as mixed
           ▲                                               │
           └────── dwell_s after the last of that work ────┘

A router borrows the node by giving it such work: there is no message for it, and none can be lost on the way home. The
home role changes by SetRole alone; what is here goes on, and may be work of the other pool from then on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.errors import Conflict, InvalidRequest
from baton.machine import Tick
from baton.settings import check, setting
from baton.types import Role


@dataclass(frozen=True, slots=True)
class RolesConfig:
    # A borrowed node acts as mixed for so long after the last work of the other pool. The requests of a burst come a
    # fraction of a second apart; without it the role would change with each of them.
    dwell_s: float = field(default=2.0, metadata=setting(least=0, most=3600))
    # Schedulers leave the node in a pool for so long. Several routers do not talk to each other: this alone keeps them
    # from changing a node in turn.
    min_home_s: float = field(default=30.0, metadata=setting(least=0, most=86_400))

    def __post_init__(self) -> None:
        check(self)


class Reason(Enum):
    """Why a role changed."""

    # It took work of the other pool, and that work is over.
    BORROWED = "borrowed"
    RETURNED = "returned"
    # Who put it into another pool.
    SCHEDULER = "scheduler"
    OPERATOR = "operator"


# -- events


@dataclass(frozen=True, slots=True)
class Work:
    """What the node has to do now."""

    # Prompts that are not computed to their end.
    has_prompts: bool
    # Sequences that generate tokens here, or have room reserved for that.
    has_decodes: bool


@dataclass(frozen=True, slots=True)
class SetRole:
    """Belong to this pool; None: to the one that it started in, and schedulers may change that.

    ``expected``: of a scheduler, the home role that its decision was based on; None: an operator asks.
    """

    role: Role | None
    expected: Role | None = None


Event = Work | SetRole | Tick

# -- actions


@dataclass(frozen=True, slots=True)
class RoleChanged:
    """``before`` and ``after`` are acting roles if it was borrowed or returned, else home roles."""

    before: Role
    after: Role
    reason: Reason


class Roles:
    """``handle(event, now)`` -> actions. Invariant: it acts in its home role, or as mixed."""

    def __init__(self, home: Role, config: RolesConfig) -> None:
        self._config = config
        self._started_in = home
        self._work = Work(has_prompts=False, has_decodes=False)
        # When schedulers may change the home role again.
        self._free_at_s = float("-inf")
        self.home = self.acting = home
        self.is_pinned = False
        # When it goes home; None while it is there, or has work of the other pool.
        self.wake_at_s: float | None = None

    def handle(self, event: Event, now: float) -> list[RoleChanged]:
        """Raises Conflict if a scheduler's SetRole is refused, and InvalidRequest."""
        match event:
            case Work():
                self._work = event
                return self._borrowed() if self._is_away else self._on_own_work(now)
            case SetRole(role, expected):
                return self._set(role, expected, now)
            case Tick():
                return self._returned() if self.wake_at_s is not None and now >= self.wake_at_s else []

    @property
    def _is_away(self) -> bool:
        """Holds work of the other pool."""
        return (self.home is Role.DECODE and self._work.has_prompts) or (
            self.home is Role.PREFILL and self._work.has_decodes
        )

    def _borrowed(self) -> list[RoleChanged]:
        self.wake_at_s = None
        return self._act_as(Role.MIXED, Reason.BORROWED)

    def _on_own_work(self, now: float) -> list[RoleChanged]:
        if self.acting is not self.home and self.wake_at_s is None:
            self.wake_at_s = now + self._config.dwell_s
        return []

    def _returned(self) -> list[RoleChanged]:
        self.wake_at_s = None
        return self._act_as(self.home, Reason.RETURNED)

    def _act_as(self, role: Role, reason: Reason) -> list[RoleChanged]:
        before, self.acting = self.acting, role
        return [] if before is role else [RoleChanged(before, role, reason)]

    def _set(self, role: Role | None, expected: Role | None, now: float) -> list[RoleChanged]:
        if expected is None:
            self.is_pinned = role is not None
            return self._move(role or self._started_in, Reason.OPERATOR, now)
        if role is None:
            raise InvalidRequest("role is not given, expected one from a scheduler", param="role")
        self._check_scheduler(expected, now)
        return self._move(role, Reason.SCHEDULER, now)

    def _check_scheduler(self, expected: Role, now: float) -> None:
        if self.is_pinned:
            raise Conflict(f"an operator has set the role to {self.home.value}; only an operator changes it")
        if self.home is not expected:
            raise Conflict(f"the home role is {self.home.value}, expected {expected.value}; decide again")
        if now < self._free_at_s:
            wait_s = self._free_at_s - now
            message = f"the home role may change again in {wait_s:.1f} s; decide again then"
            raise Conflict(message, retry_after_s=wait_s)

    def _move(self, home: Role, reason: Reason, now: float) -> list[RoleChanged]:
        before, self.home = self.home, home
        if before is home:
            return []
        self._free_at_s = now + self._config.min_home_s
        self.acting = Role.MIXED if self._is_away else home
        self.wake_at_s = None
        return [RoleChanged(before, home, reason)]
