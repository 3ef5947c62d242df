"""What a node tells routers of its prefix cache, and what a router knows by it: all at the beginning, then every change
before the tokens of the step that made it, and nothing that the node no longer has after one status interval.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from baton.clock import MonotonicClock
from baton.defects import Defects
from baton.node_messages import CacheChanged, PrefillDone
from baton.prefix import PrefixScheme, key_of
from baton.types import SequenceSpec
from router.cluster.prefix_index import PrefixIndex
from router.nodes.session_bytes import Reader
from tests.support.node import WAIT_S, Node, Router, running_node, session, spec
from worker.session import SessionConfig


def keys_of(node: Node, prompt: Sequence[int]) -> list[int]:
    """Of the full blocks."""
    scheme = PrefixScheme.of(node.description)
    assert scheme is not None
    return [key_of(value) for value in scheme.block_hashes(prompt, len(prompt))]


class Index:
    """A router's, behind one session."""

    def __init__(self, node: Node, router: Router, keys: Sequence[int] = ()) -> None:
        self._keys = keys
        # Leading blocks of ``keys`` that were known at the end of each prompt.
        self.leading_at_first_token: list[int] = []
        self.index = PrefixIndex(max_blocks=1000)
        self.num_changes = self.num_snapshots = 0
        self._reader = Reader("n0", node.address, Defects(logging.getLogger("test"), MonotonicClock()))
        self._router = router
        self._num_read = 0

    def take(self) -> None:
        """All that came."""
        for response in self._router.messages[self._num_read :]:
            self._num_read += 1
            for message in self._reader.messages(response):
                if isinstance(message, CacheChanged):
                    self.index.change("n0", message)
                    self.num_changes += 1
                    self.num_snapshots += message.is_snapshot
                elif isinstance(message, PrefillDone):
                    self.leading_at_first_token.append(self.num_leading(self._keys))

    def num_leading(self, keys: Sequence[int]) -> int:
        hits = self.index.hits(keys)
        return hits[0].num_blocks if hits else 0


def known(node: Node) -> set[int]:
    with node.replica._changed:
        pool = node.replica._scheduler.pool
        return {key_of(value) for value in pool.known._hashes.values()}


async def knows_all(node: Node, indexes: Iterable[Index]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            there = known(node)
            for index in indexes:
                index.take()
            if all({key for key in there if index.index.holders_of(key)} == there for index in indexes) and all(
                index.index.num_blocks == len(there) for index in indexes
            ):
                return
            await asyncio.sleep(0.01)


async def test_a_prompts_blocks_are_told_before_its_first_token() -> None:
    async with running_node(has_prefix_cache=True) as node, session(node.address) as router:
        await router.hello()
        sequence = spec("a", 13)
        index = Index(node, router, keys_of(node, sequence.prompt_token_ids))
        await router.run(sequence)
        answer = await router.tokens()
        await knows_all(node, [index])
        assert index.leading_at_first_token == [3]
        following = (*sequence.prompt_token_ids, *answer, 7, 7)
        assert index.num_leading(keys_of(node, following)) == 4, "19 tokens, the last of which no step has read"


async def test_a_router_that_comes_later_is_told_all_in_as_many_messages_as_it_takes() -> None:
    config = SessionConfig(max_cache_keys=2)
    async with running_node(has_prefix_cache=True, session_config=config) as node:
        async with session(node.address) as first:
            await first.hello()
            await first.run(spec("a", 33))
            await first.tokens()
        assert len(known(node)) == 9
        async with session(node.address) as second:
            await second.hello("r1")
            index = Index(node, second)
            await knows_all(node, [index])
            assert index.num_snapshots == 1
            assert index.num_changes >= 5
            assert index.num_leading(keys_of(node, spec("a", 33).prompt_token_ids)) == 8
        await node.until(lambda: not node.replica._scheduler.pool.known._feeds)


async def test_what_is_evicted_is_unknown_within_a_status_interval() -> None:
    async with (
        running_node(has_prefix_cache=True, num_blocks=12) as node,
        session(node.address) as one,
        session(node.address) as other,
    ):
        await one.hello("r0")
        await other.hello("r1")
        indexes = [Index(node, one), Index(node, other)]
        for number in range(4):
            tokens = tuple(range(100 * number, 100 * number + 17))
            await one.run(SequenceSpec(f"s{number}", tokens, spec("x").sampling))
            await one.tokens()
            await knows_all(node, indexes)
        assert indexes[0].num_leading(keys_of(node, spec("never", 17).prompt_token_ids)) == 0
        assert node.replica.drop_cache() > 0
        await knows_all(node, indexes)
        assert indexes[1].index.num_blocks == 0


async def test_a_node_without_a_cache_tells_nothing() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        await router.run(spec("a", 13))
        await router.tokens()
        assert not any(response.HasField("cache") for response in router.messages)
