"""A cluster design: how many machines of which type in each pool. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from baton.errors import BadConfig, quoted
from baton.types import Role
from planner.machines import Machine


@dataclass(frozen=True, slots=True)
class Group:
    """Machines of one type in one pool."""

    role: Role
    machine: Machine
    count: int


@dataclass(frozen=True, slots=True)
class Design:
    groups: tuple[Group, ...]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def count(self, role: Role) -> int:
        return sum(group.count for group in self.groups if group.role is role)

    @property
    def num_machines(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def dollars_per_hour(self) -> float:
        return sum(group.count * group.machine.machine_dollars_per_hour for group in self.groups)

    @property
    def power_units(self) -> float:
        return sum(group.count * group.machine.power_units for group in self.groups)

    @property
    def name(self) -> str:
        """For reports: 25 x h100-80gb prefill + 26 x a100-80gb decode."""
        return " + ".join(f"{g.count} x {g.machine.name} {g.role.value}" for g in self.groups)


def parse(
    known: Mapping[str, Machine], *, prompt: Iterable[str] = (), token: Iterable[str] = (), mixed: Iterable[str] = ()
) -> Design:
    """From texts like h100-80gb:25. Raises BadConfig: an unknown machine, a count below 1, a pool without a partner."""
    pools = ((Role.PREFILL, "--prompt", prompt), (Role.DECODE, "--token", token), (Role.MIXED, "--mixed", mixed))
    design = Design(tuple(_group(role, option, text, known) for role, option, texts in pools for text in texts))
    num_prompt, num_token, num_mixed = (design.count(role) for role, _, _ in pools)
    if not num_mixed and not (num_prompt and num_token):
        raise BadConfig(
            f"a design with {num_prompt} prompt, {num_token} token and {num_mixed} mixed machines cannot serve a "
            "request; expected machines of both --prompt and --token, or of --mixed",
            param="design",
        )
    return design


def _group(role: Role, option: str, text: str, known: Mapping[str, Machine]) -> Group:
    name, _, number = text.rpartition(":")
    if not name or not number.isdecimal() or not 1 <= int(number) <= 100_000:
        raise BadConfig(
            f"{option} is {quoted(text)}, expected a machine and a number of them: h100-80gb:25", param=option
        )
    if name not in known:
        raise BadConfig(f"{option} names the machine {quoted(name)}, expected one of {', '.join(known)}", param=option)
    return Group(role, known[name], int(number))
