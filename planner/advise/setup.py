"""What an operator can change about a running cluster (pools, caps, splitting), and what is one change away. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from baton.types import Role
from engine.scheduler_config import SchedulerConfig
from planner.design import Design, Group
from planner.machines import Machine
from planner.sim.config import SimulationConfig
from router.cluster.config import MODES, PolicyConfig

# Of the caps that are tried: prompt tokens of a step.
_LEAST_BATCH, _MOST_BATCH = 64, 1 << 16
# Without a target, those that are tried are so many times the median time between tokens.
_TARGET_FACTORS = (2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Setup:
    """Nodes by their home pool, and settings that all of them have."""

    prefill: int = 0
    decode: int = 0
    mixed: int = 0
    disaggregation: str = "auto"
    tbt_target_s: float | None = None
    max_batch_tokens: int = 2048
    max_num_seqs: int = 256

    def count(self, role: Role) -> int:
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}[role]

    @property
    def num_nodes(self) -> int:
        return self.prefill + self.decode + self.mixed

    @property
    def can_serve(self) -> bool:
        return min(self.prefill, self.decode, self.mixed) >= 0 and bool(self.mixed or (self.prefill and self.decode))

    @property
    def name(self) -> str:
        pools = " + ".join(f"{self.count(role)} {role.value}" for role in Role if self.count(role))
        target = "no TBT target" if self.tbt_target_s is None else f"TBT target {1e3 * self.tbt_target_s:g} ms"
        return f"{pools}, splitting {self.disaggregation}, {target}, {self.max_batch_tokens:,} prompt tokens a step"

    def with_nodes(self, **more: int) -> Setup:
        return replace(self, **{pool: getattr(self, pool) + count for pool, count in more.items()})

    def design(self, machine: Machine) -> Design:
        return Design(tuple(Group(role, machine, self.count(role)) for role in Role if self.count(role)))

    def config(self, max_output_tokens: int) -> SimulationConfig:
        """Of a simulated cluster; all else as the settings' defaults."""
        return SimulationConfig(
            policy=PolicyConfig(disaggregation=self.disaggregation),
            scheduler=SchedulerConfig(
                max_batch_tokens=self.max_batch_tokens, max_num_seqs=self.max_num_seqs, tbt_target_s=self.tbt_target_s
            ),
            max_output_tokens=max_output_tokens,
        )


@dataclass(frozen=True, slots=True)
class Neighbour:
    """``about``: the change."""

    about: str
    setup: Setup


def neighbours(today: Setup, median_tbt_s: float | None) -> Iterator[Neighbour]:
    """Each a change away: of one node, of all pools at once, of splitting, of a cap."""
    seen = {today}
    for about, setup in (*_pools(today), *_modes(today), *_caps(today, median_tbt_s)):
        if setup.can_serve and setup not in seen:
            seen.add(setup)
            yield Neighbour(about, setup)


def _pools(today: Setup) -> Iterator[tuple[str, Setup]]:
    pools = [role.value for role in Role if today.count(role)]
    for giver in pools:
        for taker in pools:
            if giver != taker:
                yield f"a node from {giver} to {taker}", today.with_nodes(**{giver: -1, taker: 1})
    total = today.num_nodes
    yield "all nodes mixed", replace(today, prefill=0, decode=0, mixed=total)
    if pools == [Role.MIXED.value]:
        for prefill in sorted({1, total // 2, total - 1}):
            yield (
                f"pools of {prefill} and {total - prefill}",
                replace(today, prefill=prefill, decode=total - prefill, mixed=0),
            )
    for pool in pools:
        yield f"another node in {pool}", today.with_nodes(**{pool: 1})
    for pool in pools:
        yield f"a node less in {pool}", today.with_nodes(**{pool: -1})


def _modes(today: Setup) -> Iterator[tuple[str, Setup]]:
    if today.prefill and today.decode:
        for mode in MODES:
            yield f"splitting {mode}", replace(today, disaggregation=mode)


def _caps(today: Setup, median_tbt_s: float | None) -> Iterator[tuple[str, Setup]]:
    # Where every request is split over pools, no step has both phases.
    if today.mixed or today.disaggregation != "always":
        target_s = today.tbt_target_s
        if target_s is not None:
            yield "no TBT target", replace(today, tbt_target_s=None)
        basis_s, factors = (target_s, (0.5, 2.0)) if target_s else (median_tbt_s or 0.0, _TARGET_FACTORS)
        for factor in factors:
            if target_ms := float(f"{1e3 * basis_s * factor:.2g}"):
                yield f"a TBT target of {target_ms:g} ms", replace(today, tbt_target_s=target_ms / 1e3)
    for tokens in (today.max_batch_tokens // 2, today.max_batch_tokens * 2):
        if _LEAST_BATCH <= tokens <= _MOST_BATCH:
            yield f"{tokens:,} prompt tokens a step", replace(today, max_batch_tokens=tokens)
