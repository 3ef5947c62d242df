"""The cluster's policy in simulated time: what it makes of one node that is three times slower, with and without the
measured step times; and one prefill and one decode node, split or whole. On the planner's honest simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from baton.types import Role, StepTimes
from engine.scheduler_config import SchedulerConfig
from planner.design import Design, Group
from planner.machines import Machine
from planner.models import Model
from planner.results import Run
from planner.sim.config import SimulationConfig
from planner.sim.run import simulate
from planner.times import LinearTimes
from planner.workload import Request, Workload, drawn
from router.cluster.config import PolicyConfig

# About those of the bench model on one core.
TIMES = StepTimes(0.012, 1.7e-3, 1e-3, 1e-6)
_BLOCK_TOKENS, _NUM_BLOCKS = 16, 4096
# Prompt tokens of a step without a target.
_CHUNK_TOKENS = 512
SLOWNESS = 3.0
_MODEL = Model(
    name="bench", num_layers=16, hidden_size=256, num_heads=4, num_kv_heads=4, head_dim=64, num_parameters=1.0,
    num_active_parameters=1.0,
)  # fmt: skip
_MEMORY_SHARE = 0.9
_NODE = Machine(
    name="node", num_gpus=1,
    memory_bytes=(_NUM_BLOCKS + 0.5) * _BLOCK_TOKENS * _MODEL.kv_bytes_per_token / _MEMORY_SHARE,
    peak_flops=1e12, memory_bytes_s=1e11, power_w=100, idle_power_w=10, dollars_per_hour=1, link_bytes_s=1e9,
    link_latency_s=1e-4, power_units=1,
)  # fmt: skip
_SLOW_NODE = replace(_NODE, name="slow node")


@dataclass(frozen=True, slots=True)
class Traffic:
    """Poisson arrivals at a rate, for a while; lengths vary by half around these."""

    rate: float
    prompt_tokens: int
    output_tokens: int
    start_s: float
    end_s: float

    def requests(self, seed: int) -> list[Request]:
        def around(mean: int, rng: Random) -> int:
            return max(2, round(mean * rng.uniform(0.5, 1.5)))

        found = drawn(
            "", lambda rng: around(self.prompt_tokens, rng), lambda rng: around(self.output_tokens, rng),
            rate=self.rate, seconds=self.end_s - self.start_s, seed=seed,
        )  # fmt: skip
        return [replace(each, arrival_s=each.arrival_s + self.start_s) for each in found.requests]


def simulated(
    pools: Mapping[Role, int],
    traffic: Sequence[Traffic],
    *,
    slow: Role | None = None,
    knows_speed: bool = True,
    target_s: float | None = None,
    policy: PolicyConfig | None = None,
    seed: int = 5,
) -> Run:
    """``slow``: the first node of this pool is. ``knows_speed``: nodes tell their own step times, else all of them the
    average one's."""
    groups = []
    for role, count in pools.items():
        groups += [Group(role, _SLOW_NODE, 1)] if role is slow else []
        groups += [Group(role, _NODE, count - (role is slow))]
    count = sum(pools.values())
    told = None if knows_speed else _times((count - 1 + SLOWNESS) / count)
    config = SimulationConfig(
        policy=policy or PolicyConfig(), memory_share=_MEMORY_SHARE, timeout_s=3600.0, told_times=told,
        scheduler=SchedulerConfig(block_tokens=_BLOCK_TOKENS, max_batch_tokens=_CHUNK_TOKENS, tbt_target_s=target_s),
    )  # fmt: skip
    requests = sorted(
        (each for number, part in enumerate(traffic) for each in part.requests(seed + number)),
        key=lambda each: each.arrival_s,
    )
    numbered = tuple(replace(each, number=number) for number, each in enumerate(requests))
    times = {_NODE.name: LinearTimes(_times(1.0)), _SLOW_NODE.name: LinearTimes(_times(SLOWNESS))}
    run = simulate(Workload("bench", numbered), Design(tuple(groups)), _MODEL, times, config)
    assert all(each.is_whole for each in run.served), "a request waits for ever"
    return run


def _times(factor: float) -> StepTimes:
    return StepTimes(*(factor * x for x in (TIMES.base_s, TIMES.prompt_token_s, TIMES.sequence_s, TIMES.kv_token_s)))


def run(quick: bool) -> dict[str, Any]:
    seconds = 300.0 if quick else 2000.0
    return {
        "slow node": [
            heterogeneous(slow, knows_speed, seconds)
            for slow in (Role.PREFILL, Role.DECODE, Role.MIXED)
            for knows_speed in (False, True)
        ],
        "disaggregation": [
            disaggregation(mode, rate, target_s, seconds)
            for target_s in (None, 0.1)
            for rate in (0.25, 0.4, 0.5)
            for mode in ("always", "auto", "never")
        ],
    }


def heterogeneous(slow: Role, knows_speed: bool, seconds: float) -> dict[str, Any]:
    """Three nodes of each pool, or four mixed ones, of which one is three times slower, at about 70 % of what they can
    do. By its speed it would have a seventh of its pool's work, or a tenth."""
    pools = {Role.MIXED: 4} if slow is Role.MIXED else {Role.PREFILL: 3, Role.DECODE: 3}
    prompt, output, rate = (200, 150, 4.0) if slow is Role.DECODE else (1000, 60, 0.95)
    found = simulated(
        pools, [Traffic(rate, prompt, output, 0.0, seconds)], slow=slow, knows_speed=knows_speed,
        policy=PolicyConfig(disaggregation="always", repurpose_after_s=None),
    )  # fmt: skip
    peers = [use for use in found.machines if use.role is slow]
    work = [use.num_output_tokens if slow is Role.DECODE else use.num_prompt_tokens for use in peers]
    return {
        "slow": peers[0].name,
        "speed": "measured" if knows_speed else "unknown",
        "its share of work": work[0] / sum(work),
        "share by its speed": 1 / (1 + SLOWNESS * (len(peers) - 1)),
    } | _latencies(found)


def disaggregation(mode: str, rate: float, target_s: float | None, seconds: float) -> dict[str, Any]:
    """One prefill and one decode node."""
    found = simulated(
        {Role.PREFILL: 1, Role.DECODE: 1}, [Traffic(rate, 1024, 64, 0.0, seconds)], target_s=target_s,
        policy=PolicyConfig(disaggregation=mode),
    )  # fmt: skip
    placed = {name: count for name, count in found.counters.items() if name.startswith("placed_")}
    return {
        "requests/s": rate,
        "target ms": None if target_s is None else target_s * 1e3,
        "disaggregation": mode,
        "whole": 1 - placed.get("placed_pools", 0) / sum(placed.values()),
    } | _latencies(found)


def _latencies(found: Run) -> dict[str, Any]:
    ttft = sorted((x.first_token_s or 0.0) - x.request.arrival_s for x in found.served)
    e2e = sorted((x.ended_s or 0.0) - x.request.arrival_s for x in found.served)
    return {
        "ttft p50 s": _at_share(ttft, 0.5),
        "ttft p99 s": _at_share(ttft, 0.99),
        "gap p50 ms": _gap_at(found, 0.5) * 1e3,
        "gap p99 ms": _gap_at(found, 0.99) * 1e3,
        "e2e p50 s": _at_share(e2e, 0.5),
        "e2e p99 s": _at_share(e2e, 0.99),
    }


def _at_share(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _gap_at(found: Run, share: float) -> float:
    left = share * sum(count for _, count in found.gaps_s)
    for seconds, count in found.gaps_s:
        left -= count
        if left < 0:
            return seconds
    return 0.0
