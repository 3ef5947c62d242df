"""One run under the honest profile: Baton's own scheduling code on simulated machines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose

from baton import PROTOCOL_VERSION
from baton.errors import BadConfig, quoted
from baton.types import MAX_COUNT, KvLayout, ModelDescription, NodeDescription, PrefixCaching, Role
from engine.step import StepShape
from planner.design import Design
from planner.machines import Machine
from planner.models import Model
from planner.results import Profile, Run, Served, Told, tell_nobody
from planner.sim.config import SimulationConfig
from planner.sim.engine import Power
from planner.sim.events import Events
from planner.sim.gaps import Gaps
from planner.sim.host import Host, Loop
from planner.sim.node import Network, Node
from planner.sim.router import SimulatedRouter
from planner.times import Times
from planner.workload import Workload

_NO_CONFIG = SimulationConfig()


@dataclass(frozen=True, slots=True)
class FullPower:
    """What the data sheet says: all of it while it computes. For runs without an energy model."""

    machine: Machine

    @property
    def idle_w(self) -> float:
        return self.machine.num_gpus * self.machine.idle_power_w

    def step_w(self, shape: StepShape) -> float:
        return self.machine.num_gpus * self.machine.power_w


def simulate(
    workload: Workload,
    design: Design,
    model: Model,
    times: Mapping[str, Times],
    config: SimulationConfig = _NO_CONFIG,
    power: Mapping[str, Power] | None = None,
    told: Told = tell_nobody,
) -> Run:
    """``times`` and ``power`` by the name of the machine. Equal arguments give equal runs. Raises BadConfig if the
    model does not fit into a machine, or an outage names none."""
    return _Simulation(workload, design, model, times, config, power or {}, told).run()


class _Simulation:
    def __init__(
        self,
        workload: Workload,
        design: Design,
        model: Model,
        times: Mapping[str, Times],
        config: SimulationConfig,
        power: Mapping[str, Power],
        told: Told = tell_nobody,
    ) -> None:
        self._workload = workload
        self._design = design
        self._config = config
        self._times = {group.machine.name: times[group.machine.name] for group in design}
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._events = Events()
        names = dict.fromkeys(request.prefix for request in workload.requests if request.prefix)
        prefixes = {name: number for number, name in enumerate(names)}
        overhead = config.overhead
        host = Host(config.sharing, overhead) if config.sharing or overhead.num_cores else None
        loop = Loop(self._events, overhead.slowest, host) if overhead.slowest else None
        self._router = SimulatedRouter(config, self._events, prefixes, self._counters, told, loop)
        self._nodes: dict[str, Node] = {}
        network = Network(
            self._router.heard, self._router.request_of, lambda node_id: self._nodes[node_id], host, loop
        )  # fmt: skip
        for group in design:
            for _ in range(group.count):
                number = sum(1 for node in self._nodes.values() if node.description.home_role is group.role)
                description = _description(
                    f"{group.role.value}-{number}", group.role, group.machine, model, config, has_cache=bool(prefixes)
                )
                self._nodes[description.node_id] = Node(
                    description, group.machine, self._times[group.machine.name],
                    power.get(group.machine.name) or FullPower(group.machine), config,
                    config.scheduler.of_model(
                        block_tokens=config.scheduler.block_tokens, max_model_tokens=MAX_COUNT, vocab_size=None,
                    ),
                    self._events, network, self._counters,
                )  # fmt: skip
        for outage in config.outages:
            if outage.machine not in self._nodes:
                raise BadConfig(
                    f"an outage names the machine {quoted(outage.machine)}, expected one of "
                    f"{', '.join(list(self._nodes)[:9])} ...",
                    param="outages",
                )

    def run(self) -> Run:
        served = tuple(Served(request) for request in self._workload.requests)
        self._router.start(self._nodes)
        for outage in self._config.outages:
            self._events.regularly(outage.at_s, self._router.strike, outage)
        if served:
            self._events.at(served[0].request.arrival_s + self._config.request_s, self._arrive, served, 0)
        self._events.run(lambda: self._router.scheduler.num_in_flight > 0)
        now = self._events.now_s
        for node in self._nodes.values():
            node.finish(now)
        self._check(served)
        return Run(
            Profile.HONEST, self._workload, self._design, served, tuple(node.use for node in self._nodes.values()),
            self._router.ended_s, dict(sorted(self._counters.items())),
            tuple(dict.fromkeys(text for times in self._times.values() for text in times.warnings)),
            tuple(sorted((x for node in self._nodes.values() for x in node.role_changes), key=lambda x: x.at_s)),
            Gaps.total(node.gaps for node in self._nodes.values()),
            tuple(report for node in self._nodes.values() for report in node.transfers),
        )  # fmt: skip

    def _arrive(self, served: tuple[Served, ...], index: int) -> None:
        if index + 1 < len(served):
            at_s = served[index + 1].request.arrival_s + self._config.request_s
            self._events.at(at_s, self._arrive, served, index + 1)
        self._router.arrive(served[index].request, served[index])

    def _check(self, served: tuple[Served, ...]) -> None:
        """Conservation: every request has one end, whole ones all of their tokens; nodes have nothing left; the energy
        of all requests is that of all steps."""
        self._router.scheduler.check()
        assert not self._router.scheduler.num_in_flight, "a request never ended"
        for node in self._nodes.values():
            node.check()
        for each in served:
            assert each.ending is not None, f"request {each.request.number} has no end"
            is_all = each.num_tokens == each.request.num_output_tokens
            assert is_all or not each.is_whole, f"request {each.request.number} has {each.num_tokens} tokens"
        steps_j = sum(use.prompt_energy_j + use.decode_energy_j for use in (node.use for node in self._nodes.values()))
        requests_j = sum(each.energy_j for each in served)
        assert isclose(steps_j, requests_j, rel_tol=1e-6, abs_tol=1e-6), f"{steps_j} J of steps, {requests_j} J of all"


def _description(
    node_id: str, role: Role, machine: Machine, model: Model, config: SimulationConfig, *, has_cache: bool
) -> NodeDescription:
    block_tokens = config.scheduler.block_tokens
    layout = KvLayout(
        model.num_layers, config.num_blocks(machine, model), model.num_kv_heads, model.head_dim, block_tokens,
        "bfloat16" if model.bytes_per_kv_value <= 2 else "float32",
    )  # fmt: skip
    described = ModelDescription(model.name, model.name, "bfloat16", MAX_COUNT, MAX_COUNT)
    return NodeDescription(
        node_id, 1, role, f"{node_id}:1", described, layout, PROTOCOL_VERSION, 1, node_id, ("simulated",),
        machine.name, "simulated", "0", prefix_cache=PrefixCaching(phases_agree=True) if has_cache else None,
        tbt_target_s=config.scheduler.tbt_target_s,
    )  # fmt: skip
