"""One entry for all profiles: a run, and what its slowdowns are over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from baton.errors import BadConfig
from planner.compat import run as compat
from planner.design import Design
from planner.energy import StepPower
from planner.machines import Machine
from planner.measured import MACHINE, Measured
from planner.models import Model
from planner.results import Profile, Run, Told, tell_nobody
from planner.roofline import Roofline
from planner.sim import run as sim
from planner.sim.config import SimulationConfig
from planner.table import ShapeTimes, TokenTimes, rows
from planner.times import Times
from planner.uncontended import BASIS, StepUncontended, TableUncontended, Uncontended
from planner.workload import Workload


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
    told: Told = tell_nobody,
) -> Simulated:
    """``known`` has the machine that slowdowns are over. Raises BadConfig."""
    alone = uncontended(profile, model, tensor_parallel, known)
    if profile is Profile.COMPAT:
        return Simulated(compat.simulate(workload, design, model, tensor_parallel, told), alone)
    for group in design:
        if group.machine.num_gpus != tensor_parallel:
            raise BadConfig(
                f"tensor parallelism is {tensor_parallel}, and {group.machine.name} has {group.machine.num_gpus} GPUs; "
                "in the profile honest a machine has one model on all of its GPUs: expected as many, or a machine with "
                "fewer GPUs",
                param="tensor_parallel",
            )
    times = {group.machine.name: times_of(model, group.machine, tensor_parallel) for group in design}
    power = {
        group.machine.name: StepPower(model, group.machine, tensor_parallel, times[group.machine.name])
        for group in design
    }
    return Simulated(sim.simulate(workload, design, model, times, power=power, told=told), alone)


def uncontended(profile: Profile, model: Model, tensor_parallel: int, known: Mapping[str, Machine]) -> Uncontended:
    """What slowdowns are over. Raises BadConfig."""
    if profile is Profile.COMPAT:
        return TableUncontended(TokenTimes(model.name, known[BASIS], tensor_parallel))
    return StepUncontended(times_of(model, known[BASIS], tensor_parallel))


def simulated_as(measured: Measured, workload: Workload, design: Design, config: SimulationConfig) -> Simulated:
    """Honest, with machines as a profile has measured them. Raises BadConfig if the design has others."""
    if others := [group.machine.name for group in design if group.machine.name != MACHINE]:
        raise BadConfig(
            f"the design has {others[0]}, expected machines {MACHINE!r} alone: a profile is of one kind of node",
            param="design",
        )
    configured = measured.configured(config)
    run = sim.simulate(workload, design, measured.as_model(), {MACHINE: measured.times()}, configured)
    return Simulated(run, StepUncontended(measured.times()))


def times_of(model: Model, machine: Machine, tensor_parallel: int) -> Times:
    """Those of the table if it has them, else of a roofline. Raises BadConfig if the machine cannot have the model."""
    asked = (model.name, machine.measured_as or machine.name, tensor_parallel)
    if any((row.model, row.hardware, row.tensor_parallel) == asked for row in rows()):
        return ShapeTimes(model.name, machine, tensor_parallel)
    return Roofline(model, machine, tensor_parallel)
