"""Which machines a request of the compat profile is given to, at its arrival and for good. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from baton.types import Role
from planner.compat.machine import Machine
from planner.compat.pool import Pool
from planner.compat.tasks import Job

# A prompt joins no queue that would be longer with it, unless the machine has nothing waiting.
_MAX_PENDING_TOKENS = 8192

_pending = attrgetter("pending_tokens")
_scheduled = attrgetter("scheduled_bytes")


class OnePool:
    """All machines are mixed: a request runs where the fewest tokens are pending."""

    def __init__(self, machines: Iterable[Machine]) -> None:
        self._pool = Pool(_pending)
        for machine in machines:
            self._pool.add(machine)
        self.num_role_changes = 0

    def place(self, job: Job) -> None:
        chosen = self._pool.least()
        assert chosen is not None
        job.source = job.target = chosen
        chosen.expect(tokens=job.prompt.step_tokens + 1, num_bytes=job.kv_bytes)

    def idle(self, machine: Machine) -> None:
        """It stays where it is."""


class TwoPools:
    """Prompt machines and token machines, and a mixed pool of those that were taken from either.

    Among equals the first of a pool is chosen. A machine that comes home is the last of its pool.
    """

    def __init__(self, machines: Iterable[Machine]) -> None:
        self._prompts = Pool(_pending)
        self._tokens = Pool(_scheduled)
        # Looked at by both figures; it has few machines, or the cluster is overloaded.
        self._mixed = Pool(_pending)
        for machine in machines:
            self._home(machine).add(machine)
        self.num_role_changes = 0

    def place(self, job: Job) -> None:
        prompts, tokens, mixed = self._prompts, self._tokens, self._mixed
        source = _for_prompt(prompts.least(), job) or _for_prompt(mixed.least(), job)
        target = _for_tokens(tokens.least(), job) or _for_tokens(min(mixed, key=_scheduled, default=None), job)
        if source is None and tokens:
            source = self._take(min(tokens, key=_pending))
        if target is None and prompts:
            target = self._take(min(prompts, key=_scheduled))
        if source is None or target is None:
            source = target = min((*prompts, *mixed, *tokens), key=_pending)
        job.source, job.target = source, target
        source.expect(tokens=job.prompt.step_tokens, num_bytes=job.prompt.kv_bytes if job.is_split else 0)
        target.expect(tokens=1, num_bytes=job.kv_bytes)

    def idle(self, machine: Machine) -> None:
        """A mixed machine goes home as soon as it has nothing to do."""
        if machine.pool is self._mixed:
            self._move(machine, self._home(machine))

    def _take(self, machine: Machine) -> Machine:
        self._move(machine, self._mixed)
        return machine

    def _home(self, machine: Machine) -> Pool:
        return self._prompts if machine.use.role is Role.PREFILL else self._tokens

    def _move(self, machine: Machine, pool: Pool) -> None:
        assert machine.pool is not None
        machine.pool.remove(machine)
        pool.add(machine)
        self.num_role_changes += 1


def _for_prompt(best: Machine | None, job: Job) -> Machine | None:
    """``best`` is that of a pool."""
    if best is None or (best.waiting and best.pending_tokens + job.prompt.step_tokens > _MAX_PENDING_TOKENS):
        return None
    return best


def _for_tokens(best: Machine | None, job: Job) -> Machine | None:
    if best is None or best.scheduled_bytes + job.kv_bytes >= best.max_memory_bytes:
        return None
    return best
