"""Gives several servers the same loads in turn, in rounds, so that all are measured under the same conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from baton.errors import Unavailable
from loadgen import counters
from loadgen.client import Asking, Server
from loadgen.figures import Figures, record_of
from loadgen.load import Load, Request, closed
from loadgen.objectives import Limits, Uncontended
from loadgen.run import Outcome, Watch, run

# Prompt lengths at which single requests are measured: these shares of a load's requests are at most as long.
_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
_ALONE_REPEATS = 3
_ALONE_OUTPUT_TOKENS = 16
_ALONE_LIMIT_S = 600.0
_IDLE_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server to measure. ``about``: what the record tells of it, such as its options."""

    name: str
    server: Server
    asking: Asking
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """One load on one server in one round."""

    target: str
    load: str
    round: int
    outcome: Outcome
    counted: Mapping[str, float]
    # What was measured beside it: cores that the generator itself used, and what the caller adds.
    beside: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that was measured, in order."""

    targets: tuple[Target, ...]
    alone: Uncontended | None
    limits: Limits
    runs: tuple[Measured, ...]

    def pooled(self) -> dict[tuple[str, str], Figures]:
        """The figures of each server and load over the requests of all rounds."""
        by_cell: dict[tuple[str, str], list[Outcome]] = {}
        for each in self.runs:
            by_cell.setdefault((each.target, each.load), []).append(each.outcome)
        return {cell: self.figures(Outcome.joined(outcomes)) for cell, outcomes in by_cell.items()}

    def figures(self, outcome: Outcome) -> Figures:
        return Figures.of(outcome, self.alone, self.limits)

    def of_loads(self, beginning: str) -> Comparison:
        """The part with the loads whose names begin so."""
        return replace(self, runs=tuple(each for each in self.runs if each.load.startswith(beginning)))

    def as_json(self, *, has_requests: bool = True) -> dict[str, Any]:
        """Targets, the times of single requests, pooled figures, and every run, with its requests if wanted."""
        cells = self.pooled()
        return {
            "targets": [{"name": t.name, "model": t.asking.model, **t.about} for t in self.targets],
            "limits": asdict(self.limits),
            "alone": [] if self.alone is None else [asdict(point) for point in self.alone.points],
            "figures": [{"target": t, "load": load, **found.as_json()} for (t, load), found in cells.items()],
            "runs": [
                {
                    "target": each.target, "load": each.load, "round": each.round,
                    "rate": each.outcome.load.rate, "streams": each.outcome.load.streams,
                    **self.figures(each.outcome).as_json(),
                    "counted": dict(each.counted),
                    **each.beside,
                    **({"requests_sent": [record_of(a) for a in each.outcome.answers]} if has_requests else {}),
                }
                for each in self.runs
            ],
        }  # fmt: skip


def alone_load(requests: Sequence[Request]) -> Load:
    """Single requests, one after the other, whose prompts are as long as those of a load."""
    ordered = sorted(request.prompt_tokens for request in requests)
    lengths = sorted({ordered[round(share * (len(ordered) - 1))] for share in _SHARES})
    each = tuple(Request(length, _ALONE_OUTPUT_TOKENS) for length in lengths)
    return closed("alone", each * _ALONE_REPEATS, 1, _ALONE_LIMIT_S)


async def uncontended(target: Target, load: Load, seed: str, watch: Watch) -> Uncontended:
    """What single requests take on an idle server. Raises Unavailable."""
    outcome = await run(load, target.server, target.asking, f"alone {seed}", watch)
    if failed := [answer for answer in outcome.answers if answer.error is not None]:
        raise Unavailable(f"{target.name}: a single request failed: {failed[0].error}")
    if outcome.num_cut:
        raise Unavailable(f"{target.name}: single requests took longer than {load.limit_s:g} s")
    return Uncontended.of(outcome.answers)


@dataclass(frozen=True, slots=True)
class Schedule:
    """``loads`` makes those of a round. ``until_s``: the end of the time there is, by the clock of ``time.monotonic``;
    a run is not begun if it would end later, taking as long as the longest of its load so far."""

    loads: Callable[[int], Sequence[Load]]
    rounds: int
    seed: str
    until_s: float | None = None


async def compare(
    targets: Sequence[Target],
    schedule: Schedule,
    told: Callable[[Measured], None],
    watching: Callable[[Target, Load], Watch],
) -> tuple[Measured, ...]:
    """Every round gives each load to every server, each time beginning with another one."""
    runs: list[Measured] = []
    longest_s: dict[str, float] = {}
    for number in range(schedule.rounds):
        for load in schedule.loads(number):
            shift = number % len(targets)
            for target in (*targets[shift:], *targets[:shift]):
                began_s = time.monotonic()
                if schedule.until_s is not None and began_s + longest_s.get(load.name, 0.0) > schedule.until_s:
                    return tuple(runs)
                runs.append(await measured(target, load, number, schedule.seed, watching(target, load)))
                longest_s[load.name] = max(longest_s.get(load.name, 0.0), time.monotonic() - began_s)
                told(runs[-1])
    return tuple(runs)


async def measured(
    target: Target, load: Load, number: int, seed: str, watch: Watch, beside: Mapping[str, float] | None = None
) -> Measured:
    """One load on one idle server. Raises Unavailable."""
    if not await counters.until_idle(target.server, _IDLE_LIMIT_S):
        raise Unavailable(f"{target.name} still had requests after {_IDLE_LIMIT_S:g} s without a load")
    before = await counters.counted(target.server)
    began_s, used_s = time.monotonic(), time.process_time()
    outcome = await run(load, target.server, target.asking, f"{seed}/{load.name}/{number}", watch)
    cores = (time.process_time() - used_s) / (time.monotonic() - began_s)
    counted = counters.during(before, await counters.counted(target.server))
    return Measured(target.name, load.name, number, outcome, counted, {"generator_cores": cores, **(beside or {})})
