"""Workers as processes: what remains when one is killed, and how one stops.

Rows of the table of known failures: 2 prefill dies in mid-transfer, 3 decode dies, 13 health is about oneself,
15 a replacement on the same address.
"""

import asyncio
import re
import sys
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton import codec
from baton.types import Role
from engine.fake import expected_tokens
from tests.support.node import session, spec
from tests.support.relay import CHILD, LAYOUT, ProcessWorker, process_worker, worker
from tests.support.root import ROOT


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
        await p.kill()
        failed = await decode.next("failed")
        assert (failed.failure.code, failed.failure.blamed_node_id) == ("TransferFailed", "p0")
        await d.until_ledger({}, 5.0)
        async with grpc.aio.insecure_channel(d.address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


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
        await d.kill()
        failed = await prefill.next("failed")
        assert (failed.failure.retryable, failed.failure.blamed_node_id) == (True, "d0")
        await p.until_ledger({}, 5.0)


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
                await prefill.run(sequence, stale)
                item = await prefill.until("failed")
                assert (item.failure.retryable, item.failure.blamed_node_id) == (True, "d0")
                await p.until_ledger({}, 5.0)
                fresh = spec("b", 40, max_tokens=5)
                await decode.reserve(fresh, 60.0, "p0")
                await prefill.run(fresh, codec.lease_from_pb(await decode.next("reserved")))
                first = await prefill.next("tokens")
                await decode.next("joined")
                assert [*first.token_ids, *await decode.tokens()] == expected_tokens(fresh, LAYOUT, 1000)
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
