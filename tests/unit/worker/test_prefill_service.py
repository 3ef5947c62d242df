"""PrefillNode over a real stream and a real engine thread, with a push that the test steers."""

import asyncio
from dataclasses import replace

import pytest

from baton.errors import Incompatible, NodeLost
from baton.types import TokenChunk
from baton.v1 import common_pb2, node_pb2
from engine.fake import expected_tokens
from prefill_node.machine import Phase
from tests.support.figures import figure
from tests.support.node import LAYOUT, VOCAB, WAIT_S, SteeredPush, lease_for, running_node, session, spec


async def test_without_a_lease_every_token_comes_from_here() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        for number in range(4):
            await router.run(spec(f"s{number}", 3 + number * 5, max_tokens=9))
        found: dict[str, list[int]] = {}
        done = 0
        while done < 4:
            async with asyncio.timeout(WAIT_S):
                kind, item = await router.inbox.get()
            if kind == "tokens":
                assert item.index == len(found.setdefault(item.sequence_id, []))
                found[item.sequence_id] += item.token_ids
                done += bool(item.finish_reason)
            else:
                assert kind == "prefills"
                assert item.num_computed_tokens == 3 + int(item.sequence_id[1:]) * 5
        assert found == {
            f"s{n}": expected_tokens(spec(f"s{n}", 3 + n * 5, max_tokens=9), LAYOUT, VOCAB) for n in range(4)
        }
        assert node.num_used == 0


async def test_logprobs_and_resumed_tokens_pass_through() -> None:
    async with running_node(step_delay_s=0.02) as node, session(node.address) as router:
        await router.hello()
        fresh = spec("a", 7, max_tokens=8, logprobs=2)
        whole = expected_tokens(fresh, LAYOUT, VOCAB)
        resumed = type(fresh)("a", fresh.prompt_token_ids, fresh.sampling, tuple(whole[:3]))
        await router.run(resumed)
        first = await router.next("tokens")
        assert first.index == 3
        assert len(first.logprobs[0].top) == 2
        assert first.logprobs[0].chosen.token_id == whole[3]
        await router.next("prefills")
        assert [*first.token_ids, *await router.tokens()] == whole[3:]


async def test_handed_off_blocks_are_held_until_the_commit() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        await router.run(spec("a", 9), lease_for("a"))
        tokens = await router.next("tokens")
        assert list(tokens.token_ids) == expected_tokens(spec("a", 9), LAYOUT, VOCAB)[:1]
        assert (await router.next("prefills")).compute_s > 0
        push = node.sender.pushes["a"]
        assert await push.committed == TokenChunk("a", 0, tuple(tokens.token_ids))
        assert sorted(push.told)[-1] == (1, 3)
        assert {layer for layer, count in push.told if count == 3} == {0, 1}
        assert node.states() == {"a": "sending"}
        await router.silence(0.05)
        push.outcome.set_result(None)
        handed = await router.next("handed_off")
        assert (handed.sequence_id, handed.report.transport) == ("a", "fake")
        assert node.num_used == 0


@pytest.mark.parametrize("how", ["stop", "length"])
@pytest.mark.parametrize("handed_off", [True, False])
async def test_the_first_token_can_end_the_request(how: str, handed_off: bool) -> None:
    first = expected_tokens(spec("a", 9), LAYOUT, VOCAB)[0]
    sequence = spec("a", 9, stop_token_ids=(first,)) if how == "stop" else spec("a", 9, max_tokens=1)
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        await router.run(sequence, lease_for("a") if handed_off else None)
        tokens = await router.next("tokens")
        assert list(tokens.token_ids) == [first]
        assert tokens.finish_reason == (
            common_pb2.FINISH_REASON_STOP if how == "stop" else common_pb2.FINISH_REASON_LENGTH
        )
        await router.next("prefills")
        if handed_off:
            assert "ended the request" in await node.sender.pushes["a"].aborted
            assert not node.sender.pushes["a"].committed.done()
        await node.until(lambda: node.num_used == 0 and not node.service.num_sequences)


@pytest.mark.parametrize("leave", ["cancel", "twice", "drop"])
@pytest.mark.parametrize("phase", ["queued", "computing", "committing", "staying"])
async def test_leaving_in_every_phase(phase: str, leave: str) -> None:
    """Blocks stay until the push is quiet, then the ledger is at its baseline; nothing more is heard."""
    async with running_node(step_delay_s=0.02) as node:
        async with session(node.address) as router:
            await router.hello()
            push: SteeredPush | None = None
            if phase == "queued":
                # The pool is taken: a must wait.
                for name in ("x", "y"):
                    await router.run(spec(name, 124, max_tokens=4), lease_for(name))
                await node.until(lambda: set(node.sender.pushes) == {"x", "y"})
                await router.run(spec("a", 100), lease_for("a"))
                await node.until(lambda: node.service.num_sequences == 3)
            elif phase == "staying":
                await router.run(spec("a", 9, max_tokens=150))
                await router.next("tokens")
            else:
                await router.run(spec("a", 150 if phase == "computing" else 9), lease_for("a"))
                async with asyncio.timeout(WAIT_S):
                    push = await node.sender.begun.get()
                    push.quiet.clear()
                    if phase == "committing":
                        await push.committed
                        await router.next("tokens")
                        await router.next("prefills")
            if leave == "drop":
                router.drop()
            else:
                for _ in range(1 + (leave == "twice")):
                    await router.cancel("a")
            if push is not None:
                async with asyncio.timeout(WAIT_S):
                    await push.aborted
                await asyncio.sleep(0.05)
                assert node.states() == {"a": "sending"}, "a writer may still read"
                push.quiet.set()
            await node.until(lambda: "a" not in node.states() and node.service._prefill_machine.phase_of("a") is None)
            if leave != "drop" and phase != "staying":
                await router.cancel("x")
                await router.cancel("y")
                await node.until(lambda: node.num_used == 0)
                assert all(item[1].sequence_id != "a" for item in router.inbox._queue)  # type: ignore[attr-defined]
        await node.until(lambda: node.num_used == 0 and node.service.num_sequences == 0)


async def test_7_a_prompt_of_32k_tokens_is_not_computed_on_for_a_client_that_left() -> None:
    long = replace(spec("long"), prompt_token_ids=tuple(1 + i % 900 for i in range(32_768)))
    num_chunks = 64
    async with (
        running_node(step_delay_s=0.02, num_blocks=9000, max_model_tokens=33_000, max_batch_tokens=512) as node,
        session(node.address) as router,
    ):
        await router.hello()
        await router.run(long, lease_for("long"))
        await node.until(lambda: node.runner.num_steps >= 2)
        left_s = asyncio.get_running_loop().time()
        await router.cancel("long")
        gone = (Phase.ABORTING, None)
        await node.until(lambda: node.service._prefill_machine.phase_of("long") in gone)
        num_steps = node.runner.num_steps
        assert num_steps < num_chunks, "it was computed to its end: this test has shown nothing"
        await node.until(lambda: node.num_used == 0)
        figure(7, "cancel of a prompt of 32k tokens to all blocks free", asyncio.get_running_loop().time() - left_s)
        assert node.runner.num_steps <= num_steps + 1, "the step that ran, and no other"
        asked_s = asyncio.get_running_loop().time()
        await router.run(spec("next", 5, max_tokens=1))
        assert await router.tokens() == expected_tokens(spec("next", 5, max_tokens=1), LAYOUT, VOCAB)
        figure(7, "the next request's first token", asyncio.get_running_loop().time() - asked_s)


async def test_7_cancel_stops_a_long_prompt_within_one_chunk() -> None:
    async with running_node(step_delay_s=0.03) as node, session(node.address) as router:
        await router.hello()
        await router.run(spec("long", 190), lease_for("long"))
        await node.until(lambda: node.runner.num_steps >= 2)
        await router.cancel("long")
        await node.until(lambda: node.num_used == 0)
        assert node.runner.num_steps <= 4, "12 chunks would be the whole prompt"
        await router.run(spec("next", 5, max_tokens=1))
        assert len(await router.tokens()) == 1


@pytest.mark.parametrize("phase", ["computing", "committing"])
async def test_a_dead_decode_node_is_blamed_at_once(phase: str) -> None:
    async with running_node(step_delay_s=0.02) as node, session(node.address) as router:
        await router.hello()
        await router.run(spec("a", 9 if phase == "committing" else 150), lease_for("a"))
        async with asyncio.timeout(WAIT_S):
            push = await node.sender.begun.get()
            if phase == "committing":
                await push.committed
                await router.next("tokens")
                await router.next("prefills")
        push.outcome.set_result(NodeLost("other is gone"))
        failed = await router.next("failed")
        assert (failed.failure.code, failed.failure.retryable) == ("NodeLost", True)
        assert failed.failure.blamed_node_id == "other"
        await node.until(lambda: node.num_used == 0)
        assert node.runner.num_steps < 12


async def test_a_push_that_cannot_begin_and_a_step_that_fails() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        node.sender.error = Incompatible("fingerprint is a here and b there")
        await router.run(spec("a"), lease_for("a"))
        failed = await router.next("failed")
        assert (failed.failure.code, failed.failure.blamed_node_id) == ("Incompatible", "other")
        node.sender.error = None
        await node.until(lambda: node.num_used == 0)
        node.runner.next_error = RuntimeError("boom")
        await router.run(spec("b"), lease_for("b"))
        failed = await router.next("failed")
        assert "RuntimeError: boom" in failed.failure.message
        assert failed.failure.blamed_node_id == ""
        await router.run(spec("c", max_tokens=2))
        assert len(await router.tokens()) == 2
        await node.until(lambda: node.num_used == 0)


async def test_what_cannot_be_served_is_refused_and_the_session_lives() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        await router.run(spec("long", 195, max_tokens=6))
        failed = await router.next("failed")
        assert failed.failure.code == "PromptTooLong"
        assert "201" in failed.failure.message
        await router.run(spec("ids", 5, stop_token_ids=(VOCAB,)))
        assert (await router.next("failed")).failure.code == "InvalidRequest"
        bad = common_pb2.Sequence(sequence_id="bad", prompt_token_ids=[1])
        await router.send(run=node_pb2.SessionRequest.Run(sequence=bad))
        failed = await router.next("failed")
        assert (failed.sequence_id, failed.failure.code) == ("bad", "InvalidRequest")
        await router.cancel("never heard of")
        await router.run(spec("ok", max_tokens=2))
        assert len(await router.tokens()) == 2


async def test_draining_refuses_and_says_so() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        node.replica.drain()
        await router.run(spec("a"))
        failed = await router.next("failed")
        assert (failed.failure.code, failed.failure.retryable) == ("Draining", True)
        await node.until(lambda: router.messages[-1].status.draining)
