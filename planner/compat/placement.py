"""Which machines a request of the compat profile is given to, at its arrival and for good. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

from baton.types import Role
from planner.compat.machine import Job, Machine

# A prompt joins no queue that would be longer with it, unless the machine has nothing waiting.
_MAX_PENDING_TOKENS = 8192

_pending = attrgetter("pending_tokens")
_scheduled = attrgetter("scheduled_bytes")


class OnePool:
    """All machines are mixed: a request runs where the fewest tokens are pending."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self._machines = machines
        self.num_role_changes = 0

    def place(self, job: Job) -> None:
        job.source = job.target = chosen = min(self._machines, key=_pending)
        chosen.pending_tokens += job.prompt.step_tokens + 1

    def idle(self, machine: Machine) -> None:
        """It stays where it is."""


class TwoPools:
    """Prompt machines and token machines, and a mixed pool of those that were taken from either.

    Among equals the first of a pool is chosen. A machine that comes home is the last of its pool.
    """

    def __init__(self, machines: Iterable[Machine]) -> None:
        self._homes: dict[Role, list[Machine]] = {Role.PREFILL: [], Role.DECODE: []}
        for machine in machines:
            self._homes[machine.use.role].append(machine)
        self._mixed: list[Machine] = []
        self.num_role_changes = 0

    def place(self, job: Job) -> None:
        prompts, tokens = self._homes[Role.PREFILL], self._homes[Role.DECODE]
        source = self._for_prompt(prompts, job) or self._for_prompt(self._mixed, job)
        target = self._for_tokens(tokens, job) or self._for_tokens(self._mixed, job)
        if source is None and tokens:
            source = self._take(tokens, min(tokens, key=_pending))
        if target is None and prompts:
            target = self._take(prompts, min(prompts, key=_scheduled))
        if source is None or target is None:
            source = target = min((*prompts, *self._mixed, *tokens), key=_pending)
        job.source, job.target = source, target
        target.scheduled_bytes += job.kv_bytes
        if job.is_split:
            source.scheduled_bytes += job.prompt.kv_bytes
        source.pending_tokens += job.prompt.step_tokens
        target.pending_tokens += 1

    def idle(self, machine: Machine) -> None:
        """A mixed machine goes home as soon as it has nothing to do."""
        if machine in self._mixed:
            self._mixed.remove(machine)
            self._homes[machine.use.role].append(machine)
            self.num_role_changes += 1

    def _take(self, pool: list[Machine], machine: Machine) -> Machine:
        pool.remove(machine)
        self._mixed.append(machine)
        self.num_role_changes += 1
        return machine

    @staticmethod
    def _for_prompt(pool: Sequence[Machine], job: Job) -> Machine | None:
        if not pool:
            return None
        best = min(pool, key=_pending)
        is_long = best.pending_tokens + job.prompt.step_tokens > _MAX_PENDING_TOKENS
        return None if best.waiting and is_long else best

    @staticmethod
    def _for_tokens(pool: Sequence[Machine], job: Job) -> Machine | None:
        if not pool:
            return None
        best = min(pool, key=_scheduled)
        return None if best.scheduled_bytes + job.kv_bytes >= best.max_memory_bytes else best
