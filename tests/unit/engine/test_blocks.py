import pytest

from baton.errors import NoBlocks, Overloaded
from engine.blocks import CACHE_OWNER, BlockPool, BlockState


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
    pool.grow("a", 1)
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


def test_a_prefix_is_shared_and_evicted_from_its_end() -> None:
    pool = BlockPool(4)
    pool.allocate("a", 3, BlockState.PROMPT, 0.0)
    assert [pool.cache("a", i, hash_) for i, hash_ in enumerate((b"x", b"xy"))] == [True, True]
    assert pool.lookup([b"x", b"xy", b"xyz"]) == [0, 1]
    assert pool.lookup([b"?", b"xy"]) == []
    pool.allocate("b", 1, BlockState.PROMPT, 0.0, shared=pool.lookup([b"x"]))
    assert pool.block_ids("b") == [0, 3]
    # "b" computed the same content in a block of its own, which stays its own.
    assert not pool.cache("b", 1, b"xy")
    pool.check()
    pool.free("a")
    assert (pool.num_free, pool.num_cached, pool.num_held) == (1, 1, 2)
    pool.free("b")
    assert (pool.num_free, pool.num_cached, pool.num_held) == (2, 2, 0)
    pool.allocate("c", 3, BlockState.PROMPT, 0.0)
    assert pool.lookup([b"x", b"xy"]) == [0], "a prefix without its beginning is of no use"
    pool.check()


def test_what_is_shared_now_is_not_evicted_for_it() -> None:
    pool = BlockPool(3)
    pool.allocate("a", 2, BlockState.PROMPT, 0.0)
    pool.cache("a", 0, b"x")
    pool.cache("a", 1, b"xy")
    pool.free("a")
    shared = pool.lookup([b"x"])
    with pytest.raises(NoBlocks, match="3 KV blocks, 2 of 3"):
        pool.allocate("b", 3, BlockState.PROMPT, 0.0, shared=shared)
    assert pool.num_cached == 2, "what was refused changed nothing"
    assert pool.allocate("b", 2, BlockState.PROMPT, 0.0, shared=shared) == [0, 1, 2]
    pool.check()


def test_a_shared_block_counts_in_the_line_of_its_oldest_holder() -> None:
    pool = BlockPool(6)
    pool.allocate("a", 2, BlockState.RUNNING, 0.0)
    pool.cache("a", 0, b"x")
    pool.allocate("b", 1, BlockState.LEASED, 0.0, shared=[0])
    assert [(line.owner, line.num_blocks) for line in pool.ledger(0.0)] == [("a", 2), ("b", 1)]
    pool.free("a")
    assert [(line.owner, line.num_blocks) for line in pool.ledger(0.0)] == [("b", 2)]
    pool.free("b")
    (line,) = pool.ledger(0.0)
    assert (line.owner, line.state, line.num_blocks) == (CACHE_OWNER, BlockState.CACHED, 1)


def test_quarantine_keeps_what_is_shared_in_use_and_its_own_blocks_out_of_the_cache() -> None:
    pool = BlockPool(6)
    pool.allocate("a", 2, BlockState.RUNNING, 0.0)
    pool.cache("a", 0, b"x")
    pool.allocate("b", 2, BlockState.LEASED, 0.0, shared=[0])
    with pytest.raises(AssertionError, match="may still be written"):
        pool.cache("b", 1, b"xy")
    pool.move("b", BlockState.QUARANTINED, 1.0)
    with pytest.raises(AssertionError, match="may still be written"):
        pool.cache("b", 1, b"xy")
    assert pool.lookup([b"x"]) == [0], "no writer reaches a shared block"
    pool.free("a")
    assert pool.num_cached == 0, "quarantine holds it"
    pool.free("b")
    assert (pool.num_free, pool.num_cached) == (5, 1)
    pool.check()


def test_only_content_with_a_hash_is_shared() -> None:
    pool = BlockPool(3)
    pool.allocate("a", 1, BlockState.PROMPT, 0.0)
    with pytest.raises(AssertionError, match="only a block with a hash"):
        pool.allocate("b", 1, BlockState.PROMPT, 0.0, shared=[0])
    pool.check()


def test_check_sees_a_reference_too_many() -> None:
    pool = BlockPool(4)
    pool.allocate("a", 2, BlockState.PROMPT, 0.0)
    pool.cache("a", 0, b"x")
    pool._references[0] = 2
    with pytest.raises(AssertionError, match="references are not the holdings"):
        pool.check()


def test_check_sees_a_block_with_two_owners() -> None:
    pool = BlockPool(4)
    pool.allocate("a", 2, BlockState.PROMPT, 0.0)
    pool._returned.append(0)
    with pytest.raises(AssertionError, match="two owners"):
        pool.check()
