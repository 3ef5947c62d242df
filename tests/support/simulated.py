"""A small simulated cluster, and traffic for it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from baton.types import Role, StepTimes
from planner import workload
from planner.design import Design, Group
from planner.machines import Machine
from planner.models import Model
from planner.results import Run
from planner.sim.config import SimulationConfig
from planner.sim.run import simulate
from planner.times import LinearTimes
from planner.workload import Request, Workload
from router.cluster.config import PolicyConfig

LINE = StepTimes(0.01, 1e-4, 1e-3, 1e-6)
MODEL = Model(
    name="small", num_layers=10, hidden_size=256, num_heads=4, num_kv_heads=4, head_dim=64, num_parameters=1e6,
    num_active_parameters=1e6,
)  # fmt: skip
MACHINE = Machine(
    name="m", num_gpus=1, memory_bytes=2e9, peak_flops=1e12, memory_bytes_s=1e12, power_w=300, idle_power_w=50,
    dollars_per_hour=1, link_bytes_s=1e9, link_latency_s=1e-4, power_units=1,
)  # fmt: skip
ALWAYS = PolicyConfig(disaggregation="always", repurpose_after_s=None)
CONFIG = SimulationConfig(policy=ALWAYS)


def design(num_prompt: int = 1, num_token: int = 1, num_mixed: int = 0, machine: Machine = MACHINE) -> Design:
    counts = {Role.PREFILL: num_prompt, Role.DECODE: num_token, Role.MIXED: num_mixed}
    return Design(tuple(Group(role, machine, count) for role, count in counts.items() if count))


def run(requests: list[Request], where: Design, config: SimulationConfig = CONFIG) -> Run:
    times = {group.machine.name: LinearTimes(LINE) for group in where}
    return simulate(Workload("test", tuple(requests)), where, MODEL, times, config)


def traffic(rate: float, seconds: float, prompt: int = 600, output: int = 40, seed: int = 1) -> list[Request]:
    def lengths(mean: int) -> Callable[[Random], int]:
        return lambda rng: max(1, round(mean * rng.uniform(0.3, 1.7)))

    drawn = workload.drawn("test", lengths(prompt), lengths(output), rate=rate, seconds=seconds, seed=seed)
    return list(drawn.requests)
