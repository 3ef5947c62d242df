"""One entry for all profiles: a run, and what its slowdowns are over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from planner.compat.run import simulate
from planner.design import Design
from planner.machines import Machine
from planner.models import Model
from planner.results import Profile, Run
from planner.table import TokenTimes
from planner.uncontended import BASIS, TableUncontended, Uncontended
from planner.workload import Workload

# Those that can be simulated.
PROFILES = (Profile.COMPAT,)


class Simulated(NamedTuple):
    run: Run
    alone: Uncontended


def simulated(
    profile: Profile,
    workload: Workload,
    design: Design,
    model: Model,
    tensor_parallel: int,
    known: Mapping[str, Machine],
) -> Simulated:
    """``known`` has the machine that slowdowns are over. Raises BadConfig."""
    assert profile in PROFILES
    run = simulate(workload, design, model, tensor_parallel)
    return Simulated(run, TableUncontended(TokenTimes(model.name, known[BASIS], tensor_parallel)))
