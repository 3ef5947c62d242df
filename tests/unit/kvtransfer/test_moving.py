"""Pushes of a sequence that goes on meanwhile: blocks are written as they become full, the commit says how many."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest

from baton.errors import Cancelled, InvalidRequest
from kvtransfer.config import TransferConfig
from kvtransfer.protocol.receiver_events import Arrived, Released
from kvtransfer.sender import Push
from tests.support.transfer import LAYOUT, Pair, pair, token

TRANSPORTS = ["shm", "tcp", "cuda_ipc", "fake:reorder=1,delay_s=0.001,over=shm", "fake:reorder=1,over=tcp"]
SOURCE = [9, 3, 12, 4, 30, 31, 7]
TARGET = [5, 6, 20, 1, 2, 11]


def tell(push: Push, num_blocks: int) -> None:
    for layer in range(LAYOUT.num_layers):
        push.layer_ready(layer, num_blocks)


def written(p: Pair, position: int) -> list[bool]:
    """By layer, whether a position of the lease has the bytes of the sequence's block."""
    found = []
    for layer in range(LAYOUT.num_layers):
        src, dst = LAYOUT.offset(layer, SOURCE[position]), p.receiver._layout.offset(layer, TARGET[position])
        size = LAYOUT.block_bytes
        found.append(np.array_equal(p.source[src : src + size], p.target[dst : dst + size]))
    return found


@pytest.mark.parametrize("num_cached", [0, 2])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_full_blocks_go_first_and_the_commit_ends_it(transport: str, num_cached: int) -> None:
    config = TransferConfig(transports=(transport,))
    async with pair(sender_config=config, receiver_config=config) as p:
        before = p.target.copy()
        lease = p.receiver.grant("r", TARGET[num_cached:], ttl_s=30, min_blocks=1, num_cached_blocks=num_cached)
        push = p.sender.begin(lease, SOURCE, num_known_tokens=None)
        assert push.layerwise, "it is small, and goes on all the same"
        tell(push, 3)
        caught_up = asyncio.Event()
        push.call_when_caught_up(caught_up.set)
        async with asyncio.timeout(10):
            await caught_up.wait()
        # It was one more block until it stopped, and a part of the next.
        tell(push, 4)
        tell(push, 5)
        report = await push.commit(token("r"), 5)
        await p.inbox.wait(Arrived, "r")
        assert (report.num_blocks, report.num_bytes) == (
            5 - num_cached, (5 - num_cached) * LAYOUT.num_layers * LAYOUT.block_bytes,
        )  # fmt: skip
        assert report.total_s >= report.exposed_s
        assert all(itertools.chain.from_iterable(written(p, i) for i in range(num_cached, 5)))
        for layer in range(LAYOUT.num_layers):
            at = p.receiver._layout.offset(layer, TARGET[5])
            assert np.array_equal(p.target[at : at + LAYOUT.block_bytes], before[at : at + LAYOUT.block_bytes])


async def test_all_that_is_to_be_pushed_may_be_there_already() -> None:
    async with pair() as p:
        lease = p.receiver.grant("r", TARGET[3:], ttl_s=30, min_blocks=0, num_cached_blocks=3)
        push = p.sender.begin(lease, SOURCE, num_known_tokens=None)
        tell(push, 3)
        report = await push.commit(token("r"), 3)
        await p.inbox.wait(Arrived, "r")
        assert (report.num_blocks, report.num_bytes) == (0, 0)


async def test_it_is_time_to_stop_when_the_lease_is_nearly_full_however_much_is_unwritten() -> None:
    config = TransferConfig(transports=("fake:delay_s=5,over=shm",))
    async with pair(sender_config=config, receiver_config=config) as p:
        lease = p.receiver.grant("r", TARGET, ttl_s=30)
        push = p.sender.begin(lease, SOURCE, num_known_tokens=None)
        caught_up = asyncio.Event()
        tell(push, 4)
        push.call_when_caught_up(caught_up.set)
        await asyncio.sleep(0.05)
        assert not caught_up.is_set()
        tell(push, 5)
        async with asyncio.timeout(2):
            await caught_up.wait()
        await push.abort("enough")
        await p.inbox.wait(Released, "r")


async def test_more_blocks_than_were_leased_are_refused_and_the_lease_is_given_back() -> None:
    async with pair() as p:
        lease = p.receiver.grant("r", TARGET, ttl_s=30)
        push = p.sender.begin(lease, SOURCE, num_known_tokens=None)
        tell(push, 7)
        with pytest.raises(InvalidRequest, match="7 blocks to push, expected at most the 6"):
            await push.commit(token("r"), 7)
        failures: list[Exception] = []
        push.add_failure_callback(failures.append)
        await push.abort("it does not fit")
        assert (await p.inbox.wait(Released, "r")).is_given_back
        await asyncio.sleep(0)
        assert [type(error) for error in failures] == [Cancelled]
