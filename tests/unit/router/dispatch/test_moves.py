"""The router against fake nodes over real gRPC: running sequences move between nodes, and no answer differs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

import baton
from baton.client import Completion
from router.cluster.config import PolicyConfig
from router.cluster.rebalance import MoveReason, Planned
from router.flow.move import MoveOutcome
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import baseline, quick, router_beside, until

CONFIG = FakeConfig(step_s=0.005)
VOCAB = CONFIG.vocab_size
# What the router itself would do is not wanted here.
BY_HAND = PolicyConfig(balance_after_s=60.0, room_ahead_s=1e-9)
# Greedy ones, sampled ones, with penalties and with log-probabilities.
KINDS: Sequence[dict[str, Any]] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"temperature": 1.0, "logprobs": 2},
)


@asynccontextmanager
async def beside(cluster: FakeCluster, **settings: Any) -> AsyncIterator[Router]:
    async with router_beside(cluster, timing=quick, policy=BY_HAND, **settings) as router:
        yield router
        await baseline(cluster)


def running(router: Router, client: baton.AsyncClient, count: int, max_tokens: int) -> list[asyncio.Task[Completion]]:
    calls = [client.complete([1, 2, i], max_tokens=max_tokens, seed=i, **KINDS[i % 4]) for i in range(count)]
    return [asyncio.create_task(call) for call in calls]


def moves(router: Router) -> dict[tuple[str, ...], float]:
    """By reason and outcome."""
    return {key: x.value for key, x in router.dispatcher._metrics.migrations.children.items() if x.value}


def move_one(router: Router, chance: random.Random, targets: Sequence[str]) -> bool:
    """Any sequence that can move, to any other node."""
    scheduler = router.dispatcher.scheduler
    movable = [x for x in scheduler.in_flight if x.flow.can_move]
    if not movable:
        return False
    active = chance.choice(movable)
    assert active.flow.placement is not None
    source = active.flow.placement.decode_id
    target = chance.choice([name for name in targets if name != source])
    router.dispatcher._begin_move(Planned(active, source, target, MoveReason.BALANCE, 40))
    return True


def assert_undisturbed(done: Sequence[Completion], max_tokens: int) -> None:
    for i, completion in enumerate(done):
        sampling = KINDS[i % 4]
        if sampling["temperature"]:
            assert completion.token_ids == tuple(expected_tokens([1, 2, i], i, max_tokens, VOCAB)), i
        assert len(completion.token_ids) == max_tokens
        if "logprobs" in sampling:
            assert [x.chosen.token_id for x in completion.logprobs] == list(completion.token_ids)


async def test_a_hundred_moves_change_no_token() -> None:
    chance = random.Random(1)
    async with FakeCluster(CONFIG, prefill=1, decode=3) as cluster, beside(cluster) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            still = await asyncio.gather(*running(router, client, 8, 300))
            tasks = running(router, client, 8, 300)
            num_begun = 0
            while num_begun < 100 and not all(task.done() for task in tasks):
                num_begun += move_one(router, chance, ["decode-0", "decode-1", "decode-2"])
                await asyncio.sleep(0.01)
            done = await asyncio.gather(*tasks)
        assert [x.token_ids for x in done] == [x.token_ids for x in still]
        assert [x.logprobs for x in done] == [x.logprobs for x in still]
        assert_undisturbed(done, 300)
        assert [x.relay.attempts for x in done] == [1] * 8
        found = moves(router)
        assert sum(found.values()) == num_begun
        assert found["balance", "moved"] > num_begun * 0.9, found


async def test_moves_go_wrong_in_every_way_and_no_token_is_lost() -> None:
    chance = random.Random(2)
    async with FakeCluster(CONFIG, prefill=1, decode=3) as cluster, beside(cluster) as router:
        assert router.grpc is not None
        nodes = [cluster[f"decode-{i}"] for i in range(3)]
        async with baton.AsyncClient(router.grpc) as client:
            tasks = running(router, client, 12, 300)
            while not all(task.done() for task in tasks):
                node = chance.choice(nodes)
                match chance.choice(["reserve", "transfer", "join", "joined", "handed_off", "twice", "well"]):
                    case "reserve" | "transfer" | "join" as what:
                        node.fail(what, code="TransferFailed" if what == "transfer" else "Overloaded")
                    case "joined":
                        node.drop("joined")
                    case "handed_off":
                        node.drop("handed_off")
                    case "twice":
                        node.duplicate("joined")
                        node.duplicate("handed_off")
                move_one(router, chance, [n.node_id for n in nodes])
                await asyncio.sleep(0.02)
                for each in nodes:
                    each.script.forget()
            done = await asyncio.gather(*tasks)
        assert_undisturbed(done, 300)
        found = moves(router)
        assert found["balance", "moved"] > 0
        assert found["balance", "refused"] > 0
        assert found["balance", "failed"] > 0


@pytest.mark.parametrize("victim", ["decode-0", "decode-1"])
async def test_the_source_or_the_target_is_killed_in_the_middle_of_moves(victim: str) -> None:
    config = replace(CONFIG, transfer_s=0.3)
    async with FakeCluster(config, prefill=1, decode=2) as cluster, beside(cluster) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            tasks = running(router, client, 8, 300)
            scheduler = router.dispatcher.scheduler
            await until(lambda: sum(x.flow.can_move for x in scheduler.in_flight) == 8)
            leaving = [x for x in scheduler.in_flight if x.can_move_from("decode-0")]
            for active in leaving:
                router.dispatcher._begin_move(Planned(active, "decode-0", "decode-1", MoveReason.BALANCE, 100))
            await asyncio.sleep(0.1)
            await cluster[victim].die()
            done = await asyncio.gather(*tasks)
        assert_undisturbed(done, 300)
        if victim == "decode-1":
            stayed = [x for x in done if x.relay.decode_node_id == "decode-0" and x.relay.attempts == 1]
            assert len(stayed) >= len(leaving), "those that were to move there went on where they were"
        found = moves(router)
        outcome = MoveOutcome.FAILED if victim == "decode-1" else MoveOutcome.ENDED
        assert found == {("balance", outcome.value): len(leaving)}


@pytest.mark.parametrize("migrates", [True, False])
async def test_a_node_that_drains_gives_its_sequences_away(migrates: bool) -> None:
    async with FakeCluster(CONFIG, prefill=1, decode=2) as cluster:
        policy = replace(BY_HAND, migrates=migrates)
        async with router_beside(cluster, timing=quick, policy=policy) as router:
            assert router.grpc is not None
            async with baton.AsyncClient(router.grpc) as client:
                tasks = running(router, client, 16, 600)
                scheduler = router.dispatcher.scheduler
                await until(lambda: sum(x.flow.can_move for x in scheduler.in_flight) == 16)
                leaving, node = [x for x in scheduler.in_flight if x.can_move_from("decode-0")], cluster["decode-0"]
                assert len(leaving) >= 4
                node.drain(60.0)
                if migrates:
                    await until(lambda: node.service.num_sequences == 0)
                    assert not any(task.done() for task in tasks), "it is empty long before they end"
                else:
                    await asyncio.sleep(0.3)
                    assert node.service.num_sequences == len(leaving)
                done = await asyncio.gather(*tasks)
            assert_undisturbed(done, 600)
            assert [x.relay.attempts for x in done] == [1] * 16
            expected = {("drain", "moved"): len(leaving)} if migrates else {}
            assert moves(router) == expected
            await baseline(cluster)


async def test_room_is_made_for_a_prompt_that_fits_into_the_room_of_all_nodes_alone() -> None:
    # 30 blocks of 16 tokens on each node, of which two sequences take 10 each.
    config = replace(CONFIG, num_blocks=30, step_s=0.02)
    async with (
        FakeCluster(config, prefill=1, decode=2) as cluster,
        router_beside(cluster, timing=quick, policy=replace(BY_HAND, borrow_after_s=60.0)) as router,
    ):
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 100, "seed": 1}
            tasks = [asyncio.create_task(client.complete([i] * 120, **settings)) for i in range(4)]
            scheduler = router.dispatcher.scheduler
            await until(lambda: sum(x.flow.can_move for x in scheduler.in_flight) == 4)
            assert len([x for x in scheduler.in_flight if x.can_move_from("decode-0")]) == 2
            large = await client.complete([7] * 260, temperature=0.0, max_tokens=4, seed=1)
            assert not any(task.done() for task in tasks), "it did not wait for their ends"
            done = await asyncio.gather(*tasks)
        assert len(large.token_ids) == 4
        assert [len(each.token_ids) for each in done] == [100] * 4
        assert [each.relay.attempts for each in (large, *done)] == [1] * 5
        assert moves(router) == {("defragment", "moved"): 1}
        await baseline(cluster)


async def test_a_node_that_drains_keeps_what_has_no_room_elsewhere() -> None:
    async with FakeCluster(CONFIG, prefill=1, decode=2) as cluster, beside(cluster) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            tasks = running(router, client, 6, 200)
            scheduler = router.dispatcher.scheduler
            await until(lambda: sum(x.flow.can_move for x in scheduler.in_flight) == 6)
            cluster["decode-0"].drain(60.0)
            cluster["decode-1"].fail("reserve", times=100)
            done = await asyncio.gather(*tasks)
        assert_undisturbed(done, 200)
        assert [x.relay.attempts for x in done] == [1] * 6
        assert set(moves(router)) == {("drain", "refused")}


async def test_a_relay_and_a_log_line_show_the_moves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with FakeCluster(CONFIG, prefill=1, decode=2) as cluster, beside(cluster) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            (task,) = running(router, client, 1, 100)
            scheduler = router.dispatcher.scheduler
            await until(lambda: any(x.flow.can_move for x in scheduler.in_flight))
            (active,) = scheduler.in_flight
            assert active.flow.placement is not None
            source = active.flow.placement.decode_id
            target = "decode-1" if source == "decode-0" else "decode-0"
            router.dispatcher._begin_move(Planned(active, source, target, MoveReason.ROOM, 40))
            done = await task
        assert done.relay.decode_node_id == target
        (move,) = active.flow.lifeline.relay().moves
        assert (move.source_node_id, move.target_node_id, move.reason) == (source, target, "room")
        assert move.num_bytes > 0
        assert 0 < move.pause_s < 1
        assert any(f"moved from {source}, room; pauses" in x.message for x in caplog.records)


async def test_a_source_that_dies_before_it_says_that_it_let_go_keeps_nothing_from_moving_again() -> None:
    async with FakeCluster(CONFIG, prefill=1, decode=3) as cluster, beside(cluster) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            (task,) = running(router, client, 1, 600)
            scheduler = router.dispatcher.scheduler
            await until(lambda: any(x.flow.can_move for x in scheduler.in_flight))
            (active,) = scheduler.in_flight
            source = active.flow.placement.decode_id
            target, other = [name for name in ("decode-0", "decode-1", "decode-2") if name != source][:2]
            cluster[source].drop("handed_off")
            router.dispatcher._begin_move(Planned(active, source, target, MoveReason.BALANCE, 100))
            await until(lambda: moves(router) == {("balance", "moved"): 1})
            assert not active.flow.can_move, "the source has not said that it let go"
            await cluster[source].die()
            await until(lambda: active.flow.can_move)
            cluster[target].drain(60.0)
            await until(lambda: active.can_move_from(other))
            done = await task
        assert_undisturbed([done], 600)
        assert done.relay.attempts == 1
