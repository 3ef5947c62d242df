"""A router in the test's process beside a cluster of real workers, whose running sequences a test can move."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import baton
from baton.client import Completion
from baton.observe import Moved
from router.cluster.config import PolicyConfig
from router.cluster.membership import State
from router.cluster.rebalance import MoveReason, Planned
from router.config import RouterConfig
from router.dispatch.active import Active
from router.dispatch.records import Ended
from router.serve import Router, running
from tests.support.cluster import Cluster
from tests.support.router import until

# What the router itself would do is not wanted.
BY_HAND = PolicyConfig(balance_after_s=60.0, room_ahead_s=1e-9)
# Greedy ones, sampled ones, with penalties and with log-probabilities.
KINDS: Sequence[dict[str, Any]] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 1.0, "logprobs": 3},
)


class MovingRouter:
    def __init__(self, router: Router, decode_ids: Sequence[str], seed: int) -> None:
        assert router.grpc is not None
        self.address = router.grpc
        self.decode_ids = decode_ids
        self.num_begun = 0
        self.ended: list[Ended] = []
        self._dispatcher = router.dispatcher
        self._dispatcher.records.watch(self.ended.append)
        self._chance = random.Random(seed)

    @property
    def movable(self) -> list[Active]:
        return [active for active in self._dispatcher.scheduler.in_flight if active.flow.can_move]

    def movable_from(self, node_id: str) -> list[Active]:
        return [active for active in self.movable if self.source_of(active) == node_id]

    def num_on(self, node_id: str) -> int:
        """Sequences that have something on the node."""
        return sum(node_id in active.flow.holders for active in self._dispatcher.scheduler.in_flight)

    @property
    def outcomes(self) -> dict[tuple[str, ...], float]:
        """Moves by reason and outcome."""
        return {key: x.value for key, x in self._dispatcher._metrics.migrations.children.items() if x.value}

    @property
    def moves(self) -> list[Moved]:
        return [move for ended in self.ended for move in ended.relay.moves]

    def move_one(self, target_id: str = "") -> str:
        """Any sequence that can move, to this node or to any other; returns where to, or nothing."""
        nodes = self._dispatcher.scheduler
        movable = [active for active in self.movable if self.source_of(active) != target_id]
        if not movable:
            return ""
        active = self._chance.choice(movable)
        source_id = self.source_of(active)
        target_id = target_id or self._chance.choice([name for name in self.decode_ids if name != source_id])
        if nodes.node(target_id) is None:
            return ""
        self._dispatcher._begin_move(Planned(active, source_id, target_id, MoveReason.BALANCE, 1000))
        self.num_begun += 1
        return target_id

    @staticmethod
    def source_of(active: Active) -> str:
        assert active.flow.placement is not None
        return active.flow.placement.decode_id

    def run(
        self, client: baton.AsyncClient, count: int, max_tokens: int, num_prompt: int
    ) -> list[asyncio.Task[Completion]]:
        """Answers of full length, of every kind of sampling in turn."""

        async def one(i: int) -> Completion:
            prompt = [2 + (i * 31 + j * 7) % 40 for j in range(num_prompt)]
            return await client.complete(prompt, max_tokens=max_tokens, ignore_eos=True, seed=i, **KINDS[i % 4])

        return [asyncio.create_task(one(i)) for i in range(count)]


@asynccontextmanager
async def moving_router(
    cluster: Cluster, *, seed: int = 1, policy: PolicyConfig = BY_HAND, **settings: Any
) -> AsyncIterator[MovingRouter]:
    """Its books balance at the end."""
    nodes = cluster.nodes
    addresses = tuple(node.address for node in nodes.values())
    config = RouterConfig(nodes=addresses, policy=policy, access=cluster.access, **settings)
    async with running(config) as router:
        await until(lambda: all(m.state is State.READY for m in router.dispatcher.nodes.members), 20.0)
        yield MovingRouter(router, [node.id for node in nodes.values() if node.role == "decode"], seed)
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0, 20.0)
        router.dispatcher.scheduler.check()


def same(done: Sequence[Completion], undisturbed: Sequence[Completion]) -> None:
    """Token ids, and log-probabilities bit for bit."""
    assert [x.token_ids for x in done] == [x.token_ids for x in undisturbed]
    assert [x.logprobs for x in done] == [x.logprobs for x in undisturbed]
