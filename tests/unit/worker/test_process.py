"""Workers as processes: what remains when one is killed, and how one stops.

Rows of the table of known failures: 1 prefill falls silent, 2 prefill dies in mid-transfer, 3 decode dies or is slow,
10 decode stalls, 13 health is about oneself, 15 a replacement on the same address.
"""

import asyncio
import re
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton import codec
from baton.types import Role
from tests.support.figures import figure
from tests.support.node import session, spec
from tests.support.relay import (
    CHILD,
    Load,
    ProcessWorker,
    oracle,
    process_pair,
    process_worker,
    unharmed,
    worker,
)
from tests.support.root import ROOT


def now_s() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("transport", ["tcp", "shm"])
async def test_1_a_prefill_that_stands_still_costs_decode_its_lease_and_no_more(tmp_path: Path, transport: str) -> None:
    """A writer on the same host that cannot be asked keeps its blocks until it speaks; over tcp, decode writes."""
    async with process_pair(
        tmp_path,
        prefill={"step_delay_s": 0.2, "transports": (transport,)},
        decode={"transports": (transport,)},
    ) as (relay, p, d):
        sequence = spec("a", 400)
        lease = await relay.reserve(sequence, ttl_s=1.0)
        granted_s = now_s()
        await relay.prefill.run(sequence, lease)
        await p.until_ledger({"a": "prompt"})
        p.stop()
        failed = await relay.decode.next("failed")
        assert (failed.failure.code, failed.failure.blamed_node_id) == ("TransferFailed", "p0")
        if transport == "tcp":
            await d.until_ledger({}, 10.0)
            figure(1, "a lease of 1 s to all blocks free, prefill frozen", now_s() - granted_s)
        else:
            assert await d.ledger() in ({}, {"a": "quarantined"})
        await d.serves()
        p.go_on()
        assert (await relay.prefill.until("failed")).failure.blamed_node_id == "d0"
        await relay.unharmed()


async def test_2_and_13_prefill_dies_in_mid_prompt_and_decode_neither_leaks_nor_sickens(tmp_path: Path) -> None:
    async with (
        worker(tmp_path, "d0", Role.DECODE) as d,
        process_worker(tmp_path, "p0", "prefill", step_delay_s=0.2) as p,
        session(d.address) as decode,
        session(p.address) as prefill,
    ):
        await decode.hello()
        await prefill.hello()
        sequence = spec("a", 400)
        await decode.reserve(sequence, 60.0, "p0")
        await prefill.run(sequence, codec.lease_from_pb(await decode.next("reserved")))
        await asyncio.sleep(0.6)
        killed_s = now_s()
        await p.kill()
        failed = await decode.next("failed")
        figure(2, "prefill killed to the word of it", now_s() - killed_s)
        assert (failed.failure.code, failed.failure.blamed_node_id) == ("TransferFailed", "p0")
        await d.until_ledger({}, 5.0)
        figure(2, "prefill killed to all blocks of decode free", now_s() - killed_s)
        num_red = 0
        async with grpc.aio.insecure_channel(d.address) as channel:
            for _ in range(20):
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                num_red += answer.status != health_pb2.HealthCheckResponse.SERVING
        figure(13, "red answers of 20 to health after a neighbour's death", num_red, "answers")
        assert num_red == 0
        again = await ProcessWorker.start(tmp_path, "p1", "prefill")
        try:
            await unharmed(again, d)
        finally:
            assert await again.terminate() == 0


async def test_3_decode_dies_and_prefill_frees_its_blocks_in_seconds(tmp_path: Path) -> None:
    async with (
        worker(tmp_path, "p0", Role.PREFILL, step_delay_s=0.2) as p,
        process_worker(tmp_path, "d0", "decode") as d,
        session(d.address) as decode,
        session(p.address) as prefill,
    ):
        await decode.hello()
        await prefill.hello()
        sequence = spec("a", 400)
        await decode.reserve(sequence, 60.0, "p0")
        await prefill.run(sequence, codec.lease_from_pb(await decode.next("reserved")))
        await asyncio.sleep(0.5)
        killed_s = now_s()
        await d.kill()
        failed = await prefill.next("failed")
        assert (failed.failure.retryable, failed.failure.blamed_node_id) == (True, "d0")
        await p.until_ledger({}, 5.0)
        figure(3, "decode killed to all blocks of prefill free", now_s() - killed_s)
        await p.serves()


async def test_3_a_decode_that_is_only_slow_keeps_its_blocks_at_prefill(tmp_path: Path) -> None:
    async with process_pair(tmp_path) as (relay, p, d):
        sequence = spec("a", 100, max_tokens=20)
        lease = await relay.reserve(sequence, ttl_s=30.0)
        d.stop()
        await relay.prefill.run(sequence, lease)
        first = await relay.prefill.next("tokens")
        await p.until_ledger({"a": "sending"})
        await asyncio.sleep(1.5)
        assert await p.ledger() == {"a": "sending"}
        d.go_on()
        await relay.decode.next("joined")
        assert [*first.token_ids, *await relay.decode.tokens()] == oracle(sequence)
        await relay.unharmed()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["tcp", "shm"])
async def test_10_a_decode_frozen_for_ten_seconds_fills_prefill_and_both_recover(
    tmp_path: Path, transport: str
) -> None:
    """What is to be handed over waits at prefill; when it has waited too long it fails, and no sequence hangs."""
    settings = {"transports": (transport,)}
    async with process_pair(tmp_path, prefill=settings, decode=settings) as (relay, p, d):
        sequences = [spec(f"s{n}", 100 + n, max_tokens=8) for n in range(5)]
        for sequence in sequences:
            lease = await relay.reserve(sequence, ttl_s=60.0)
            if sequence is sequences[-1]:
                d.stop()
                stopped_s = now_s()
            await relay.prefill.run(sequence, lease)
        # No deadlock: what needs no other node is computed meanwhile.
        await p.serves()
        assert now_s() - stopped_s < 10.0
        await asyncio.sleep(stopped_s + 10.0 - now_s())
        d.go_on()
        woken_s = now_s()
        # One outcome each: handed over and decoded, or failed at prefill.
        done: dict[str, dict[int, int]] = {s.sequence_id: {} for s in sequences}
        ended: set[str] = set()
        async with asyncio.timeout(30.0):
            while len(ended) < len(sequences):
                for router in (relay.prefill, relay.decode):
                    while not router.inbox.empty():
                        kind, item = router.inbox.get_nowait()
                        if kind == "tokens":
                            chunk = dict(enumerate(item.token_ids, item.index))
                            assert not done[item.sequence_id].keys() & chunk.keys(), "a token came twice"
                            done[item.sequence_id] |= chunk
                        if kind == "failed" or (kind == "tokens" and item.finish_reason):
                            ended.add(item.sequence_id)
                        if kind == "failed":
                            # As a router does, which runs it elsewhere.
                            await relay.prefill.cancel(item.sequence_id)
                            await relay.decode.cancel(item.sequence_id)
                await asyncio.sleep(0.01)
        for sequence in sequences:
            tokens = done[sequence.sequence_id]
            came = [tokens[i] for i in range(len(tokens))]
            assert came == oracle(sequence)[: len(came)], "what came is right, whatever became of the rest"
        await relay.settled()
        figure(10, "decode frozen for 10 s, from its return to all blocks free on both", now_s() - woken_s)
        # What is still to be said of those that failed.
        await asyncio.sleep(0.5)
        relay.forget()
        more = [spec(f"more{n}", 40, max_tokens=8) for n in range(20)]
        assert await Load(relay, more, at_once=8).run() == {s.sequence_id: oracle(s) for s in more}
        await relay.unharmed()


async def test_15_a_replacement_on_the_same_address_is_a_new_node(tmp_path: Path) -> None:
    async with (
        worker(tmp_path, "p0", Role.PREFILL) as p,
        process_worker(tmp_path, "d0", "decode") as d,
        session(p.address) as prefill,
    ):
        await prefill.hello()
        sequence = spec("a", 40, max_tokens=5)
        async with session(d.address) as decode:
            before = (await decode.hello()).welcome.node.incarnation
            await decode.reserve(sequence, 60.0, "p0")
            stale = codec.lease_from_pb(await decode.next("reserved"))
            await d.kill()
        again = await ProcessWorker.start(tmp_path, "d0", "decode", listen=d.address)
        try:
            async with session(again.address) as decode:
                assert (await decode.hello()).welcome.node.incarnation != before
                asked_s = now_s()
                await prefill.run(sequence, stale)
                item = await prefill.until("failed")
                figure(15, "a lease of the life before to its refusal", now_s() - asked_s)
                assert (item.failure.retryable, item.failure.blamed_node_id) == (True, "d0")
                await p.until_ledger({}, 5.0)
                fresh = spec("b", 40, max_tokens=5)
                await decode.reserve(fresh, 60.0, "p0")
                await prefill.run(fresh, codec.lease_from_pb(await decode.next("reserved")))
                first = await prefill.next("tokens")
                await decode.next("joined")
                assert [*first.token_ids, *await decode.tokens()] == oracle(fresh)
            await unharmed(p, again)
        finally:
            assert await again.terminate() == 0


async def test_sigterm_ends_the_process_with_0(tmp_path: Path) -> None:
    async with (
        process_worker(tmp_path, "m0", "mixed", step_delay_s=0.01) as m,
        session(m.address) as router,
    ):
        await router.hello()
        await router.run(spec("a", 20, max_tokens=100))
        await router.next("tokens")
        assert await m.terminate() == 0
        assert len(await router.tokens()) == 99


async def test_a_second_sigterm_stops_at_once(tmp_path: Path) -> None:
    async with (
        process_worker(tmp_path, "m0", "mixed", step_delay_s=0.1) as m,
        session(m.address) as router,
    ):
        await router.hello()
        await router.run(spec("a", 20, max_tokens=500))
        await router.next("tokens")
        m.process.terminate()
        async with asyncio.timeout(5):
            while not (await m.describe()).status.draining:  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.01)
        assert await m.terminate() == 0, "well before the 3 s of its grace time, or its 500 tokens"
        code, _, _ = await router.ended()
        assert code is grpc.StatusCode.OK


async def test_sigterm_while_the_model_loads_ends_the_process_with_0(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", CHILD, "m0", "mixed", "127.0.0.1:0", str(tmp_path / "r"), "load"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"loading\n"
        process.terminate()
        assert await process.wait() == 0


async def cli(*arguments: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", *arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_baton_drain_waits_for_the_end_and_baton_health_tells_before_and_after(tmp_path: Path) -> None:
    async with (
        process_worker(tmp_path, "m0", "mixed", step_delay_s=0.01) as m,
        session(m.address) as router,
    ):
        await router.hello()
        assert await cli("health", m.address) == (0, "healthy\n")
        assert await cli("health", "--live", m.address) == (0, "healthy\n")
        await router.run(spec("a", 20, max_tokens=300))
        await router.next("tokens")
        code, said = await cli("drain", "--direct", m.address, "--grace", "20")
        assert code == 0, said
        # On a machine that is busy elsewhere the command may come after the sequence's end.
        assert re.search(r"m0 drains: [01] sequences are there, 20 s at the most\nm0 has left after", said), said
        assert len(await router.tokens()) == 299
        assert await m.process.wait() == 0
        code, said = await cli("health", m.address, "--timeout", "1")
        assert (code, m.address in said) == (1, True)
        code, said = await cli("drain", "--direct", m.address)
        assert code == 1
        assert f"no worker answers at {m.address}" in said
        assert "Traceback" not in said
