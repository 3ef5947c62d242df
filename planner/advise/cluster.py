"""A watched cluster as a profile of its nodes, a setup, and what its pools did. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from baton.errors import BadConfig, Unavailable
from baton.types import Role
from engine.scheduler_config import SchedulerConfig
from engine.step_times import not_negative
from planner.advise.commands import Member
from planner.advise.load import Load
from planner.advise.predict import Predicted, predicted
from planner.advise.samples import Window
from planner.advise.setup import Setup
from planner.fitted import NO_SHARING, RequestTimes
from planner.machines import Machine
from planner.measured import Measured, Power
from planner.observed import Observed, layerwise_from_bytes, transfers_of
from planner.profiles import simulated_as
from planner.steps import found_in
from router.cluster.config import MODES

# Nodes that were busy for shares that differ by less do not tell what idle ones draw.
_LEAST_SPREAD = 0.1
_PHASES = ("prefill", "decode", "mixed")
# KV is never sent layer by layer.
_NEVER = 1 << 30


@dataclass(frozen=True, slots=True)
class Watched:
    """``metrics`` by node id; of nodes that have a port for them."""

    seconds: float
    routers: tuple[Window, ...]
    members: tuple[Member, ...]
    metrics: Mapping[str, Window]
    observed: Observed

    @property
    def hosts(self) -> set[str]:
        return {member.description.host_id for member in self.members}

    def stage_s(self, stage: str) -> float:
        """Mean of a stage of the time to the first token."""
        count, seconds = (
            sum(window.grown(f"baton_ttft_stage_seconds_{part}", stage=stage) for window in self.routers)
            for part in ("count", "sum")
        )
        return seconds / count if count else 0.0

    def busy_s(self, node_id: str) -> float:
        """In steps."""
        window = self.metrics.get(node_id)
        return window.grown("baton_step_seconds_sum") if window else 0.0


@dataclass(frozen=True, slots=True)
class PoolUse:
    """What the nodes of one pool did. ``steps``: of each phase, how many, mean seconds, mean sequences."""

    role: Role
    num_nodes: int
    busy_share: float
    kv_share: float
    steps: Mapping[str, tuple[float, float, float]]


def pool_uses(watched: Watched) -> Iterator[PoolUse]:
    for role in Role:
        here = [member for member in watched.members if member.home is role]
        if not here:
            continue
        windows = [watched.metrics[m.node_id] for m in here if m.node_id in watched.metrics]
        num_blocks = sum(member.status.total_blocks for member in here)
        num_free = sum(member.status.free_blocks for member in here)
        yield PoolUse(
            role, len(here), sum(watched.busy_s(m.node_id) for m in here) / len(here) / watched.seconds,
            1 - num_free / num_blocks if num_blocks else 0.0,
            {phase: found for phase in _PHASES if (found := _steps(windows, phase))},
        )  # fmt: skip


def _steps(windows: Sequence[Window], phase: str) -> tuple[float, float, float] | None:
    def grown(name: str) -> float:
        return sum(window.grown(name, phase=phase) for window in windows)

    count = grown("baton_step_seconds_count")
    return (
        (count, grown("baton_step_seconds_sum") / count, grown("baton_step_sequences_sum") / count) if count else None
    )


def setup_of(watched: Watched) -> tuple[Setup, tuple[str, ...]]:
    """And what could not be seen of it, or differs between nodes."""
    defaults, warnings = SchedulerConfig(), []
    counts = Counter(member.home for member in watched.members)
    modes = {mode for window in watched.routers for mode in MODES if window.gauge("baton_disaggregation", mode=mode)}

    def cap(name: str, default: float) -> float:
        seen = {value for window in watched.metrics.values() if (value := window.gauge(name)) is not None}
        if len(seen) != 1:
            warnings.append(
                f"{name} is {' and '.join(f'{value:g}' for value in sorted(seen)) or 'not exported'} on the nodes: "
                f"simulated with {max(seen, default=default):g} on all"
            )
        return max(seen, default=default)

    if len(modes) != 1:
        warnings.append(f"splitting is {' and '.join(sorted(modes)) or 'not exported'}: simulated as auto")
    setup = Setup(
        counts[Role.PREFILL],
        counts[Role.DECODE],
        counts[Role.MIXED],
        disaggregation=modes.pop() if len(modes) == 1 else "auto",
        tbt_target_s=cap("baton_tbt_target_seconds", 0.0) or None,
        max_batch_tokens=int(cap("baton_max_batch_tokens", defaults.max_batch_tokens)),
        max_num_seqs=int(cap("baton_max_num_seqs", defaults.max_num_seqs)),
    )
    return setup, tuple(warnings)


def measured_of(watched: Watched) -> Measured:
    """Of one node. Raises Unavailable if too little was recorded."""
    observed, node = watched.observed, watched.members[0].description
    try:
        found = found_in(observed.steps)
    except BadConfig as error:
        raise Unavailable(
            f"the nodes recorded {len(observed.steps)} steps, of too few shapes to say what a step costs; ask again "
            "under more load, or for more --seconds"
        ) from error
    return Measured(
        model=node.model.name,
        device=node.device,
        software_version=node.software_version,
        kv_layout=node.kv_layout,
        line=found.line,
        points=found.points,
        pace=found.pace,
        # Of one host: simulated machines are all on it, or none is.
        sharing=found.sharing if len(watched.hosts) == 1 else NO_SHARING,
        transfers=transfers_of(observed.transfers, node.kv_layout.num_layers),
        # The prompt goes to the node, and its first token back.
        requests=RequestTimes(watched.stage_s("tokenize"), max(0.0, watched.stage_s("network") / 2)),
        power=power_of(watched),
    )


def power_of(watched: Watched) -> Power | None:
    """Of a node: a line through what meters counted, over the time that their nodes were busy. A GPU has a meter of its
    own; those of processors count all nodes of a host. None without a meter."""
    rows = _meters(watched)
    if not rows:
        return None
    mean_w = sum(joules for _, _, joules in rows) / (sum(count for count, _, _ in rows) * watched.seconds)
    shares = [busy / (count * watched.seconds) for count, busy, _ in rows]
    if max(shares) - min(shares) < _LEAST_SPREAD:
        return Power(mean_w, mean_w)
    features = [(count * watched.seconds, busy) for count, busy, _ in rows]
    products = [[sum(row[i] * row[j] for row in features) for j in range(2)] for i in range(2)]
    values = [sum(row[i] * joules for row, (_, _, joules) in zip(features, rows, strict=True)) for i in range(2)]
    idle_w, more_w = not_negative(products, values)
    return Power(idle_w, idle_w + more_w)


def _meters(watched: Watched) -> list[tuple[int, float, float]]:
    """Of each meter: nodes that it counts, how long they were busy, joules."""
    name = "baton_energy_joules_total"
    own = {
        node_id: window.grown(name, source="nvml")
        for node_id, window in watched.metrics.items()
        if window.gauge(name, source="nvml") is not None
    }
    if own:
        return [(1, watched.busy_s(node_id), joules) for node_id, joules in own.items()]
    rows = []
    for host in sorted(watched.hosts):
        here = [m.node_id for m in watched.members if m.description.host_id == host and m.node_id in watched.metrics]
        windows = [watched.metrics[node_id] for node_id in here]
        if windows and windows[0].gauge(name, source="rapl") is not None:
            joules = windows[0].grown(name, source="rapl")
            rows.append((len(here), sum(map(watched.busy_s, here)), joules))
    return rows


def simulator(
    measured: Measured, watched: Watched, load: Load, num_requests: int, seed: int, price: Machine | None
) -> Callable[[Setup], Predicted]:
    """Runs the load on other setups of such nodes. ``price``: what a node costs, and draws if no meter says it."""
    work = load.workload(num_requests, seed)
    machine = measured.as_machine()
    if price is not None:
        machine = replace(machine, dollars_per_hour=price.machine_dollars_per_hour, power_units=price.power_units)
        if measured.power is None:
            machine = replace(
                machine, power_w=price.num_gpus * price.power_w, idle_power_w=price.num_gpus * price.idle_power_w
            )
    max_output_tokens = max(request.num_output_tokens for request in work.requests)
    least_bytes = layerwise_from_bytes(watched.observed.transfers)
    layerwise_from = _NEVER if least_bytes is None else int(least_bytes / measured.as_model().kv_bytes_per_token)

    def simulate(setup: Setup) -> Predicted:
        config = replace(setup.config(max_output_tokens), layerwise_from_tokens=layerwise_from)
        return predicted(simulated_as(measured, work, setup.design(machine), config).run)

    return simulate
