"""Who owns each KV block. Hands out ids, never touches bytes, time or threads; the caller passes ``now`` and locks.

Law: every block has one owner, and free + owned == total (``check``).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import Enum

from baton.errors import NoBlocks, Overloaded


class BlockState(Enum):
    """Why blocks are held; the values are the words of baton.v1.LedgerResponse."""

    PROMPT = "prompt"
    SENDING = "sending"
    LEASED = "leased"
    RUNNING = "running"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class OwnerEntry:
    """One line of the ledger; ``epoch`` is the lease's, 0 where there is none."""

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
    """A fixed number of blocks and their owners. The lowest free ids go first, which keeps the used range dense."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, "a pool has at least one block"
        self.num_blocks = num_blocks
        # Heap of free ids.
        self._free = list(range(num_blocks))
        self._holdings: dict[str, _Holding] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def __contains__(self, owner: str) -> bool:
        return owner in self._holdings

    def allocate(self, owner: str, count: int, state: BlockState, now: float) -> list[int]:
        """Give ``owner``, who holds nothing yet, ``count`` blocks in ascending order.

        Raises NoBlocks if there are fewer, Overloaded if the owner's earlier blocks are not back yet.
        """
        if owner in self._holdings:
            held = self._holdings[owner]
            raise Overloaded(
                f"{owner} still holds {len(held.block_ids)} {held.state.value} blocks here, expected a new sequence id"
            )
        holding = _Holding(self._take(owner, count), state, now)
        self._holdings[owner] = holding
        return list(holding.block_ids)

    def grow(self, owner: str, count: int) -> list[int]:
        """Give an owner ``count`` more blocks and return those. Raises NoBlocks."""
        holding = self._holdings[owner]
        added = self._take(owner, count)
        holding.block_ids += added
        return added

    def move(self, owner: str, state: BlockState, now: float) -> None:
        """The owner holds its blocks for another reason from now on."""
        holding = self._holdings[owner]
        if holding.state is not state:
            holding.state = state
            holding.since_s = now

    def set_epoch(self, owner: str, epoch: int) -> None:
        self._holdings[owner].epoch = epoch

    def block_ids(self, owner: str) -> list[int]:
        """The owner's blocks in the order they were given."""
        return list(self._holdings[owner].block_ids)

    def state_of(self, owner: str) -> BlockState:
        return self._holdings[owner].state

    def free(self, owner: str) -> int:
        """Take every block back; returns how many. The caller answers for it that nobody can still reach them."""
        holding = self._holdings.pop(owner)
        for block in holding.block_ids:
            heapq.heappush(self._free, block)
        return len(holding.block_ids)

    def blocks_by_state(self) -> dict[BlockState, int]:
        """The ledger in short: owned blocks by why they are held."""
        counts = dict.fromkeys(BlockState, 0)
        for held in self._holdings.values():
            counts[held.state] += len(held.block_ids)
        return counts

    def ledger(self, now: float) -> list[OwnerEntry]:
        return [
            OwnerEntry(owner, held.state, len(held.block_ids), held.epoch, max(0.0, now - held.since_s))
            for owner, held in self._holdings.items()
        ]

    def check(self) -> None:
        """Assert conservation: each block is free once or owned once."""
        seen = sorted([*self._free, *(block for held in self._holdings.values() for block in held.block_ids)])
        assert seen == list(range(self.num_blocks)), "a block was lost or has two owners"

    def _take(self, owner: str, count: int) -> list[int]:
        assert count >= 0, "cannot take a negative number of blocks"
        if count > len(self._free):
            raise NoBlocks(f"{owner} needs {count} KV blocks, {len(self._free)} of {self.num_blocks} are free")
        return [heapq.heappop(self._free) for _ in range(count)]
