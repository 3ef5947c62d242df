"""The router's index of cached blocks beside the nodes' real caches, with messages on their way, sessions that break
and nodes that die: it names a node for no block that the node did not have when it last spoke.
"""

from __future__ import annotations

from collections import deque

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.node_messages import CacheChanged
from router.cluster.prefix_index import PrefixIndex

NODES = ("a", "b", "c")
# Some fall into one shard.
KEYS = [shard + 4096 * turn for shard in (0, 1, 4095) for turn in range(4)]
nodes, keys = st.sampled_from(NODES), st.lists(st.sampled_from(KEYS), max_size=6)


class Node:
    def __init__(self) -> None:
        self.has: set[int] = set()
        self.number = 0
        # By key, whether it is held; not sent yet. None: no session.
        self.untold: dict[int, bool] | None = None
        self.is_begun = False
        # Sent and not received yet.
        self.sent: deque[CacheChanged] = deque()

    def change(self, key: int) -> None:
        self.has ^= {key}
        self.number += 1
        if self.untold is not None:
            self.untold[key] = key in self.has

    def speak(self, most: int) -> None:
        assert self.untold is not None
        taken = {key: self.untold.pop(key) for key in list(self.untold)[:most]}
        stored = tuple(key for key, is_held in taken.items() if is_held)
        dropped = tuple(key for key, is_held in taken.items() if not is_held)
        message = CacheChanged(self.number, stored, dropped, is_snapshot=not self.is_begun)
        self.is_begun = True
        self.sent.append(message)


class Index(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(max_blocks=1000)
        self.nodes = {node_id: Node() for node_id in NODES}

    @rule(node_id=nodes, changed=keys)
    def cache_changes(self, node_id: str, changed: list[int]) -> None:
        for key in changed:
            self.nodes[node_id].change(key)

    @rule(node_id=nodes)
    def connect(self, node_id: str) -> None:
        node = self.nodes[node_id]
        node.sent.clear()
        node.untold, node.is_begun = dict.fromkeys(node.has, True), False

    @rule(node_id=nodes)
    def session_breaks(self, node_id: str) -> None:
        """What was on its way is lost, and the router takes the node for lost."""
        node = self.nodes[node_id]
        node.sent.clear()
        node.untold = None
        self.index.forget(node_id)
        assert self.index.num_blocks_of(node_id) == 0

    @rule(node_id=nodes)
    def node_dies(self, node_id: str) -> None:
        self.nodes[node_id] = Node()
        self.index.forget(node_id)

    @rule(node_id=nodes, most=st.integers(0, 5))
    def node_speaks(self, node_id: str, most: int) -> None:
        if self.nodes[node_id].untold is not None:
            self.nodes[node_id].speak(most)

    @precondition(lambda self: any(node.sent for node in self.nodes.values()))
    @rule(data=st.data())
    def message_comes(self, data: st.DataObject) -> None:
        node_id = data.draw(st.sampled_from([x for x, node in self.nodes.items() if node.sent]))
        message = self.nodes[node_id].sent.popleft()
        self.index.change(node_id, message)
        named = {key for key in KEYS if node_id in self.index.holders_of(key)}
        assert set(message.stored) <= named
        assert not set(message.dropped) & named
        if message.is_snapshot:
            assert named == set(message.stored)
        assert self.index.num_blocks_of(node_id) == len(named)

    @rule(node_id=nodes)
    def all_is_told(self, node_id: str) -> None:
        """Once a node has said all and all has come, the index knows its cache exactly."""
        node = self.nodes[node_id]
        if node.untold is None:
            return
        node.speak(len(KEYS))
        while node.sent:
            self.index.change(node_id, node.sent.popleft())
        assert {key for key in KEYS if node_id in self.index.holders_of(key)} == node.has

    @rule(chain=st.lists(st.sampled_from(KEYS), max_size=6, unique=True))
    def hits_are_the_leading_blocks(self, chain: list[int]) -> None:
        expected: dict[str, int] = {}
        for node_id in NODES:
            held = [node_id in self.index.holders_of(key) for key in chain]
            if num_blocks := held.index(False) if False in held else len(held):
                expected[node_id] = num_blocks
        hits = self.index.hits(chain)
        assert {node_id: hit.num_blocks for hit in hits for node_id in hit.node_ids} == expected
        assert [hit.num_blocks for hit in hits] == sorted(set(expected.values()), reverse=True)

    @rule()
    def sweep(self) -> None:
        self.index.sweep()

    @invariant()
    def counts_are_right(self) -> None:
        self.index.check()

    @invariant()
    def nothing_is_named_that_was_not_said(self) -> None:
        for node_id, node in self.nodes.items():
            if node.untold is not None and not node.sent and node.is_begun:
                named = {key for key in KEYS if node_id in self.index.holders_of(key)}
                assert named - node.has <= set(node.untold), "what is named and not there is about to be told"


Index.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestIndex = Index.TestCase


def snapshot(*stored: int) -> CacheChanged:
    return CacheChanged(len(stored), stored, is_snapshot=True)


def test_what_is_beyond_the_bound_is_not_taken_in_until_there_is_room() -> None:
    index = PrefixIndex(max_blocks=3)
    index.change("a", snapshot(1, 2))
    index.change("b", snapshot(1, 2, 3))
    assert index.num_blocks == 3
    assert index.num_ignored == 2
    assert [hit.num_blocks for hit in index.hits([1, 2, 3])] == [2, 1]
    index.forget("a")
    index.change("b", CacheChanged(4, (2,)))
    assert [(hit.num_blocks, set(hit.node_ids)) for hit in index.hits([1, 2, 3])] == [(2, {"b"})]
    index.check()


def test_a_change_without_a_beginning_says_nothing() -> None:
    index = PrefixIndex(max_blocks=10)
    index.change("a", CacheChanged(7, (1, 2)))
    assert not index.hits([1])


def test_a_change_from_before_makes_what_is_known_void() -> None:
    index = PrefixIndex(max_blocks=10)
    index.change("a", CacheChanged(7, (1, 2), is_snapshot=True))
    index.change("a", CacheChanged(5, (3,)))
    assert not index.hits([1])
    index.change("a", CacheChanged(8, (4,)))
    assert not index, "until it tells all again"


def test_keys_of_a_lost_node_are_swept_bit_by_bit() -> None:
    index = PrefixIndex(max_blocks=100_000)
    index.change("a", snapshot(*range(20_000)))
    index.forget("a")
    assert not index
    index.change("b", snapshot(*range(10)))
    for _ in range(20):
        index.sweep()
    index.check()
    assert not index.num_stale
