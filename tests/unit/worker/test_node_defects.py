"""What raises on a node while one sequence is handled fails that sequence: no session, engine or other sequence."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc.aio
import pytest

from baton import PROTOCOL_VERSION, codec
from baton.clock import MonotonicClock
from baton.defects import Defects
from baton.errors import BatonError, InternalError, TransferFailed
from baton.node_messages import FromRouter, NodeMessage
from baton.types import NodeDescription, NodeStatus, PositionLogprobs, Role, TokenChunk, TokenLogprob
from baton.v1 import common_pb2, node_pb2, transfer_pb2, transfer_pb2_grpc
from engine.fake import expected_tokens
from kvtransfer.digest import DIGEST_NAME
from kvtransfer.encoding import IDENTITY
from kvtransfer.protocol.receiver_events import Arrived, Released
from kvtransfer.wire_codec import encoding_to_pb
from tests.support.node import (
    LAYOUT,
    VOCAB,
    Node,
    Router,
    arrive,
    fill,
    lease_for,
    running_node,
    session,
    spec,
    to_running,
)
from tests.support.transfer import LAYOUT as KV
from tests.support.transfer import Inbox, describe, pair, token
from worker.session import SessionHost

BOOM = RuntimeError("boom")
# No field of a message holds the rank.
UNSAYABLE = PositionLogprobs(TokenLogprob(1, -1.0), rank=-1)


class Raising:
    """A token that cannot be looked at."""

    logprobs = None

    @property
    def token_id(self) -> int:
        raise BOOM


async def goes_on(node: Node, router: Router) -> None:
    """The session and the engine are as they were, and nothing is held."""
    await router.run(spec("after", max_tokens=4))
    await router.until("prefills")
    await node.until(lambda: node.num_used == 0)


async def tokens_of(router: Router, name: str) -> list[int]:
    """All tokens of one sequence, whatever else comes."""
    found: list[int] = []
    async with asyncio.timeout(10.0):
        while True:
            kind, item = await router.inbox.get()
            if kind == "tokens" and item.sequence_id == name:
                found += item.token_ids
                if item.finish_reason:
                    return found


@pytest.mark.parametrize(
    "nonsense",
    [TokenChunk("bad", 0, (-1,)), TokenChunk("bad", 0, (1,), (UNSAYABLE,)), Raising()],
    ids=["id", "logprobs", "raises"],
)
@pytest.mark.parametrize("max_tokens", [1, 50])
async def test_a_token_that_cannot_be_taken_in_or_said(nonsense: Any, max_tokens: int) -> None:
    async with running_node(step_delay_s=0.005) as node, session(node.address) as router:
        await router.hello()
        node.runner.nonsense["bad"] = nonsense
        good = spec("good", max_tokens=60)
        await router.run(good)
        await router.until("tokens")
        await router.run(spec("bad", max_tokens=max_tokens))
        failed = await router.until("failed")
        assert (failed.sequence_id, failed.failure.code) == ("bad", "InternalError")
        assert (await tokens_of(router, "good"))[-1] == expected_tokens(good, LAYOUT, VOCAB)[-1]
        await goes_on(node, router)


async def test_a_push_that_cannot_be_begun_or_told() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        node.sender.error = BOOM
        await router.run(spec("a"), lease_for("a"))
        failed = await router.until("failed")
        assert (failed.failure.code, failed.failure.blamed_node_id) == ("InternalError", "")
        node.sender.error, node.sender.layer_error = None, BOOM
        await router.run(spec("b"), lease_for("b"))
        await node.until(lambda: "b" in node.sender.pushes)
        push = node.sender.pushes["b"]
        # It raised when it was attached, or in the step; then the real push misses layers at its commit.
        push.committed.add_done_callback(lambda _: push.outcome.set_result(InternalError("layer 0 was not ready")))
        assert (await router.until("failed")).sequence_id == "b"
        node.sender.layer_error = None
        await goes_on(node, router)


async def test_a_lease_that_cannot_be_granted() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        node.receiver.error = BOOM
        await router.reserve(spec("a"))
        refused = await router.next("refused")
        assert (refused.sequence_id, refused.failure.code) == ("a", "InternalError")
        assert node.num_used == 0
        node.receiver.error = None
        await to_running(node, router, spec("b", 10, max_tokens=5))
        await router.until("tokens")
        await node.until(lambda: node.num_used == 0)


async def test_a_decoded_token_that_cannot_be_said_gives_its_blocks_back() -> None:
    async with running_node(step_delay_s=0.005) as node, session(node.address) as router:
        await router.hello()
        good = spec("good", 10, max_tokens=60)
        await to_running(node, router, good)
        bad = spec("bad", 10, max_tokens=100)
        await router.reserve(bad)
        await router.until("reserved")
        node.runner.nonsense["bad"] = TokenChunk("bad", 1, (1,), (UNSAYABLE,))
        arrive(node, fill(node, bad))
        assert (await router.until("failed")).sequence_id == "bad"
        await node.until(lambda: set(node.states()) == {"good"})
        assert (await tokens_of(router, "good"))[-1] == expected_tokens(good, LAYOUT, VOCAB)[-1]
        assert node.num_used == 0


async def test_the_engine_survives_what_it_tells_others() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        node.runner.forget_error = BOOM
        for name in ("a", "b", "c"):
            sequence = spec(name)
            await router.run(sequence)
            assert await tokens_of(router, name) == expected_tokens(sequence, LAYOUT, VOCAB)
        assert node.runner.forget_error is None


class RaisingOwner:
    """Raises for the request of one sequence."""

    node = describe("n0", KV)

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.ended = 0

    def status(self) -> NodeStatus:
        return NodeStatus(Role.MIXED, False, 1, 1, 0, 0, 0, 0)

    def received(self, event: FromRouter) -> None:
        self.heard.append(event.sequence_id)
        if event.sequence_id == "bad":
            raise BOOM

    def closed(self, session: int) -> None:
        self.ended += 1

    def cache_changes(self, session: int, most: int) -> None:
        return None

    def unsendable(self, session: int, message: NodeMessage, error: Exception) -> None:
        raise AssertionError("nothing is sent")


class Context:
    async def write(self, message: Any) -> None: ...


async def test_a_request_that_nobody_foresaw_costs_no_session() -> None:
    owner = RaisingOwner()
    places: list[str] = []
    defects = Defects(logging.getLogger("test"), MonotonicClock(), places.append)
    host = SessionHost(owner, clock=MonotonicClock(), defects=defects)

    async def requests() -> Any:
        yield node_pb2.SessionRequest(hello=node_pb2.SessionHello(router_id="r", protocol_version=PROTOCOL_VERSION))
        for name in ("a", "bad", "b"):
            yield node_pb2.SessionRequest(cancel=node_pb2.Cancel(sequence_id=name))

    async with asyncio.timeout(5.0):
        await host.serve(requests(), Context())  # type: ignore[arg-type]
    assert owner.heard == ["a", "bad", "b"]
    assert (owner.ended, places) == (1, ["session"])


# -- transfer


def ready(push: Any) -> None:
    for layer in range(KV.num_layers):
        push.layer_ready(layer, 1)


async def test_a_notice_that_raises_keeps_no_other_back() -> None:
    class Raises(Inbox):
        def __call__(self, notice: Any) -> None:
            super().__call__(notice)
            if isinstance(notice, Released):
                raise BOOM

    async with pair() as p:
        inbox = p.receiver._on_event = Raises()
        p.receiver.grant("a", [1], ttl_s=30)
        p.receiver.grant("b", [2], ttl_s=30)
        p.receiver.revoke("a", "test")
        p.receiver.revoke("b", "test")
        await inbox.wait(Released, "b")
        lease = p.receiver.grant("c", [3], ttl_s=0.1)
        await inbox.wait(Released, "c")
        assert lease.epoch >> 32 == 3, "the third lease, and none was lost on the way"


async def test_one_push_that_cannot_be_sent_fails_alone() -> None:
    """Its first token cannot be encoded; the pushes beside it go through the same channel."""
    async with pair() as p:
        leases = [p.receiver.grant(name, [i], ttl_s=30) for i, name in enumerate(("a", "bad", "b"))]
        pushes = [p.sender.begin(lease, [i], num_known_tokens=3) for i, lease in enumerate(leases)]
        for push in pushes:
            ready(push)
        bad = asyncio.create_task(pushes[1].commit(token("bad", -1)))
        await pushes[0].commit(token("a"))
        with pytest.raises(BatonError, match="out of range"):
            await bad
        await pushes[2].commit(token("b"))
        assert p.inbox.of("bad") in ([], ["Released"], ["Quarantined", "Released"])
        await p.inbox.wait(Released, "bad")
        assert [p.inbox.of(name) for name in ("a", "b")] == [["Arrived"], ["Arrived"]]
        assert p.inbox.began == ["a", "bad", "b"]
        assert len(p.receiver._channels) == 1


class Liar:
    """A prefill node by hand: what it says of one sequence is nonsense."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def say(self, **message: Any) -> None:
        await self._call.write(transfer_pb2.ChannelRequest(**message))

    async def hear(self, kind: str) -> Any:
        async with asyncio.timeout(5.0):
            while True:
                message = await self._call.read()
                assert message is not grpc.aio.EOF, "the channel was ended"
                if message.WhichOneof("message") == kind:
                    return getattr(message, kind)

    async def hello(self, node: NodeDescription, digest: str) -> None:
        hello = transfer_pb2.ChannelRequest.Hello(
            node=codec.node_to_pb(node),
            transports=["tcp"],
            digest=digest,
            encodings=[encoding_to_pb(IDENTITY)],
        )
        await self.say(hello=hello)
        await self.hear("welcome")

    async def begin(self, sequence_id: str, epoch: int) -> None:
        """Over tcp it is not answered."""
        await self.say(begin=transfer_pb2.ChannelRequest.Begin(sequence_id=sequence_id, epoch=epoch))


async def test_a_malformed_commit_costs_its_lease_and_not_the_channel() -> None:
    async with pair() as p:
        address = p.receiver._node.address
        bad, other = p.receiver.grant("bad", [1], ttl_s=30), p.receiver.grant("other", [2], ttl_s=30)
        async with grpc.aio.insecure_channel(address) as channel:
            call = transfer_pb2_grpc.KvTransferStub(channel).Channel()
            liar = Liar(call)
            await liar.hello(describe("liar", KV), DIGEST_NAME)
            for lease in (bad, other):
                await liar.begin(lease.sequence_id, lease.epoch)
            nonsense = common_pb2.Tokens(sequence_id="bad", token_ids=[1], finish_reason=99)  # type: ignore[arg-type]
            commit = transfer_pb2.ChannelRequest.Commit(
                sequence_id="bad", epoch=bad.epoch, attempt=1, num_blocks=1, first_token=nonsense
            )
            await liar.say(commit=commit)
            assert (await liar.hear("revoke")).sequence_id == "bad"
            revoked = transfer_pb2.ChannelRequest.Revoked(sequence_id="bad", epoch=bad.epoch)
            await liar.say(revoked=revoked)
            await p.inbox.wait(Released, "bad")
            # Another's lease is none of its business, and the other one of its own still is.
            p.receiver.grant("foreign", [3], ttl_s=30)
            commit.sequence_id, commit.epoch = "foreign", 3
            await liar.say(commit=commit)
            await liar.say(
                abort=transfer_pb2.ChannelRequest.Abort(sequence_id="other", epoch=other.epoch, reason="done")
            )
            await p.inbox.wait(Released, "other")
            assert p.inbox.of("foreign") == []
            call.cancel()


async def test_a_take_over_that_raises_fails_the_commit_alone() -> None:
    async with pair() as p:
        p.inbox.refuse_with = BOOM
        push = p.sender.begin(p.receiver.grant("a", [1], ttl_s=30), [1], num_known_tokens=3)
        ready(push)
        with pytest.raises(TransferFailed, match="boom"):
            await push.commit(token("a"))
        await p.inbox.wait(Released, "a")
        p.inbox.refuse_with = None
        push = p.sender.begin(p.receiver.grant("b", [2], ttl_s=30), [2], num_known_tokens=3)
        ready(push)
        await push.commit(token("b"))
        await p.inbox.wait(Arrived, "b")
