"""Cost of one placement: the scheduler's decision and its books, by the number of nodes. Pure code, no process.

Each sample places a sequence of 100 tokens on nodes that are half prefill and half decode and already have work, then
ends its prompt. ``decide`` is the choice alone. ``blocked`` adds open breakers between the best prefill node and a
tenth of the decode nodes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from baton.types import KvLayout, ModelDescription, NodeDescription, NodeStatus, Role
from router.cluster.config import PolicyConfig
from router.cluster.load import Placement
from router.cluster.policy import Decision, Demand
from router.cluster.scheduler import Scheduler
from router.config import LimitsConfig

_NUM_NODES = (10, 100, 1000)
_NUM_BLOCKS = 1 << 20
_NUM_TOKENS = 100


@dataclass(eq=False, slots=True)
class _Item:
    number: int
    client: str = ""
    has_tokens: bool = False

    def can_move_from(self, node_id: str) -> bool:
        return False

    @property
    def sequence_id(self) -> str:
        return f"{self.number}/0/0"

    def demand(self, now: float) -> Demand:
        return Demand(_NUM_TOKENS)


def rows(quick: bool) -> list[dict[str, Any]]:
    return [_measured(num_nodes, 200 if quick else 2000) for num_nodes in _NUM_NODES]


def _measured(num_nodes: int, num_samples: int) -> dict[str, Any]:
    scheduler = _scheduler(num_nodes)
    whole, decide = _samples(scheduler, num_samples)
    # The policy takes nodes with equal queues by name: this one is next.
    best = scheduler.decide(_Item(-1), 0.0)
    assert isinstance(best, Decision)
    for number in range(1, num_nodes // 2, 10):
        for _ in range(PolicyConfig().breaker_failures):
            scheduler.pair_failed(Placement(best.placement.prefill_id, f"decode-{number}"), 0.0)
    _, blocked = _samples(scheduler, num_samples)
    return {
        "nodes": num_nodes,
        "placement_us": _us(whole),
        "decide_us": _us(decide),
        "decide_blocked_us": _us(blocked),
    }


def _scheduler(num_nodes: int) -> Scheduler[_Item]:
    scheduler: Scheduler[_Item] = Scheduler(LimitsConfig(), PolicyConfig(), 0.0)
    for number in range(num_nodes // 2):
        for role in (Role.PREFILL, Role.DECODE):
            status = NodeStatus(
                role, total_blocks=_NUM_BLOCKS, free_blocks=_NUM_BLOCKS, queued_prompt_tokens=number * 7 % 50,
                running_tokens=number * 11 % 50,
            )  # fmt: skip
            scheduler.node_up(_node(f"{role.value}-{number}", role), status, True, 0.0)
    return scheduler


def _node(node_id: str, role: Role) -> NodeDescription:
    model = ModelDescription("bench", "bench", "float32", 1 << 20, 512)
    layout = KvLayout(1, _NUM_BLOCKS, 1, 8, 16, "float32")
    return NodeDescription(node_id, 1, role, "a:1", model, layout, 1, 1, "h", (), "none", "none", "0")


def _samples(scheduler: Scheduler[_Item], num_samples: int) -> tuple[list[float], list[float]]:
    """Seconds of whole placements, and of their decisions."""
    whole, decisions = [], []
    for _ in range(num_samples):
        scheduler.arrive(_Item(scheduler.num_in_flight), 0.5)
        start_s = time.perf_counter()
        item = scheduler.next(0.5)
        assert item is not None
        decide_s = time.perf_counter()
        decision = scheduler.decide(item, 0.5)
        decided_s = time.perf_counter()
        assert isinstance(decision, Decision)
        scheduler.assign(item, decision, _NUM_TOKENS, 0.5)
        whole.append(time.perf_counter() - start_s)
        decisions.append(decided_s - decide_s)
        scheduler.prefilled(item.sequence_id)
    return whole, decisions


def _us(samples_s: list[float]) -> float:
    return round(statistics.median(samples_s) * 1e6, 1)
