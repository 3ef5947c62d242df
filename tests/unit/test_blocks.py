import pytest

from baton.errors import NoBlocks, Overloaded
from engine.blocks import BlockPool, BlockState


def test_lowest_ids_go_first_and_come_back_in_order() -> None:
    pool = BlockPool(6)
    assert pool.allocate("a", 2, BlockState.PROMPT, 0.0) == [0, 1]
    assert pool.allocate("b", 2, BlockState.PROMPT, 0.0) == [2, 3]
    pool.free("a")
    assert pool.allocate("c", 3, BlockState.PROMPT, 0.0) == [0, 1, 4]
    pool.check()


def test_refuses_more_than_there_is_and_takes_nothing() -> None:
    pool = BlockPool(3)
    with pytest.raises(NoBlocks, match="4 KV blocks, 3 of 3"):
        pool.allocate("a", 4, BlockState.PROMPT, 0.0)
    assert pool.num_free == 3
    assert "a" not in pool
    pool.allocate("a", 2, BlockState.PROMPT, 0.0)
    with pytest.raises(NoBlocks):
        pool.grow("a", 2)
    assert pool.grow("a", 1) == [2]
    assert pool.block_ids("a") == [0, 1, 2]


def test_an_owner_allocates_once() -> None:
    pool = BlockPool(3)
    pool.allocate("a", 1, BlockState.LEASED, 0.0)
    with pytest.raises(Overloaded, match="still holds 1 leased"):
        pool.allocate("a", 1, BlockState.PROMPT, 0.0)
    pool.check()


def test_ledger_names_owner_state_epoch_and_age() -> None:
    pool = BlockPool(8)
    pool.allocate("a", 3, BlockState.LEASED, 10.0)
    pool.set_epoch("a", 7)
    pool.move("a", BlockState.QUARANTINED, 12.0)
    pool.move("a", BlockState.QUARANTINED, 13.0)
    (line,) = pool.ledger(15.0)
    assert (line.owner, line.state, line.num_blocks, line.epoch) == ("a", BlockState.QUARANTINED, 3, 7)
    assert line.age_s == pytest.approx(3.0)


def test_check_sees_a_block_with_two_owners() -> None:
    pool = BlockPool(4)
    pool.allocate("a", 2, BlockState.PROMPT, 0.0)
    pool._free.append(0)
    with pytest.raises(AssertionError, match="two owners"):
        pool.check()
