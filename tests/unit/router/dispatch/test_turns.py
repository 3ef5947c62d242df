"""One client beside another, over sockets: what a greedy one may take, and how the other fares."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

import baton
from router.clients import client_of
from router.config import LimitsConfig
from router.flow.messages import Phase
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import VOCAB_SIZE, baseline, router_beside, until

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048, step_s=0.01)


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        (("10.0.0.1", b""), ("10.0.0.1", b"Bearer other"), True),
        (("10.0.0.1", b""), ("10.0.0.2", b""), False),
        (("2001:db8::1", b""), ("2001:db8::ffff", b""), True),
        (("2001:db8::1", b""), ("2001:db8:0:1::1", b""), False),
        # A socket for both families.
        (("::ffff:10.0.0.1", b""), ("::ffff:10.0.0.2", b""), False),
        (("::ffff:10.0.0.1", b""), ("10.0.0.1", b""), True),
    ],
)
def test_without_keys_the_address_says_who_asks(first: Any, second: Any, is_same: bool) -> None:
    assert (client_of(*first, has_keys=False) == client_of(*second, has_keys=False)) is is_same


def test_with_keys_the_key_says_it_and_is_not_shown() -> None:
    one = client_of("10.0.0.1", b"Bearer secret", has_keys=True)
    assert one == client_of("10.0.0.2", b"Bearer secret", has_keys=True)
    assert one == client_of("10.0.0.1", b"bearer  secret ", has_keys=True), "the key, however it is spelled out"
    assert one != client_of("10.0.0.1", b"Bearer other", has_keys=True)
    assert "secret" not in one


@pytest.mark.parametrize("num", [4, 40])
async def test_a_greedy_client_leaves_nodes_and_queue_to_another(num: int) -> None:
    keys = ("greedy", "polite")
    limits = LimitsConfig(max_queued=40, max_client_running=4)
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, limits=limits, api_keys=keys) as router,
        baton.AsyncClient(router.grpc or "", api_key="greedy") as greedy,
        baton.AsyncClient(router.grpc or "", api_key="polite") as polite,
    ):
        dispatcher = router.dispatcher
        await polite.complete([1, 2, 3], max_tokens=2, seed=0)
        calls = [asyncio.create_task(greedy.complete([i], max_tokens=1500, seed=i)) for i in range(num)]
        # Four sequences on the node that generates; of the queue a half.
        most = min(num, 4 + 20)
        await until(lambda: dispatcher.scheduler.num_in_flight == most)
        phases = Counter(x.flow.phase for x in dispatcher.scheduler.in_flight)
        assert dispatcher.scheduler.num_in_flight - phases[Phase.QUEUED] == min(num, 4)
        async with asyncio.timeout(20):
            for i in range(5):
                done = await polite.complete([1, 2, 3], max_tokens=5, seed=i)
                assert done.relay.router_queue_s < 1.0
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await baseline(cluster)


async def test_a_newcomer_does_not_wait_for_the_one_that_was_alone() -> None:
    limits = LimitsConfig(max_client_running=2, client_alone_s=0.3)
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, limits=limits, api_keys=("greedy", "polite")) as router,
        baton.AsyncClient(router.grpc or "", api_key="greedy") as greedy,
        baton.AsyncClient(router.grpc or "", api_key="polite") as polite,
    ):
        dispatcher = router.dispatcher

        def num_of_greedy() -> int:
            flows = [x.flow for x in dispatcher.scheduler.in_flight]
            return sum(x.phase is Phase.DECODING for x in flows if x.max_tokens == 300)

        calls = [asyncio.create_task(greedy.complete([i], max_tokens=300, seed=i)) for i in range(1, 9)]
        await until(lambda: num_of_greedy() == 8)
        # One request in passing sets two aside; who comes again has its share.
        for left in (6, 2):
            async with asyncio.timeout(2):
                done = await polite.complete([1, 2, 3], max_tokens=5, seed=0)
            assert done.relay.router_queue_s < 0.5
            assert num_of_greedy() <= left
        # Alone again, it has all of the node without any request that asks for it.
        await until(lambda: num_of_greedy() == 8)
        for i, answer in enumerate(await asyncio.gather(*calls), 1):
            assert answer.relay.attempts == 1
            assert list(answer.token_ids) == expected_tokens([i], i, 300, VOCAB_SIZE)
        await baseline(cluster)


async def test_a_client_alone_has_all_nodes() -> None:
    limits = LimitsConfig(max_client_running=2)
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, limits=limits) as router,
        baton.AsyncClient(router.grpc or "") as client,
    ):
        calls = [asyncio.create_task(client.complete([i], max_tokens=1500, seed=i)) for i in range(20)]
        await until(
            lambda: router.dispatcher.scheduler.num_in_flight == 20 and router.dispatcher.scheduler.num_waiting == 0
        )
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await baseline(cluster)
