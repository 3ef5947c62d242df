"""Moves of running sequences out of a node, over a real stream and a real engine thread, with a push that the test
steers."""

import asyncio
from typing import Any

import pytest

from baton import codec
from baton.errors import NodeLost
from baton.types import SequenceSpec
from baton.v1 import node_pb2
from engine.fake import expected_tokens
from tests.support.node import (
    LAYOUT,
    VOCAB,
    WAIT_S,
    Node,
    Router,
    SteeredPush,
    lease_for,
    running_node,
    session,
    spec,
    to_running,
)

LONG = spec("a", 9, max_tokens=120)
WHOLE = expected_tokens(LONG, LAYOUT, VOCAB)


class Heard:
    """What a router hears of one sequence: tokens in order, and the other items."""

    def __init__(self, router: Router, num_tokens: int = 0) -> None:
        self._router = router
        self.num_tokens = num_tokens
        self.is_over = False

    async def until(self, *kinds: str) -> tuple[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while True:
                kind, item = await self._router.inbox.get()
                if kind == "tokens":
                    assert item.index == self.num_tokens, "a token was lost or came twice"
                    self.num_tokens += len(item.token_ids)
                    assert list(item.token_ids) == WHOLE[item.index : self.num_tokens]
                    self.is_over = bool(item.finish_reason)
                if kind in kinds:
                    return kind, item

    async def some_more(self, count: int = 4) -> None:
        want = self.num_tokens + count
        while self.num_tokens < want:
            await self.until("tokens")

    async def to_the_end(self) -> None:
        while not self.is_over:
            await self.until("tokens")
        assert self.num_tokens == len(WHOLE)


async def decoding(node: Node, router: Router, is_transferred: bool, sequence: SequenceSpec = LONG) -> Heard:
    """A sequence that decodes there: after a transfer, or since its prompt."""
    await router.hello()
    if is_transferred:
        await to_running(node, router, sequence)
        return Heard(router, 1)
    await router.run(sequence)
    return Heard(router)


async def migrate(node: Node, router: Router) -> SteeredPush:
    lease = codec.lease_to_pb(lease_for("a"))
    lease.block_ids.extend(range(4, 40))
    await router.send(migrate=node_pb2.Migrate(sequence_id="a", lease=lease))
    async with asyncio.timeout(WAIT_S):
        return await node.sender.begun.get()


@pytest.mark.parametrize("is_transferred", [False, True])
async def test_its_full_blocks_are_told_as_it_goes_on_then_it_stops_for_the_rest(is_transferred: bool) -> None:
    async with running_node(step_delay_s=0.002) as node, session(node.address) as router:
        heard = await decoding(node, router, is_transferred)
        await heard.some_more(9)
        push = await migrate(node, router)
        first = push.told[-1][1]
        assert first >= 4, "those that are full are told at once"
        await heard.some_more(9)
        assert push.told[-1][1] > first, "and each when it becomes full"
        assert push.told[-1][1] * LAYOUT.block_tokens <= 9 + heard.num_tokens
        assert not push.committed.done()
        push.caught_up()
        async with asyncio.timeout(WAIT_S):
            tokens = await push.committed
        assert [*WHOLE[: tokens.index], *tokens.token_ids] == WHOLE[: tokens.index + len(tokens.token_ids)]
        num_known = tokens.index + len(tokens.token_ids)
        assert push.num_committed == LAYOUT.blocks_for(9 + num_known - 1)
        assert push.told[-LAYOUT.num_layers :] == [(i, push.num_committed) for i in range(LAYOUT.num_layers)]
        while heard.num_tokens < num_known:
            await heard.until("tokens")
        await router.silence(0.05)
        assert node.states() == {"a": "sending"}
        push.outcome.set_result(None)
        await heard.until("handed_off")
        assert node.num_used == node.service.num_sequences == 0


@pytest.mark.parametrize("is_told_to_stop", [False, True])
@pytest.mark.parametrize("is_transferred", [False, True])
async def test_a_move_that_breaks_leaves_it_running_and_it_may_move_again(
    is_transferred: bool, is_told_to_stop: bool
) -> None:
    async with running_node(step_delay_s=0.002) as node, session(node.address) as router:
        heard = await decoding(node, router, is_transferred)
        await heard.some_more()
        for _ in range(2):
            push = await migrate(node, router)
            push.quiet.clear()
            if is_told_to_stop:
                push.caught_up()
                async with asyncio.timeout(WAIT_S):
                    await push.committed
            push.outcome.set_result(NodeLost("the target was killed"))
            async with asyncio.timeout(WAIT_S):
                await push.aborted
            if not is_told_to_stop:
                await heard.some_more()
            push.quiet.set()
            _, item = await heard.until("not_migrated")
            assert (item.failure.code, item.failure.blamed_node_id) == ("NodeLost", "other")
            assert node.states() == {"a": "running"}
            await heard.some_more()
        await heard.to_the_end()
        assert node.num_used == node.service.num_sequences == 0


@pytest.mark.parametrize("is_told_to_stop", [False, True])
async def test_cancel_in_the_middle_of_a_move(is_told_to_stop: bool) -> None:
    async with running_node(step_delay_s=0.002) as node, session(node.address) as router:
        heard = await decoding(node, router, is_transferred=True)
        await heard.some_more()
        push = await migrate(node, router)
        push.quiet.clear()
        if is_told_to_stop:
            push.caught_up()
        await router.cancel("a")
        async with asyncio.timeout(WAIT_S):
            await push.aborted
        assert node.num_used > 0, "it may be read until the abort has returned"
        push.quiet.set()
        await node.until(lambda: node.num_used == 0)
        assert node.service.num_sequences == 0


async def test_its_end_comes_before_its_move_does() -> None:
    async with running_node(step_delay_s=0.002) as node, session(node.address) as router:
        heard = await decoding(node, router, is_transferred=True)
        push = await migrate(node, router)
        await heard.to_the_end()
        async with asyncio.timeout(WAIT_S):
            await push.aborted
        await node.until(lambda: node.num_used == 0)
        assert node.service.num_sequences == 0


async def test_what_cannot_be_pushed_stays() -> None:
    async with running_node(step_delay_s=0.002) as node, session(node.address) as router:
        heard = await decoding(node, router, is_transferred=True)
        node.sender.error = NodeLost("no connection")
        lease = codec.lease_to_pb(lease_for("a"))
        await router.send(migrate=node_pb2.Migrate(sequence_id="a", lease=lease))
        _, item = await heard.until("not_migrated")
        assert item.failure.code == "NodeLost"
        await heard.to_the_end()
        assert node.num_used == 0


async def test_a_node_that_drains_lets_a_move_out_end() -> None:
    async with running_node(step_delay_s=0.002) as node, session(node.address) as router:
        heard = await decoding(node, router, is_transferred=True)
        node.replica.drain()
        push = await migrate(node, router)
        push.caught_up()
        async with asyncio.timeout(WAIT_S):
            await push.committed
        push.outcome.set_result(None)
        await heard.until("handed_off")
        async with asyncio.timeout(WAIT_S):
            await node.service.drained()
