"""Settings of a simulated cluster: those of its processes, and what its machines and their links add."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.errors import BadConfig
from baton.types import StepTimes, blocks_for
from engine.scheduler_config import SchedulerConfig
from engine.step import StepShape
from planner.fitted import NO_SHARING, NO_WAKE, Sharing, Wake
from planner.machines import Machine
from planner.models import Model
from planner.overhead import NO_OVERHEAD, Overhead
from router.cluster.config import PolicyConfig
from router.cluster.membership import MembershipConfig
from router.config import LimitsConfig
from router.flow.config import FlowConfig
from worker.roles import RolesConfig


@dataclass(frozen=True, slots=True)
class Outage:
    """A machine dies at a time and, with ``back_s``, is started anew then. Machines are named as in a run's report."""

    machine: str
    at_s: float
    back_s: float | None = None


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    # An operator who sizes a cluster wants to see the wait of what a router would refuse.
    limits: LimitsConfig = field(default_factory=lambda: LimitsConfig(max_queued=1 << 20, max_active=1 << 20))
    flow: FlowConfig = field(default_factory=FlowConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    # Its block size is used; model limits follow from the model and the machines.
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    # What clients ask for at most: schedulers do not know how long an answer will be.
    max_output_tokens: int = 4096
    timeout_s: float = 600.0
    # Between router and node, one way: serialization, network and a turn of both event loops.
    message_s: float = 0.5e-3
    # Of each request, from its client to the router's queue and back: connection, parsing, tokenizer, first chunk.
    request_s: float = 0.0
    # Nodes report so often, and the router looks at moves and roles.
    status_s: float = 0.25
    tick_s: float = 0.1
    # Of a machine's memory, for weights and KV; the rest is for activations and fragmentation.
    memory_share: float = 0.9
    # From so many tokens on KV moves while the prompt is computed, layer by layer (Splitwise: 512 on H100).
    layerwise_from_tokens: int = 512
    # Of a transfer, when its bytes are there: verified, acknowledged, and the sequence in the batch (two messages).
    commit_s: float = 1e-3
    # Steps that only decode advance together, at most so many: all but the first and the last are interpolated.
    steps_at_once: int = 64
    # What all nodes tell of their steps instead of what they measure; None: that. For studies of what it is worth.
    told_times: StepTimes | None = None
    # What every node measured before the run, as one that has served before.
    seen_steps: tuple[tuple[StepShape, float], ...] = ()
    # Of the first step of a machine that had nothing to do.
    wake: Wake = NO_WAKE
    # All machines are processes of one host, whose steps take so much longer together; none: each has its own.
    sharing: Sharing = NO_SHARING
    # Of event loops, the router and shared processors, beside steps and single requests.
    overhead: Overhead = NO_OVERHEAD
    outages: tuple[Outage, ...] = ()

    def __post_init__(self) -> None:
        for name, is_good, expected in (
            ("max_output_tokens", self.max_output_tokens >= 1, "at least 1"),
            ("timeout_s", self.timeout_s > 0, "more than 0"),
            ("message_s", self.message_s >= 0, "at least 0"),
            ("request_s", self.request_s >= 0, "at least 0"),
            ("status_s", self.status_s > 0, "more than 0"),
            ("tick_s", self.tick_s > 0, "more than 0"),
            ("memory_share", 0 < self.memory_share <= 1, "a share in (0, 1]"),
            ("layerwise_from_tokens", self.layerwise_from_tokens >= 0, "at least 0"),
            ("commit_s", self.commit_s >= 0, "at least 0"),
            ("steps_at_once", self.steps_at_once >= 1, "at least 1"),
        ):
            if not is_good:
                raise BadConfig(f"{name} is {getattr(self, name)}, expected {expected}", param=name)

    def num_blocks(self, machine: Machine, model: Model) -> int:
        """KV blocks of a machine that has the whole model. Raises BadConfig if it has room for less than one request
        of ``max_output_tokens``."""
        memory_bytes = machine.num_gpus * machine.memory_bytes * self.memory_share
        left_bytes = memory_bytes - model.weight_bytes
        count = int(left_bytes // (model.kv_bytes_per_token * self.scheduler.block_tokens))
        if count < blocks_for(self.max_output_tokens, self.scheduler.block_tokens):
            raise BadConfig(
                f"a machine {machine.name} has {memory_bytes / 1e9:.0f} GB for {model.name}, whose weights take "
                f"{model.weight_bytes / 1e9:.0f} GB; expected room for the KV of {self.max_output_tokens} tokens "
                f"({model.kv_bytes_per_token * self.max_output_tokens / 1e9:.1f} GB); take a larger machine",
                param="model",
            )
        return count
