"""What a simulated run found: each request, each machine, and the summary of all. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from baton.types import Role, TransferReport
from planner.design import Design
from planner.workload import Request, Workload


class Profile(Enum):
    """Whose rules a run follows; every report names it."""

    # Those of the Splitwise paper's public simulator, its known errors included.
    COMPAT = "compat"
    # Baton's own policy code, and costs as they are.
    HONEST = "honest"


class Ending(Enum):
    WHOLE = "whole"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    # All attempts failed, or it never had a place.
    FAILED = "failed"


@dataclass(slots=True)
class Served:
    """One request. Times are of the simulated clock; None: it did not come so far."""

    request: Request
    prompt_machine: str = ""
    token_machine: str = ""
    # At its client.
    first_token_s: float | None = None
    # Where it is computed: when the prompt ended, when the first step began that decodes it, and when its second token
    # was drawn.
    prompt_end_s: float | None = None
    decode_start_s: float | None = None
    second_token_s: float | None = None
    ended_s: float | None = None
    ending: Ending | None = None
    num_attempts: int = 1
    num_moves: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    # Largest time between two of its tokens; not followed in the profile compat.
    max_gap_s: float = 0.0
    energy_j: float = 0.0

    @property
    def is_whole(self) -> bool:
        return self.ending is Ending.WHOLE


# Is told of a request when it has its first token and when it has ended. What it raises ends the run.
Told = Callable[[Served], None]


def tell_nobody(served: Served) -> None:
    """For runs that are looked at when they are over."""


@dataclass(slots=True)
class MachineUse:
    """One machine over the run."""

    name: str
    role: Role
    machine: str
    # Seconds in steps of prompts alone, of decodes alone, and of both.
    prompt_s: float = 0.0
    decode_s: float = 0.0
    mixed_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
    max_kv_tokens: int = 0
    prompt_energy_j: float = 0.0
    decode_energy_j: float = 0.0
    idle_energy_j: float = 0.0


@dataclass(frozen=True, slots=True)
class RoleChange:
    """``role`` is the acting one if the machine was borrowed or returned, else the pool that it is in from then on."""

    at_s: float
    machine: str
    role: Role
    reason: str


@dataclass(slots=True)
class Run:
    profile: Profile
    workload: Workload
    design: Design
    served: tuple[Served, ...]
    machines: tuple[MachineUse, ...]
    # When the last request was over.
    ended_s: float
    # By name: transfers, bytes moved, role changes, moves, preemptions, ...
    counters: Mapping[str, float] = field(default_factory=dict)
    # What the reader has to know: times that a table had to be extrapolated for, and the like.
    warnings: tuple[str, ...] = ()
    role_changes: tuple[RoleChange, ...] = ()
    # Times between two tokens of a sequence, to 1 %, and how many there were.
    gaps_s: tuple[tuple[float, int], ...] = ()
    # KV that was moved, in the order of the machines it left.
    transfers: tuple[TransferReport, ...] = ()
