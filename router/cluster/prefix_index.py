"""Which nodes hold which KV blocks, by the blocks' keys (baton.prefix.key_of). Pure.

It knows what nodes have said: a node's first message is all that it has, the next ones what changed. It names a node
for no block beyond that; what it does not know costs time only, so it is bounded, and a node's loss forgets all of its
blocks at once.

A set of nodes is one integer, a bit for each. All blocks that the same nodes hold share one such set, as the blocks of
a conversation do, so a block costs the entry of a dictionary and no more.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from baton.node_messages import CacheChanged

# A dictionary that grows copies itself: many small ones never hold up the event loop, one of 10 million entries would
# for a second.
_NUM_SHARDS = 4096
# Keys and shards that one sweep looks at, and a little more.
_MAX_SWEPT = 4096


class Hit(NamedTuple):
    """These nodes hold exactly so many leading blocks."""

    num_blocks: int
    node_ids: frozenset[str]


class _Holders:
    """A set of nodes, and how many keys refer to it, by its number."""

    __slots__ = ("mask", "num_keys", "number")

    def __init__(self, number: int, mask: int) -> None:
        self.number = number
        self.mask = mask
        self.num_keys = 0


class _Node:
    __slots__ = ("bit", "num_blocks", "number", "slot")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.bit = 1 << slot
        # Of its changes that are known, and the blocks that it is named for.
        self.number = 0
        self.num_blocks = 0


class PrefixIndex:
    """Invariant: a node's bit is in the set of a key exactly while the node holds that block, as far as it has said."""

    def __init__(self, max_blocks: int) -> None:
        """``max_blocks``: a block counts once for each node that holds it. What is reported beyond is not taken in."""
        self._max_blocks = max_blocks
        # Number of the set of holders by key: the collector of garbage does not look into dictionaries of numbers.
        self._shards: list[dict[int, int]] = [{} for _ in range(_NUM_SHARDS)]
        # The sets that keys refer to. After the loss of a node some may be empty, and two may be equal; of those that
        # are not empty one is found by its mask.
        self._sets: dict[int, _Holders] = {}
        self._by_mask: dict[int, _Holders] = {}
        self._next_number = 0
        self._nodes: dict[str, _Node] = {}
        # By slot; empty if it is free.
        self._names: list[str] = []
        self._free_slots: list[int] = []
        self.num_blocks = 0
        # Keys that no node holds any more: those of lost nodes, until their shard is swept.
        self.num_stale = 0
        self._next_sweep = 0
        # Blocks that were not taken in, the index being full; since the start.
        self.num_ignored = 0

    def __bool__(self) -> bool:
        return self.num_blocks > 0

    def num_blocks_of(self, node_id: str) -> int:
        node = self._nodes.get(node_id)
        return 0 if node is None else node.num_blocks

    def change(self, node_id: str, change: CacheChanged) -> None:
        """Take in what a node says. A change that does not follow what is known of the node makes all of it void."""
        node = self._nodes.get(node_id)
        if change.is_snapshot:
            self.forget(node_id)
            node = self._add(node_id)
        elif node is None or change.number < node.number:
            self.forget(node_id)
            return
        node.number = change.number
        for key in change.dropped:
            self._drop(node, key)
        for key in change.stored:
            self._store(node, key)
        self.sweep()

    def forget(self, node_id: str) -> None:
        """It is lost, or its blocks are unknown."""
        node = self._nodes.pop(node_id, None)
        if node is None:
            return
        self.num_blocks -= node.num_blocks
        self._names[node.slot] = ""
        heapq.heappush(self._free_slots, node.slot)
        for holders in self._sets.values():
            if holders.mask & node.bit:
                self._unmask(holders)
                holders.mask ^= node.bit
                if holders.mask:
                    self._by_mask.setdefault(holders.mask, holders)
                else:
                    self.num_stale += holders.num_keys

    def sweep(self) -> None:
        """Remove some of the keys that no node holds. Called now and then, so that no call has many to remove."""
        num_seen = 0
        while self.num_stale and num_seen < _MAX_SWEPT:
            shard = self._shards[self._next_sweep]
            self._next_sweep = (self._next_sweep + 1) % _NUM_SHARDS
            num_seen += 1 + len(shard)
            for key in [key for key, number in shard.items() if not self._sets[number].mask]:
                self._leave(self._sets[shard.pop(key)])

    def hits(self, keys: Iterable[int]) -> list[Hit]:
        """The nodes that hold leading blocks of this chain, those with most first. Asks for one key more than are held,
        at most."""
        found: list[Hit] = []
        shards, sets, alive, num_blocks = self._shards, self._sets, -1, 0
        for num_before, key in enumerate(keys):
            number = shards[key % _NUM_SHARDS].get(key)
            mask = 0 if number is None else sets[number].mask
            if num_before and (ended := alive & ~mask):
                found.append(Hit(num_before, self._node_ids(ended)))
            alive &= mask
            if not alive:
                break
            num_blocks = num_before + 1
        else:
            if num_blocks:
                found.append(Hit(num_blocks, self._node_ids(alive)))
        found.reverse()
        return found

    # -- inside

    def _add(self, node_id: str) -> _Node:
        if self._free_slots:
            slot = heapq.heappop(self._free_slots)
            self._names[slot] = node_id
        else:
            slot = len(self._names)
            self._names.append(node_id)
        node = self._nodes[node_id] = _Node(slot)
        return node

    def _store(self, node: _Node, key: int) -> None:
        shard = self._shards[key % _NUM_SHARDS]
        number = shard.get(key)
        before = None if number is None else self._sets[number]
        mask = 0 if before is None else before.mask
        if mask & node.bit:
            return
        if self.num_blocks + self.num_stale >= self._max_blocks:
            self.num_ignored += 1
            return
        if before is not None:
            self._leave(before)
        shard[key] = self._joined(mask | node.bit)
        self.num_blocks += 1
        node.num_blocks += 1

    def _drop(self, node: _Node, key: int) -> None:
        shard = self._shards[key % _NUM_SHARDS]
        number = shard.get(key)
        before = None if number is None else self._sets[number]
        if before is None or not before.mask & node.bit:
            return
        mask = before.mask ^ node.bit
        self._leave(before)
        if mask:
            shard[key] = self._joined(mask)
        else:
            del shard[key]
        self.num_blocks -= 1
        node.num_blocks -= 1

    def _joined(self, mask: int) -> int:
        """The number of this set, to which one key more refers."""
        found = self._by_mask.get(mask)
        if found is None:
            found = self._by_mask[mask] = self._sets[self._next_number] = _Holders(self._next_number, mask)
            self._next_number += 1
        found.num_keys += 1
        return found.number

    def _leave(self, holders: _Holders) -> None:
        """One key less refers to it."""
        holders.num_keys -= 1
        if not holders.mask:
            self.num_stale -= 1
        if not holders.num_keys:
            del self._sets[holders.number]
            self._unmask(holders)

    def _unmask(self, holders: _Holders) -> None:
        if self._by_mask.get(holders.mask) is holders:
            del self._by_mask[holders.mask]

    def _node_ids(self, mask: int) -> frozenset[str]:
        return frozenset(self._names[slot] for slot in _slots(mask))

    # -- for tests

    def holders_of(self, key: int) -> frozenset[str]:
        number = self._shards[key % _NUM_SHARDS].get(key)
        return frozenset() if number is None else self._node_ids(self._sets[number].mask)

    def check(self) -> None:
        """Assert the counts."""
        referred = Counter(number for shard in self._shards for number in shard.values())
        assert referred == {number: holders.num_keys for number, holders in self._sets.items()}
        assert all(holders.mask == mask for mask, holders in self._by_mask.items())
        assert all(self._sets[holders.number] is holders for holders in self._by_mask.values())
        assert self.num_stale == sum(x.num_keys for x in self._sets.values() if not x.mask)
        known = 0
        for node_id, node in self._nodes.items():
            assert self._names[node.slot] == node_id
            assert node.num_blocks == sum(x.num_keys for x in self._sets.values() if x.mask & node.bit)
            known |= node.bit
        assert not any(x.mask & ~known for x in self._sets.values()), "a lost node is named"
        assert self.num_blocks == sum(node.num_blocks for node in self._nodes.values())


def _slots(mask: int) -> Iterator[int]:
    """The bits that are set. By the text of the number, at a tenth of the cost of one operation on it for each bit."""
    text = bin(mask)[:1:-1]
    slot = text.find("1")
    while slot >= 0:
        yield slot
        slot = text.find("1", slot + 1)
