"""Which sequence holds which KV blocks, and which blocks may be shared. Hands out ids; touches no bytes and no threads:
the caller passes ``now`` and holds the lock.

A block is free, cached (its content has a hash, no sequence holds it) or held. Law (``check``): free + cached + held ==
total, and a block's references are exactly the holdings that list it.

A block gets a hash once its content is final, and only a block with a hash becomes shared; ``forget`` takes the hash
from a block that sequences go on sharing. A writer outside this process is
given new blocks alone, and those get no hash while it may write to them. Hence the rule for quarantine: a quarantined
holding keeps its references, its shared blocks go on serving the other holdings, and none of its blocks gets a hash any
more, so that only verified content is ever found by hash.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from baton.errors import NoBlocks, Overloaded
from engine.known import KnownBlocks


class BlockState(Enum):
    """Why blocks are not free; the values are the words of baton.v1.LedgerResponse."""

    PROMPT = "prompt"
    SENDING = "sending"
    LEASED = "leased"
    RUNNING = "running"
    QUARANTINED = "quarantined"
    # Held by no sequence, and found by hash until another sequence needs the room.
    CACHED = "cached"


# States in which a writer outside this process may reach the blocks.
_WRITTEN_FROM_OUTSIDE = (BlockState.LEASED, BlockState.QUARANTINED)
# The owner of cached blocks in the ledger.
CACHE_OWNER = "prefix cache"


@dataclass(frozen=True, slots=True)
class OwnerEntry:
    """One line of the ledger; ``epoch`` is the lease's, 0 without one.

    A shared block counts in the line of its oldest holder alone, so that the lines and the free blocks add up to all.
    """

    owner: str
    state: BlockState
    num_blocks: int
    epoch: int
    age_s: float


class _Holding:
    __slots__ = ("block_ids", "epoch", "since_s", "state")

    def __init__(self, block_ids: list[int], state: BlockState, now: float) -> None:
        self.block_ids = block_ids
        self.state = state
        self.since_s = now
        self.epoch = 0


class BlockPool:
    """A fixed number of blocks. The lowest free ids are given first, which keeps the used range dense.

    When the free blocks run out, or more than ``max_cached`` are cached, cached ones are evicted, least recently used
    first.
    """

    def __init__(self, num_blocks: int, *, max_cached: int | None = None) -> None:
        assert num_blocks > 0, "a pool has at least one block"
        self.num_blocks = num_blocks
        self.max_cached = num_blocks if max_cached is None else max_cached
        self.num_evicted = 0
        # Blocks that were given at least once: those before this id. All from it on are free.
        self._num_begun = 0
        # Heap of the free ids before it: short, however large the pool is.
        self._returned: list[int] = []
        # Oldest first.
        self._holdings: dict[str, _Holding] = {}
        # Those whose content has a hash.
        self.known = KnownBlocks()
        # How many holdings list a block that has, or had, a hash; any other has one holder.
        self._references: dict[int, int] = {}
        # With a hash and listed by none, least recently used first.
        self._cached: OrderedDict[int, None] = OrderedDict()
        # References beyond the first of each block.
        self._num_extra = 0

    @property
    def num_free(self) -> int:
        return self.num_blocks - self._num_begun + len(self._returned)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated: free and cached ones."""
        return self.num_blocks - self._num_begun + len(self._returned) + len(self._cached)

    @property
    def free_ids(self) -> list[int]:
        """In no order."""
        return [*self._returned, *range(self._num_begun, self.num_blocks)]

    def __contains__(self, owner: str) -> bool:
        return owner in self._holdings

    def allocate(
        self, owner: str, count: int, state: BlockState, now: float, *, shared: Sequence[int] = ()
    ) -> Sequence[int]:
        """Give ``owner``, who holds nothing yet, the ``shared`` blocks (of ``lookup``) and ``count`` new ones behind.

        Returns the pool's own list of the owner's blocks, which grows with ``grow``: new ones in ascending order.
        Raises NoBlocks if there are fewer, Overloaded if the owner's earlier blocks are not back yet.
        """
        if owner in self._holdings:
            held = self._holdings[owner]
            raise Overloaded(
                f"{owner} still holds {len(held.block_ids)} {held.state.value} blocks here, expected a new sequence id"
            )
        if shared:
            self._share(owner, count, shared)
        block_ids = [*shared, *self._take(owner, count)]
        self._holdings[owner] = _Holding(block_ids, state, now)
        return block_ids

    def grow(self, owner: str, count: int) -> None:
        """Add ``count`` new blocks to an owner's. Raises NoBlocks."""
        self._holdings[owner].block_ids += self._take(owner, count)

    def move(self, owner: str, state: BlockState, now: float) -> None:
        """The owner holds its blocks for another reason from now on."""
        holding = self._holdings[owner]
        assert holding.state is not BlockState.QUARANTINED or state is BlockState.QUARANTINED, "quarantine ends in free"
        if holding.state is not state:
            holding.state = state
            holding.since_s = now

    def set_epoch(self, owner: str, epoch: int) -> None:
        self._holdings[owner].epoch = epoch

    def block_ids(self, owner: str) -> Sequence[int]:
        """The pool's own list of the owner's blocks, in the order they were given."""
        return self._holdings[owner].block_ids

    def state_of(self, owner: str) -> BlockState:
        return self._holdings[owner].state

    def num_taken(self, count: int, shared: Sequence[int]) -> int:
        """Of the available blocks, those that a sequence of ``count`` blocks takes if it begins with ``shared``."""
        return count - len(shared) + sum(block in self._cached for block in shared)

    def is_shared(self, block: int) -> bool:
        """Found by hash, or listed by several holdings: its content must not change."""
        return block in self.known or self._references.get(block, 1) > 1

    def free(self, owner: str) -> int:
        """End the owner's references; returns how many. The caller knows that no reader or writer is left.

        Blocks with a hash that no other holding lists are cached, the last of the owner's to be evicted first: a prefix
        is found from its beginning.
        """
        block_ids = self._holdings.pop(owner).block_ids
        own = block_ids
        if self._references:
            own = [block for block in block_ids if block not in self._references]
            for block in reversed(block_ids):
                if block in self._references:
                    self._unrefer(block)
        for block in own:
            heapq.heappush(self._returned, block)
        while len(self._cached) > self.max_cached:
            self._evict_one()
        return len(block_ids)

    # -- content

    def cache(self, owner: str, index: int, content_hash: bytes) -> bool:
        """The owner's block ``index`` is final and holds ``content_hash``: ``lookup`` finds it from now on.

        False if a block is found by that hash already; another one then stays the owner's alone.
        """
        holding = self._holdings[owner]
        assert holding.state not in _WRITTEN_FROM_OUTSIDE, "content that may still be written to has no hash"
        if self.known.find(content_hash) is not None:
            return False
        block = holding.block_ids[index]
        self.known.add(block, content_hash)
        self._references.setdefault(block, 1)
        return True

    def lookup(self, content_hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known beginning of a chain of hashes, held or cached; to be shared by ``allocate``."""
        found: list[int] = []
        for content_hash in content_hashes:
            block = self.known.find(content_hash)
            if block is None:
                break
            found.append(block)
        return found

    def forget(self, blocks: Iterable[int]) -> int:
        """Find these by hash no more, also where a sequence holds them; returns how many were found until now."""
        count = 0
        for block in blocks:
            if block in self.known:
                count += 1
                self.known.remove(block)
                if block in self._cached:
                    del self._cached[block]
                    heapq.heappush(self._returned, block)
        return count

    # -- the ledger

    def blocks_by_state(self) -> dict[BlockState, int]:
        """The ledger in short: blocks that are not free by state, each once."""
        counts = dict.fromkeys(BlockState, 0)
        for held, count in zip(self._holdings.values(), self._counts(), strict=True):
            counts[held.state] += count
        counts[BlockState.CACHED] = self.num_cached
        return counts

    def ledger(self, now: float) -> list[OwnerEntry]:
        lines = [
            OwnerEntry(owner, held.state, count, held.epoch, max(0.0, now - held.since_s))
            for (owner, held), count in zip(self._holdings.items(), self._counts(), strict=True)
        ]
        if self._cached:
            lines.append(OwnerEntry(CACHE_OWNER, BlockState.CACHED, self.num_cached, 0, 0.0))
        return lines

    def owners(self) -> set[str]:
        return set(self._holdings)

    def check(self) -> None:
        """Assert the law of the module."""
        listed = Counter(block for held in self._holdings.values() for block in held.block_ids)
        seen = sorted([*self.free_ids, *self._cached, *listed])
        assert seen == list(range(self.num_blocks)), "a block was lost or has two owners"
        assert {block: self._references.get(block, 1) for block in listed} == listed, "references are not the holdings"
        self.known.check()
        assert {*self.known} - self._cached.keys() <= self._references.keys(), (
            "found by hash, but neither held nor cached"
        )
        assert self._cached.keys() <= {*self.known}, "cached without a hash"
        assert len(self._cached) <= self.max_cached, "more is cached than may be"
        assert self._num_extra == listed.total() - len(listed), "the extra references are miscounted"
        assert self._num_extra == listed.total() - self.num_held, "a block counts twice"

    # -- inside

    def _counts(self) -> list[int]:
        """By holding, its blocks that no older one lists."""
        if not self._num_extra:
            return [len(held.block_ids) for held in self._holdings.values()]
        seen: set[int] = set()
        counts = []
        for held in self._holdings.values():
            before = len(seen)
            seen.update(held.block_ids)
            counts.append(len(seen) - before)
        return counts

    def _take(self, owner: str, count: int) -> list[int]:
        assert count >= 0, "cannot take a negative number of blocks"
        if count > self.num_free:
            self._evict(owner, count)
        returned, first = self._returned, self._num_begun
        taken = [heapq.heappop(returned) for _ in range(min(count, len(returned)))]
        self._num_begun += count - len(taken)
        taken += range(first, self._num_begun)
        return taken

    def _evict(self, owner: str, count: int) -> None:
        """Make ``count`` blocks free."""
        self._refuse_too_many(owner, count, self.num_available)
        while self.num_free < count:
            self._evict_one()

    def _evict_one(self) -> None:
        block, _ = self._cached.popitem(last=False)
        self.known.remove(block)
        self.num_evicted += 1
        heapq.heappush(self._returned, block)

    def _refuse_too_many(self, owner: str, count: int, num_available: int) -> None:
        if count > num_available:
            raise NoBlocks(f"{owner} needs {count} KV blocks, {num_available} of {self.num_blocks} are free")

    def _share(self, owner: str, count: int, shared: Sequence[int]) -> None:
        """Refer to ``shared`` if ``count`` blocks are there beside them."""
        assert all(block in self.known for block in shared), "only a block with a hash is shared"
        self._refuse_too_many(owner, count, self.num_available - sum(block in self._cached for block in shared))
        for block in shared:
            if block in self._cached:
                del self._cached[block]
                self._references[block] = 1
            else:
                self._references[block] += 1
                self._num_extra += 1

    def _unrefer(self, block: int) -> None:
        references = self._references[block]
        if references == 1:
            del self._references[block]
            if block in self.known:
                self._cached[block] = None
            else:
                heapq.heappush(self._returned, block)
        else:
            self._references[block] = references - 1
            self._num_extra -= 1
