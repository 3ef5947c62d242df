"""DecodeNode over a real stream and a real engine thread, with a receiver that the test steers."""

import asyncio

import pytest

from baton.errors import InvalidRequest, TransferFailed
from baton.types import TokenChunk
from engine.fake import expected_tokens
from kvtransfer.protocol.receiver_events import Quarantined, Released
from tests.support.node import LAYOUT, VOCAB, arrive, fill, running_node, session, spec, to_running


async def test_reserve_arrive_and_decode_to_the_end() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        sequence = spec("a", 10, max_tokens=9)
        await router.reserve(sequence, ttl_s=7.0)
        lease = await router.next("reserved")
        assert (list(lease.block_ids), lease.ttl_s) == ([0, 1, 2], 7.0)
        assert node.states() == {"a": "leased"}
        assert node.replica.ledger()[2][0].epoch == lease.epoch
        arrive(node, fill(node, sequence))
        joined = await router.next("joined")
        assert joined.wait_s > 0
        assert await router.tokens() == expected_tokens(sequence, LAYOUT, VOCAB)[1:]
        assert node.num_used == 0


async def test_the_lease_time_is_within_limits() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        for number, asked_s in enumerate((0.0, 5.0, 1e9)):
            await router.reserve(spec(f"s{number}"), ttl_s=asked_s)
            await router.next("reserved")
        assert node.receiver.ttls_s == [30.0, 5.0, 600.0]


async def test_a_full_pool_refuses_and_takes_again() -> None:
    async with running_node(num_blocks=8) as node, session(node.address) as router:
        await router.hello()
        await router.reserve(spec("a", 20))
        await router.next("reserved")
        await router.reserve(spec("b", 20))
        refused = await router.next("refused")
        assert (refused.failure.code, refused.failure.retryable) == ("NoBlocks", True)
        await router.reserve(spec("c", 28))
        refused = await router.next("refused")
        assert (refused.failure.code, refused.failure.retryable) == ("PromptTooLong", False)
        await router.cancel("a")
        assert await node.receiver.revoked.get() == "a"
        node.service.on_lease(Released("a", 1, "revoked"))
        await router.reserve(spec("b", 20))
        assert (await router.next("reserved")).sequence_id == "b"


@pytest.mark.parametrize("leave", ["cancel", "twice", "drop"])
@pytest.mark.parametrize("phase", ["leased", "running", "generating"])
async def test_leaving_in_every_phase(phase: str, leave: str) -> None:
    async with running_node(step_delay_s=0.01) as node, session(node.address) as router:
        await router.hello()
        sequence = spec("a", 10, max_tokens=150)
        if phase == "leased":
            await router.reserve(sequence)
            await router.next("reserved")
        else:
            await to_running(node, router, sequence)
            if phase == "generating":
                await router.next("tokens")
        if leave == "drop":
            router.drop()
        else:
            for _ in range(1 + (leave == "twice")):
                await router.cancel("a")
        if phase == "leased":
            async with asyncio.timeout(5):
                assert await node.receiver.revoked.get() == "a"
            assert node.receiver.revoked.empty()
            assert node.states() == {"a": "leased"}, "a writer may still come"
            node.service.on_lease(Quarantined("a", 1, "revoked"))
            assert node.states() == {"a": "quarantined"}
            with pytest.raises(TransferFailed, match="not expected"):
                arrive(node, TokenChunk("a", 0, (1,)))
            node.service.on_lease(Released("a", 1, "revoked"))
        await node.until(lambda: node.num_used == 0 and node.service.num_sequences == 0)
        for late in (Quarantined("a", 1, "late"), Released("a", 1, "late")):
            node.service.on_lease(late)
        assert node.num_used == 0


async def test_an_expired_lease_is_told_before_its_blocks_are_free() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        await router.reserve(spec("a", 10), prefill_node_id="p7")
        await router.next("reserved")
        node.service.on_lease(Quarantined("a", 1, "lease expired"))
        failed = await router.next("failed")
        assert (failed.failure.code, failed.failure.blamed_node_id) == ("TransferFailed", "p7")
        assert node.states() == {"a": "quarantined"}
        node.service.on_lease(Released("a", 1, "lease expired"))
        assert node.num_used == 0
        await router.silence(0.05)


async def test_a_first_token_that_does_not_fit_is_refused() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        await router.reserve(spec("a", 10))
        await router.next("reserved")
        with pytest.raises(InvalidRequest, match="index 4"):
            arrive(node, TokenChunk("a", 4, (1,)))
        assert (await router.next("failed")).failure.code == "InvalidRequest"
        node.service.on_lease(Released("a", 1, "refused"))
        assert node.num_used == 0
        await router.silence(0.05)


async def test_a_failed_step_is_told_and_others_go_on() -> None:
    async with running_node(step_delay_s=0.01) as node, session(node.address) as router:
        await router.hello()
        await to_running(node, router, spec("a", 10, max_tokens=100))
        await router.next("tokens")
        node.runner.next_error = RuntimeError("boom")
        while True:
            async with asyncio.timeout(5):
                kind, item = await router.inbox.get()
            if kind != "tokens":
                break
        assert kind == "failed"
        assert "boom" in item.failure.message
        assert node.num_used == 0
        sequence = spec("b", 10)
        await to_running(node, router, sequence)
        assert await router.tokens() == expected_tokens(sequence, LAYOUT, VOCAB)[1:]


async def test_preemption_under_memory_pressure_changes_no_token() -> None:
    async with running_node(num_blocks=14) as node, session(node.address) as router:
        await router.hello()
        sequences = [spec(f"s{n}", 9 + n, max_tokens=30) for n in range(4)]
        for sequence in sequences:
            await router.reserve(sequence)
            await router.next("reserved")
        found: dict[str, list[int]] = {}
        for sequence in sequences:
            first = fill(node, sequence)
            found[sequence.sequence_id] = list(first.token_ids)
            arrive(node, first)
        done = 0
        while done < 4:
            async with asyncio.timeout(5):
                kind, item = await router.inbox.get()
            if kind == "tokens":
                assert item.index == len(found[item.sequence_id])
                found[item.sequence_id] += item.token_ids
                done += bool(item.finish_reason)
        assert node.replica.stats().num_preempted > 0
        assert found == {s.sequence_id: expected_tokens(s, LAYOUT, VOCAB) for s in sequences}
        assert node.num_used == 0
