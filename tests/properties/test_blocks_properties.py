"""BlockPool against a dictionary of sets: whatever the order of calls, no block is lost or owned twice."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import NoBlocks, Overloaded
from engine.blocks import BlockPool, BlockState

NUM_BLOCKS = 12
OWNERS = st.sampled_from("abcde")
STATES = st.sampled_from(list(BlockState))


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.model: dict[str, list[int]] = {}
        self.now = 0.0

    @property
    def free(self) -> list[int]:
        return sorted(set(range(NUM_BLOCKS)) - {b for blocks in self.model.values() for b in blocks})

    @rule(owner=OWNERS, count=st.integers(0, 6), state=STATES)
    def allocate(self, owner: str, count: int, state: BlockState) -> None:
        if owner in self.model:
            with pytest.raises(Overloaded):
                self.pool.allocate(owner, count, state, self.now)
        elif count > len(self.free):
            with pytest.raises(NoBlocks):
                self.pool.allocate(owner, count, state, self.now)
        else:
            lowest = self.free[:count]
            assert self.pool.allocate(owner, count, state, self.now) == lowest
            self.model[owner] = lowest

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 4))
    def grow(self, data: st.DataObject, count: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.model)))
        if count > len(self.free):
            with pytest.raises(NoBlocks):
                self.pool.grow(owner, count)
        else:
            lowest = self.free[:count]
            assert self.pool.grow(owner, count) == lowest
            self.model[owner] = [*self.model[owner], *lowest]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free_all(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.model)))
        assert self.pool.free(owner) == len(self.model.pop(owner))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), state=STATES)
    def move(self, data: st.DataObject, state: BlockState) -> None:
        owner = data.draw(st.sampled_from(sorted(self.model)))
        self.now += 1
        self.pool.move(owner, state, self.now)
        assert self.pool.state_of(owner) is state

    @invariant()
    def conserved(self) -> None:
        self.pool.check()
        assert self.pool.num_free == len(self.free)
        for owner, blocks in self.model.items():
            assert self.pool.block_ids(owner) == blocks
        assert {line.owner: line.num_blocks for line in self.pool.ledger(self.now)} == {
            owner: len(blocks) for owner, blocks in self.model.items()
        }


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)
