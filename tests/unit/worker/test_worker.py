"""Two whole workers and a router's session with each: the relay, and what users of such clusters have met.

The numbers are rows of docs/failures.md: 1 silent prefill, 4-6 cancels and disconnects between phases, 8 a wedged
engine, 9 blocks that are wanted while they are sent, 10 a stalled decode, 12 a soak against an oracle, 20 and 22
transfers that fail silently or stall, 24 ends at token one.
"""

import asyncio
import random
import re
import threading
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton import codec
from baton.errors import BadConfig
from baton.server import LIVENESS
from baton.settings import Given, build
from baton.types import Role, SequenceSpec
from baton.v1 import node_pb2, node_pb2_grpc
from engine.config import EngineConfig
from engine.scheduler_config import SchedulerConfig
from tests.support.figures import figure
from tests.support.node import WAIT_S, session, spec
from tests.support.relay import LAYOUT, Load, Pair, oracle, pair, worker
from worker.config import WorkerConfig
from worker.loading import Allocate, LoadedModel
from worker.worker import serve


def now_s() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("num_prompt", [1, 15, 16, 17, 31, 32, 33, 200])
async def test_the_relay_gives_the_tokens_of_one_node(tmp_path: Path, transport: str, num_prompt: int) -> None:
    async with pair(tmp_path, transports=(transport,)) as relay:
        for number in range(3):
            sequence = spec(f"r{number}/0/1", num_prompt, max_tokens=20)
            assert await relay.relay(sequence) == oracle(sequence)
        await relay.settled()


async def test_resumed_sequences_give_the_rest_of_the_same_tokens(tmp_path: Path) -> None:
    async with pair(tmp_path) as relay:
        fresh = spec("r/0/1", 40, max_tokens=20)
        whole = oracle(fresh)
        for done in (1, 8, 18):
            again = SequenceSpec(f"r/0/{done + 1}", fresh.prompt_token_ids, fresh.sampling, tuple(whole[:done]))
            assert await relay.relay(again) == whole[done:]
        await relay.settled()


async def test_what_decode_holds_is_not_moved_and_what_prefill_holds_is_not_computed(tmp_path: Path) -> None:
    """Turns of a conversation over one pair, the last two of one prompt."""
    size = LAYOUT.block_tokens
    limits = SchedulerConfig(max_batch_tokens=64, max_num_seqs=16, verifies_cache=True)
    async with pair(tmp_path, engine=EngineConfig(scheduler=limits)) as relay:
        known: tuple[int, ...] = ()
        cached: list[int] = []
        for turn in range(4):
            prompt = (*known, *(100 + 50 * turn + i for i in range(40 if turn < 3 else 0)))
            sequence = SequenceSpec(f"turn{turn}", prompt, spec("a", 1, max_tokens=20).sampling)
            lease = await relay.reserve(sequence)
            cached.append(lease.num_cached_blocks)
            assert len(lease.block_ids) == LAYOUT.blocks_for(len(prompt) + 1) - lease.num_cached_blocks
            await relay.prefill.run(sequence, lease)
            tokens = list((await relay.prefill.next("tokens")).token_ids)
            done = await relay.prefill.next("prefills")
            assert done.num_cached_tokens + done.num_computed_tokens == len(prompt)
            # The answer lies on the decode node alone.
            assert done.num_cached_tokens == (0, 40 // size * size, 100 // size * size, 159 // size * size)[turn]
            await relay.decode.next("joined")
            tokens += await relay.decode.tokens()
            assert tokens == oracle(sequence)
            report = (await relay.prefill.next("handed_off")).report
            assert report.num_blocks == LAYOUT.blocks_for(len(prompt)) - lease.num_cached_blocks
            known = prompt if turn == 2 else (*prompt, *tokens)
        assert cached == [0, 59 // size, 119 // size, 160 // size]
        await relay.settled()


async def test_without_a_prefix_cache_all_is_computed_and_moved_again(tmp_path: Path) -> None:
    limits = SchedulerConfig(max_batch_tokens=64, max_num_seqs=16, has_prefix_cache=False)
    async with pair(tmp_path, engine=EngineConfig(scheduler=limits)) as relay:
        for number in range(2):
            assert await relay.relay(spec(f"s{number}", 40)) == oracle(spec("a", 40))
        await relay.settled()
        for worker_ in (relay.prefill_worker, relay.decode_worker):
            async with grpc.aio.insecure_channel(worker_.address) as channel:
                stub = node_pb2_grpc.NodeStub(channel)
                assert not (await stub.Describe(node_pb2.DescribeRequest())).node.HasField("prefix_cache")
                ledger = await stub.Ledger(node_pb2.LedgerRequest())
                assert (ledger.free_blocks, list(ledger.owners)) == (ledger.total_blocks, [])


async def test_a_target_for_gaps_is_told_with_step_times_and_changes_no_token(tmp_path: Path) -> None:
    # Below the time of any step: while one decodes, prompts are computed in the smallest chunks.
    limits = SchedulerConfig(max_batch_tokens=64, max_num_seqs=16, tbt_target_s=1e-6, min_chunk_tokens=3)
    async with pair(tmp_path, engine=EngineConfig(scheduler=limits)) as relay:
        for number in range(4):
            sequence = spec(f"s{number}", 40 + number)
            assert await relay.relay(sequence) == oracle(sequence)
        async with grpc.aio.insecure_channel(relay.decode_worker.address) as channel:
            described = await node_pb2_grpc.NodeStub(channel).Describe(node_pb2.DescribeRequest())
        assert described.node.tbt_target_s == 1e-6
        # A line through few steps on a busy machine may lay all of their time on one of the three.
        times = described.status.step_times
        assert times.base_s + times.sequence_s + times.kv_token_s > 0


@pytest.mark.parametrize("how", ["stop", "length"])
async def test_24_the_first_token_ends_the_request_and_decode_gets_its_blocks_back(tmp_path: Path, how: str) -> None:
    first = oracle(spec("a", 40))[0]
    sequence = spec("a", 40, stop_token_ids=(first,)) if how == "stop" else spec("a", 40, max_tokens=1)
    async with pair(tmp_path) as relay:
        lease = await relay.reserve(sequence)
        await relay.prefill.run(sequence, lease)
        tokens = await relay.prefill.next("tokens")
        assert (list(tokens.token_ids), bool(tokens.finish_reason)) == ([first], True)
        ended_s = now_s()
        await relay.settled(2.0)
        figure(24, "first and last token to all blocks free", now_s() - ended_s)
        await relay.unharmed()


async def test_1_a_prefill_that_stays_silent_costs_decode_no_more_than_the_lease(tmp_path: Path) -> None:
    async with pair(tmp_path) as relay:
        await relay.reserve(spec("a", 40), ttl_s=0.3)
        granted_s = now_s()
        # No new work arrives: the lease's own clock ends it.
        failed = await relay.decode.next("failed")
        assert (failed.failure.code, failed.failure.blamed_node_id) == ("TransferFailed", "p0")
        await relay.settled(2.0)
        figure(1, "a lease of 0.3 s to all blocks free", now_s() - granted_s)
        await relay.unharmed()


async def test_1_a_prompt_that_outlives_its_lease_fails_on_both_sides(tmp_path: Path) -> None:
    async with pair(tmp_path, prefill_step_delay_s=0.2) as relay:
        sequence = spec("a", 300)
        lease = await relay.reserve(sequence, ttl_s=0.4)
        await relay.prefill.run(sequence, lease)
        assert (await relay.decode.next("failed")).failure.code == "TransferFailed"
        failed = await relay.prefill.next("failed")
        assert (failed.failure.retryable, failed.failure.blamed_node_id) == (True, "d0")
        await relay.unharmed(3.0)


async def _to_phase(relay: Pair, sequence: SequenceSpec, phase: str) -> None:
    lease = await relay.reserve(sequence, ttl_s=30.0)
    if phase == "leased":
        return
    await relay.prefill.run(sequence, lease)
    if phase == "sent":
        return
    if phase == "computing":
        async with asyncio.timeout(WAIT_S):
            while await relay.prefill_worker.ledger() != {sequence.sequence_id: "prompt"}:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        return
    await relay.prefill.next("tokens")
    if phase == "first token":
        return
    await relay.decode.next("joined")
    if phase == "generating":
        await relay.decode.next("tokens")


@pytest.mark.parametrize("who", ["both", "decode first", "drop"])
@pytest.mark.parametrize("phase", ["leased", "sent", "computing", "first token", "joined", "generating"])
async def test_4_to_6_leaving_at_every_phase_boundary(tmp_path: Path, phase: str, who: str) -> None:
    async with pair(tmp_path, step_delay_s=0.01) as relay:
        sequence = spec("a", 200 if phase == "computing" else 30, max_tokens=300)
        await _to_phase(relay, sequence, phase)
        left_s = now_s()
        if who == "drop":
            relay.prefill.drop()
            relay.decode.drop()
        else:
            order = [relay.prefill, relay.decode] if who == "both" else [relay.decode, relay.prefill]
            for router in order * 2:
                await router.cancel("a")
        await relay.settled(5.0)
        row, what = (6, "session lost") if who == "drop" else (4, "cancel")
        figure(row, f"{what} to all blocks free", now_s() - left_s)
        await relay.unharmed()


@pytest.mark.parametrize(
    "count", [60, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)  # fmt: skip
async def test_5_cancel_in_mid_transfer_again_and_again(tmp_path: Path, count: int) -> None:
    random_source = random.Random(5)
    async with pair(tmp_path, transports=("fake:delay_s=0.004,over=shm",)) as relay:
        for number in range(count):
            sequence = spec(f"s{number}", random_source.randint(1, 120), max_tokens=200)
            lease = await relay.reserve(sequence)
            await relay.prefill.run(sequence, lease)
            await asyncio.sleep(random_source.random() * 0.02)
            await relay.prefill.cancel(sequence.sequence_id)
            await relay.decode.cancel(sequence.sequence_id)
            relay.forget()
        left_s = now_s()
        await relay.settled(5.0)
        figure(5, f"last of {count} cancels to all blocks free", now_s() - left_s)
        await relay.unharmed()


async def test_9_and_20_a_transfer_that_breaks_is_heard_of_at_once(tmp_path: Path) -> None:
    async with pair(tmp_path, prefill_transports=("fake:die=1,over=shm",)) as relay:
        sequence = spec("a", 60)
        lease = await relay.reserve(sequence)
        started_s = now_s()
        await relay.prefill.run(sequence, lease)
        failure = (await relay.prefill.until("failed")).failure
        heard_s = now_s() - started_s
        assert heard_s < 1.0
        figure(20, "a broken transfer to the word of it", heard_s)
        assert (failure.retryable, failure.blamed_node_id) == (True, "d0")
        await relay.unharmed(5.0, moves=False)
        # The connection may break before the writer's abort has passed it: then the decode node tells of it, too.
        while not relay.decode.inbox.empty():
            assert (await relay.decode.next("failed")).failure.retryable


async def test_9_blocks_that_others_want_stay_until_they_are_sent(tmp_path: Path) -> None:
    """A pool for two prompts, transfers that take their time, and each prompt pushes the last one's cache out."""
    source = random.Random(9)
    sequences = [
        SequenceSpec(
            f"s{n}", tuple(source.randrange(1, 1000) for _ in range(source.randint(30, 90))), spec("a", 1).sampling
        )
        for n in range(40)
    ]  # fmt: skip
    slow = "fake:delay_s=0.03,over=shm"
    async with pair(tmp_path, prefill_num_blocks=12, prefill_transports=(slow,), decode_transports=("shm",)) as relay:
        began_s = now_s()
        assert await Load(relay, sequences, at_once=6).run() == {s.sequence_id: oracle(s) for s in sequences}
        figure(9, "40 prompts over a pool for two", now_s() - began_s)
        async with grpc.aio.insecure_channel(relay.prefill_worker.address) as channel:
            cache = await node_pb2_grpc.NodeStub(channel).Cache(node_pb2.CacheRequest())
        assert cache.evicted_blocks > 0, "nothing was evicted: this test has shown nothing"
        await relay.unharmed()


async def test_a_corrupted_block_is_sent_again_and_no_token_changes(tmp_path: Path) -> None:
    async with pair(tmp_path, prefill_transports=("fake:corrupt=1,over=shm",)) as relay:
        for number in range(3):
            sequence = spec(f"s{number}", 100, max_tokens=10)
            assert await relay.relay(sequence) == oracle(sequence)
        await relay.settled()


async def test_22_a_transfer_that_stalls_ends_with_its_lease(tmp_path: Path) -> None:
    async with pair(tmp_path, prefill_transports=("fake:delay_s=60,over=tcp",), decode_transports=("tcp",)) as relay:
        sequence = spec("a", 60)
        lease = await relay.reserve(sequence, ttl_s=0.5)
        granted_s = now_s()
        await relay.prefill.run(sequence, lease)
        assert (await relay.decode.next("failed")).failure.code == "TransferFailed"
        assert (await relay.prefill.until("failed")).failure.retryable
        await relay.settled(5.0)
        figure(22, "a lease of 0.5 s to all blocks free, its transfer stalled for 60 s", now_s() - granted_s)
        await relay.unharmed(moves=False)


async def test_10_a_stalled_decode_pushes_back_and_recovers(tmp_path: Path) -> None:
    async with pair(tmp_path, decode_step_delay_s=0.05, decode_num_blocks=12, prefill_num_blocks=12) as relay:
        sequences = [spec(f"s{n}", 40, max_tokens=8) for n in range(12)]
        load = Load(relay, sequences, at_once=8)
        assert await load.run() == {s.sequence_id: oracle(s) for s in sequences}
        assert load.num_refused > 0
        await relay.unharmed()


@pytest.mark.parametrize(
    "count", [150, pytest.param(3000, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)  # fmt: skip
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_12_soak_against_the_oracle(tmp_path: Path, transport: str, count: int) -> None:
    source = random.Random(12)
    sequences = [spec(f"s{n}", source.randint(1, 150), max_tokens=source.randint(1, 40)) for n in range(count)]
    async with pair(tmp_path, transports=(transport,), num_blocks=40) as relay:
        found = await Load(relay, sequences, at_once=10, limit_s=60.0 + count / 4).run()
        expected = {s.sequence_id: oracle(s) for s in sequences}
        num_wrong = sum(found[name] != expected[name] for name in expected)
        figure(12, f"wrong answers of {count} over {transport}", num_wrong, "answers")
        assert found == expected
        await relay.unharmed()


async def test_one_session_carries_both_phases_of_a_mixed_worker(tmp_path: Path) -> None:
    async with (
        worker(tmp_path, "m0") as mixed,
        worker(tmp_path, "m1") as other,
        session(mixed.address) as near,
        session(other.address) as far,
    ):
        await near.hello()
        await far.hello()
        stays, comes = spec("stays", 50, max_tokens=60), spec("comes", 70, max_tokens=60)
        await near.run(stays)
        await near.reserve(comes, 20.0, "m1")
        found: dict[str, list[int]] = {"stays": [], "comes": []}
        kinds: dict[str, list[str]] = {"stays": [], "comes": []}
        num_ended = 0
        async with asyncio.timeout(WAIT_S):
            while num_ended < 2:
                kind, item = await near.inbox.get()
                kinds[item.sequence_id].append(kind)
                if kind == "tokens":
                    found[item.sequence_id] += item.token_ids
                    num_ended += bool(item.finish_reason)
                elif kind == "reserved":
                    await far.run(comes, codec.lease_from_pb(item))
        first = list((await far.next("tokens")).token_ids)
        assert first + found["comes"] == oracle(comes)
        assert found["stays"] == oracle(stays)
        assert kinds["comes"][:3] == ["reserved", "joined", "tokens"]
        assert "prefills" in kinds["stays"]
        await mixed.until_ledger({})
        await other.until_ledger({})


async def test_8_describe_ledger_and_health(tmp_path: Path) -> None:
    async with (
        worker(tmp_path, "p0", Role.PREFILL, step_delay_s=1.2, stall_limit_s=0.3) as p,
        grpc.aio.insecure_channel(p.address) as channel,
        session(p.address) as router,
    ):
        node = node_pb2_grpc.NodeStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        described = await node.Describe(node_pb2.DescribeRequest())
        assert (described.node.node_id, described.node.address) == ("p0", p.address)
        assert described.node.role == described.node.home_role == 1
        assert described.status.total_blocks == LAYOUT.num_blocks
        await router.hello()
        await router.run(spec("a", 30, max_tokens=2))

        async def until(expected: int) -> None:
            async with asyncio.timeout(WAIT_S):
                while (await health.Check(health_pb2.HealthCheckRequest())).status != expected:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

        # 8: a wedged engine turns readiness red, and it heals.
        asked_s = now_s()
        await until(health_pb2.HealthCheckResponse.NOT_SERVING)
        figure(8, "an engine that stands, with a limit of 0.3 s, to red", now_s() - asked_s)
        assert await p.ledger() == {"a": "prompt"}
        assert await router.tokens() == oracle(spec("a", 30, max_tokens=2))
        await until(health_pb2.HealthCheckResponse.SERVING)
        await p.until_ledger({})


async def test_stop_lets_running_sequences_end_and_refuses_new_ones(tmp_path: Path) -> None:
    async with worker(tmp_path, "m0", step_delay_s=0.01) as mixed, session(mixed.address) as router:
        await router.hello()
        sequence = spec("a", 20, max_tokens=40)
        await router.run(sequence)
        first = await router.next("tokens")
        mixed.stop.set()
        await router.next("prefills")
        await asyncio.sleep(0.05)
        await router.run(spec("b", 20))
        rest: list[int] = list(first.token_ids)
        refused = False
        async with asyncio.timeout(WAIT_S):
            while len(rest) < 40:
                kind, item = await router.inbox.get()
                if kind == "tokens":
                    rest += item.token_ids
                else:
                    assert (item.sequence_id, item.failure.code) == ("b", "Draining")
                    refused = True
        assert rest == oracle(sequence)
        assert refused
        async with asyncio.timeout(WAIT_S):
            await mixed.task


async def test_drain_over_the_network_ends_the_worker_and_can_be_asked_twice(tmp_path: Path) -> None:
    async with (
        worker(tmp_path, "m0", step_delay_s=0.01) as mixed,
        session(mixed.address) as router,
        grpc.aio.insecure_channel(mixed.address) as channel,
    ):
        node, health = node_pb2_grpc.NodeStub(channel), health_pb2_grpc.HealthStub(channel)
        await router.hello()
        sequence = spec("a", 20, max_tokens=60)
        await router.run(sequence)
        first = await router.next("tokens")
        answer = await node.Drain(node_pb2.DrainRequest())
        assert (answer.node_id, answer.num_sequences, round(answer.grace_s)) == ("m0", 1, 5)
        again = await node.Drain(node_pb2.DrainRequest(grace_s=60))
        assert again.grace_s < 5.1, "asking again does not give it more time"
        assert (await node.Describe(node_pb2.DescribeRequest())).status.draining
        ready, live = [await health.Check(health_pb2.HealthCheckRequest(service=s)) for s in ("", LIVENESS)]
        assert ready.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert live.status == health_pb2.HealthCheckResponse.SERVING
        await router.next("prefills")
        assert [*first.token_ids, *await router.tokens()] == oracle(sequence)
        async with asyncio.timeout(WAIT_S):
            assert await mixed.task is True
        with pytest.raises(grpc.aio.AioRpcError):
            await node.Drain(node_pb2.DrainRequest())


async def test_a_bad_grace_time_is_refused(tmp_path: Path) -> None:
    async with worker(tmp_path, "m0") as mixed, grpc.aio.insecure_channel(mixed.address) as channel:
        for grace_s in (-1.0, float("nan"), float("inf"), 86_401.0):
            with pytest.raises(grpc.aio.AioRpcError, match=r"grace_s is .*, expected 0 .* up to 86400"):
                await node_pb2_grpc.NodeStub(channel).Drain(node_pb2.DrainRequest(grace_s=grace_s))


async def test_stop_while_the_model_loads_waits_for_nobody() -> None:
    stop, may_end = asyncio.Event(), threading.Event()

    def load(config: WorkerConfig, allocate: Allocate) -> LoadedModel:
        memory = allocate(4096)
        may_end.wait(WAIT_S)
        memory[0] = 1  # its memory is there for as long as it may write
        raise BadConfig("this is not heard any more")

    task = asyncio.create_task(serve(WorkerConfig(model=Path("fake"), role=Role.MIXED), load=load, stop=stop))
    await asyncio.sleep(0.05)
    stop.set()
    async with asyncio.timeout(WAIT_S):
        assert await task is False
    may_end.set()
    for thread in threading.enumerate():
        if thread.name == "load":
            await asyncio.to_thread(thread.join, WAIT_S)


async def test_stop_cancels_what_outlives_the_grace_time(tmp_path: Path) -> None:
    async with (
        worker(tmp_path, "m0", step_delay_s=0.02, grace_s=0.3) as mixed,
        session(mixed.address) as router,
    ):
        await router.hello()
        await router.run(spec("a", 20, max_tokens=500))
        await router.next("tokens")
        mixed.stop.set()
        async with asyncio.timeout(5):
            await mixed.task


@pytest.mark.parametrize(
    "bad",
    [
        {"drain.grace_s": 0.0}, {"close_s": 0.0}, {"engine.num_blocks": 0}, {"lease.default_ttl_s": 601.0},
        {"stall_limit_s": float("nan")}, {"registry.cluster": "no spaces"}, {"engine.scheduler.watermark": 1.0},
        {"transfer.copy_threads": 65}, {"metrics_port": 65536}, {"advertise_host": "0.0.0.0"}, {"node_id": " "},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_stop_the_start(bad: dict[str, float | str]) -> None:
    own = {"model": Given(Path("x"), "model"), "role": Given(Role.MIXED, "role")}
    ((key, value),) = bad.items()
    with pytest.raises(BadConfig, match=rf"^{re.escape(key)} is "):
        build(WorkerConfig, {**own, key: Given(value, key)})
