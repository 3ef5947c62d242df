"""BlockPool against a plain model: whatever the order of calls, no block is lost, free twice, or evicted while held."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import NoBlocks, Overloaded
from engine.blocks import CACHE_OWNER, BlockPool, BlockState

NUM_BLOCKS = 12
OWNERS = st.sampled_from("abcde")
NEW_STATES = st.sampled_from([BlockState.PROMPT, BlockState.LEASED])
LATER_STATES = [BlockState.PROMPT, BlockState.SENDING, BlockState.RUNNING, BlockState.QUARANTINED]
# Chains of hashes that have their beginnings in common.
CHAINS = [[f"{name[: i + 1]}".encode() for i in range(len(name))] for name in ("aaaa", "aabb", "bbbb")]


@dataclass
class Held:
    blocks: list[int]
    state: BlockState
    # By block, what a writer outside could have written into it is no content.
    chain: list[bytes] = field(default_factory=list)


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.model: dict[str, Held] = {}
        self.hashes: dict[bytes, int] = {}
        # Least recently used first.
        self.cached: list[int] = []
        self.now = 0.0

    @property
    def free(self) -> list[int]:
        return sorted(
            set(range(NUM_BLOCKS)) - {b for held in self.model.values() for b in held.blocks} - {*self.cached}
        )

    def lookup(self, chain: list[bytes]) -> list[int]:
        found = []
        for value in chain:
            if value not in self.hashes:
                break
            found.append(self.hashes[value])
        return found

    def take(self, count: int) -> list[int]:
        """What the pool is to give, evictions included."""
        while len(self.free) < count:
            evicted = self.cached.pop(0)
            self.hashes = {value: block for value, block in self.hashes.items() if block != evicted}
        return self.free[:count]

    @rule(owner=OWNERS, count=st.integers(0, 6), state=NEW_STATES, chain=st.sampled_from([[], *CHAINS]))
    def allocate(self, owner: str, count: int, state: BlockState, chain: list[bytes]) -> None:
        shared = self.pool.lookup(chain)
        assert shared == self.lookup(chain)
        if owner in self.model:
            with pytest.raises(Overloaded):
                self.pool.allocate(owner, count, state, self.now, shared=shared)
            return
        kept = [block for block in self.cached if block not in shared]
        if count > len(self.free) + len(kept):
            with pytest.raises(NoBlocks):
                self.pool.allocate(owner, count, state, self.now, shared=shared)
            return
        self.cached = kept
        self.model[owner] = Held(list(shared), state, chain)
        expected = [*shared, *self.take(count)]
        assert self.pool.allocate(owner, count, state, self.now, shared=shared) == expected
        self.model[owner].blocks = expected

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 4))
    def grow(self, data: st.DataObject, count: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.model)))
        if count > len(self.free) + len(self.cached):
            with pytest.raises(NoBlocks):
                self.pool.grow(owner, count)
        else:
            self.model[owner].blocks += self.take(count)
            self.pool.grow(owner, count)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        """The owner's next block without a hash is final."""
        owner = data.draw(st.sampled_from(sorted(self.model)))
        held = self.model[owner]
        chain = held.chain or data.draw(st.sampled_from(CHAINS))
        index = sum(block in self.hashes.values() for block in held.blocks)
        if index >= min(len(chain), len(held.blocks)) or held.blocks[index] in self.hashes.values():
            return
        if held.state in (BlockState.LEASED, BlockState.QUARANTINED):
            with pytest.raises(AssertionError, match="may still be written"):
                self.pool.cache(owner, index, chain[index])
            return
        held.chain = chain
        is_new = chain[index] not in self.hashes
        assert self.pool.cache(owner, index, chain[index]) is is_new
        if is_new:
            self.hashes[chain[index]] = held.blocks[index]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free_all(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.model)))
        blocks = self.model.pop(owner).blocks
        assert self.pool.free(owner) == len(blocks)
        others = {b for held in self.model.values() for b in held.blocks}
        self.cached += [b for b in reversed(blocks) if b in self.hashes.values() and b not in others]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), state=st.sampled_from(LATER_STATES))
    def move(self, data: st.DataObject, state: BlockState) -> None:
        owner = data.draw(st.sampled_from(sorted(self.model)))
        if self.model[owner].state is BlockState.QUARANTINED and state is not BlockState.QUARANTINED:
            with pytest.raises(AssertionError, match="quarantine ends in free"):
                self.pool.move(owner, state, self.now)
            return
        self.now += 1
        self.pool.move(owner, state, self.now)
        self.model[owner].state = state
        assert self.pool.state_of(owner) is state

    @invariant()
    def conserved(self) -> None:
        self.pool.check()
        listed = {b for held in self.model.values() for b in held.blocks}
        assert (self.pool.num_free, self.pool.num_cached) == (len(self.free), len(self.cached))
        assert self.pool.num_held == len(listed)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_held == NUM_BLOCKS
        for owner, held in self.model.items():
            assert self.pool.block_ids(owner) == held.blocks
        for chain in CHAINS:
            assert self.pool.lookup(chain) == self.lookup(chain)

    @invariant()
    def ledger_adds_up(self) -> None:
        lines = self.pool.ledger(self.now)
        assert sum(line.num_blocks for line in lines) + self.pool.num_free == NUM_BLOCKS
        assert {line.owner for line in lines} == {*self.model} | ({CACHE_OWNER} if self.cached else set())
        by_state = self.pool.blocks_by_state()
        assert sum(by_state.values()) + self.pool.num_free == NUM_BLOCKS
        assert by_state[BlockState.CACHED] == len(self.cached)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=50)
