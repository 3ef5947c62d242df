"""What holds for every session, whatever it carries: hello, status, errors, back-pressure, loss."""

import asyncio

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton import PROTOCOL_VERSION
from baton.errors import BadConfig, NoBlocks, Overloaded, Unavailable
from baton.node_messages import Cancel
from baton.server import GrpcServer, rich_status
from baton.types import FinishReason, PositionLogprobs, PromptLogprobs, TokenChunk, TokenLogprob
from baton.v1 import common_pb2, node_pb2
from tests.support.node import WAIT_S, lease_for, running_node, session, spec
from worker.session import Outbox, SessionConfig
from worker.session_codec import Composer, message_from_pb


async def test_hello_is_answered_with_who_and_how_busy() -> None:
    async with running_node() as node, session(node.address) as router:
        welcome = await router.hello()
        assert welcome.welcome.node.node_id == "n0"
        assert welcome.welcome.node.incarnation == 5
        assert welcome.welcome.status.total_blocks == 64
        assert welcome.status.free_blocks == 64


async def test_status_comes_at_least_every_quarter_second_idle_and_busy() -> None:
    async with running_node(step_delay_s=0.002) as node, session(node.address) as router:
        await router.hello()
        await router.silence(0.7)
        await router.run(spec("a", 9, max_tokens=150))
        await router.tokens()
        gaps = [b - a for a, b in zip(router.statuses, router.statuses[1:], strict=False)]
        assert len(gaps) >= 4
        # 0.2 s by our clock, the rest is the machine's.
        assert sorted(gaps)[len(gaps) // 2] < 0.25
        assert max(gaps) < 1.0


async def test_a_session_that_opens_wrong_is_refused_with_details() -> None:
    async with running_node() as node:
        async with session(node.address) as router:
            await router.cancel("a")
            code, details, trailing = await router.ended()
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "expected hello" in details
            assert trailing["baton-error-code"] == "InvalidRequest"
            rich = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
            info = error_details_pb2.ErrorInfo()
            assert rich.details[0].Unpack(info)
            assert (info.reason, info.domain) == ("InvalidRequest", "baton")
        async with session(node.address) as router:
            await router.hello(version=99)
            code, details, _ = await router.ended()
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert f"protocol 99, this node {PROTOCOL_VERSION}" in details
        for name in ("", "x" * 256):
            async with session(node.address) as router:
                await router.hello(router_id=name)
                code, details, trailing = await router.ended()
                assert (code, trailing["baton-error-param"]) == (grpc.StatusCode.INVALID_ARGUMENT, "router_id")
                assert f"router_id has {len(name)} characters, expected a name of 1 to 255" in details
        async with session(node.address) as router:
            await router.hello()
            await router.send(hello=node_pb2.SessionHello(router_id="r0", protocol_version=PROTOCOL_VERSION))
            assert (await router.ended())[0] is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("phase", ["PrefillNode", "DecodeNode"])
async def test_a_router_of_protocol_1_is_refused_with_both_versions(phase: str) -> None:
    """It opens a session for each phase, with the same hello."""
    async with running_node() as node, session(node.address, path=f"/baton.v1.{phase}/Session") as router:
        await router.hello(version=1)
        code, details, trailing = await router.ended()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert details == f"router r0 speaks protocol 1, this node {PROTOCOL_VERSION}"
        assert trailing["baton-error-code"] == "Incompatible"


async def test_a_silent_caller_is_dropped() -> None:
    config = SessionConfig(hello_timeout_s=0.05)
    async with running_node(session_config=config) as node, session(node.address) as router:
        assert (await router.ended())[0] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_router_that_reconnects_ends_its_first_session_and_what_ran_in_it() -> None:
    async with (
        running_node(step_delay_s=0.01) as node,
        session(node.address) as first,
        session(node.address) as other,
        session(node.address) as second,
    ):
        await first.hello("r0")
        await other.hello("r1")
        await first.run(spec("a", max_tokens=100))
        await other.run(spec("b", max_tokens=100))
        await first.next("tokens")
        await other.next("tokens")
        await second.hello("r0")
        code, details, _ = await first.ended()
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "new session" in details
        await node.until(lambda: set(node.states()) == {"b"})
        await other.next("prefills")
        await other.next("tokens")


async def test_so_many_routers_and_no_more_have_a_session() -> None:
    async with (
        running_node(session_config=SessionConfig(max_sessions=2)) as node,
        session(node.address) as first,
        session(node.address) as second,
        session(node.address) as third,
    ):
        await first.hello("r0")
        await second.hello("r1")
        await third.hello("r2")
        code, details, trailing = await third.ended()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 routers have a session with this node, the limit" in details
        assert trailing["baton-error-code"] == "Overloaded"
        # The others go on, and one that leaves makes room.
        await first.run(spec("a", max_tokens=3))
        assert len(await first.tokens()) == 3
        second.drop()
        await node.until(lambda: len(node.service.sessions.numbers) == 1)
        async with session(node.address) as again:
            assert (await again.hello("r2")).HasField("welcome")


async def test_what_a_router_says_is_bounded_before_it_is_kept() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        long = spec("x" * 255)
        await router.run(long)
        assert (await router.until("tokens")).sequence_id == long.sequence_id
        sampling = common_pb2.SamplingParams(max_tokens=1, seed=1)
        sequence = common_pb2.Sequence(sequence_id="x" * 256, prompt_token_ids=[1], sampling=sampling)
        lease = common_pb2.Lease(sequence_id="y" * 256, ttl_s=1.0)
        await router.send(run=node_pb2.SessionRequest.Run(sequence=sequence))
        failure = (await router.until("failed")).failure
        assert failure.code == "InvalidRequest"
        assert "sequence_id is '256 characters', expected 1 to 255" in failure.message
        await router.send(reserve=node_pb2.SessionRequest.Reserve(sequence=sequence))
        assert "256 characters" in (await router.until("refused")).failure.message
        await router.send(migrate=node_pb2.Migrate(sequence_id="z", lease=lease))
        assert "256 characters" in (await router.until("not_migrated")).failure.message
        lease = common_pb2.Lease(sequence_id="z", ttl_s=1.0, address="a" * 256)
        await router.send(migrate=node_pb2.Migrate(sequence_id="z", lease=lease))
        failure = (await router.until("not_migrated")).failure
        assert "address has 256 characters, expected at most 255" in failure.message
        cancel = node_pb2.SessionRequest(cancel=node_pb2.Cancel(sequence_id="z", reason="r" * 5000))
        heard = message_from_pb(cancel)
        assert isinstance(heard, Cancel)
        assert len(heard.reason) < 400


async def test_goodbye_ends_the_session_in_good_order() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        await router._call.done_writing()
        async with asyncio.timeout(WAIT_S):
            assert await router._call.code() is grpc.StatusCode.OK


async def test_a_router_that_does_not_read_loses_its_session_not_the_node() -> None:
    config = SessionConfig(max_outbox_items=50, write_timeout_s=0.3, max_message_items=10)
    async with running_node(session_config=config) as node, session(node.address, reads=False) as router:
        await router.send(hello=node_pb2.SessionHello(router_id="r0", protocol_version=PROTOCOL_VERSION))
        # Nothing is read: answers pile up until flow control stops the stream, then the node gives the session up. It
        # cannot report it, for its last message would have to pass the same full stream.
        try:
            async with asyncio.timeout(5.0):
                for number in range(3000):
                    # Refused, for its length, with its id.
                    long = common_pb2.Sequence(sequence_id=f"{'y' * 5000}{number}")
                    await router.send(run=node_pb2.SessionRequest.Run(sequence=long))
                    if number == 100:
                        await node.until(lambda: bool(node.service.sessions.numbers))
                    if number > 100 and not node.service.sessions.numbers:
                        break
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        await node.until(lambda: not node.service.sessions.numbers)
        assert node.service.num_sequences == 0
        async with session(node.address) as healthy:
            await healthy.hello()
            await healthy.run(spec("a", max_tokens=2))
            assert len(await healthy.tokens()) == 2


async def test_outbox_is_bounded_and_batches() -> None:
    outbox = Outbox(3)
    for number in range(3):
        outbox.put(number)
    assert await outbox.take(2, 1.0) == [0, 1]
    assert await outbox.take(2, 1.0) == [2]
    assert await outbox.take(2, 0.0) == []
    for number in range(4):
        outbox.put(number)
    with pytest.raises(Overloaded, match="3 messages wait"):
        await outbox.take(2, 1.0)
    calm = Outbox(3)
    calm.put(1)
    calm.close()
    calm.put(2)
    calm.close(Unavailable("too late to matter"))
    assert await calm.take(2, 1.0) == [1]
    assert await calm.take(2, 1.0) is None


async def test_what_was_scored_of_prompts_counts_by_the_position() -> None:
    outbox = Outbox(64)
    scored = [PromptLogprobs("a", 1 + 20 * i, (PositionLogprobs(TokenLogprob(1, -0.5), 1),) * 20) for i in range(4)]
    for message in scored[:3]:
        outbox.put(message)
    assert await outbox.take(30, 1.0) == scored[:2], "no more than it takes to reach the limit"
    assert await outbox.take(30, 1.0) == scored[2:3]
    for message in scored:
        outbox.put(message)
    outbox.put(1)
    with pytest.raises(Overloaded, match="80 messages wait"):
        await outbox.take(2, 1.0)


def test_chunks_of_one_message_are_merged_by_sequence() -> None:
    composer = Composer()
    composer.add(TokenChunk("a", 0, (1,)))
    composer.add(TokenChunk("b", 5, (9,)))
    composer.add(TokenChunk("a", 1, (2,)))
    composer.add(TokenChunk("a", 2, (3,), finish_reason=FinishReason.STOP))
    messages = composer.response().tokens
    found = [(m.sequence_id, m.index, list(m.token_ids), m.finish_reason) for m in messages]
    assert found == [("a", 0, [1, 2, 3], 1), ("b", 5, [9], 0)]


async def test_health_reflection_and_a_taken_port() -> None:
    async with running_node() as node, grpc.aio.insecure_channel(node.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "baton.v1.Node"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await node.server.set_serving(False)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=""))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        second = GrpcServer()
        with pytest.raises(BadConfig, match="cannot listen"):
            second.bind(node.address)
        with pytest.raises(BadConfig, match="expected host:port"):
            second.bind("nonsense")
        await second.stop(0)


async def test_a_message_over_the_limit_is_refused() -> None:
    async with running_node() as node, session(node.address) as router:
        await router.hello()
        await router.send(cancel=node_pb2.Cancel(sequence_id="x" * (17 * 1024 * 1024)))
        assert (await router.ended())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        await node.until(lambda: not node.service.sessions.numbers)


def test_rich_status_carries_param_and_retry() -> None:
    status = rich_status(NoBlocks("none", param="prompt", retry_after_s=1.5))
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert dict(info.metadata) == {"param": "prompt", "retryable": "true"}
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


async def test_lease_for_another_node_needs_no_session_elsewhere() -> None:
    # Two sessions of different routers share one engine and do not disturb each other.
    async with (
        running_node() as node,
        session(node.address) as one,
        session(node.address) as two,
    ):
        await one.hello("r0")
        await two.hello("r1")
        await one.run(spec("a"), lease_for("a"))
        await two.reserve(spec("b"))
        assert (await two.next("reserved")).sequence_id == "b"
        await one.next("tokens")
        await node.until(lambda: node.states() == {"a": "sending", "b": "leased"})
