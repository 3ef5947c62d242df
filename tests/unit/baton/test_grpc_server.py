"""gRPC ports of every process against peers that speak wrongly, say nothing, or are too many."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from baton import codec
from baton.server import GrpcServer, ServerLimits
from baton.v1 import router_pb2, router_pb2_grpc, transfer_pb2, transfer_pb2_grpc
from kvtransfer.encoding import IDENTITY
from kvtransfer.wire_codec import encoding_to_pb
from router.face.grpc import SERVICE_NAME
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, router_beside, write_model_folder
from tests.support.transfer import LAYOUT, describe, pair

GARBAGE = b"\xff\xff\xff"


class Echo(router_pb2_grpc.RouterServicer):
    async def Status(self, request: Any, context: Any) -> router_pb2.StatusResponse:  # type: ignore[override]  # noqa: N802
        return router_pb2.StatusResponse(router_id="here")


@contextlib.asynccontextmanager
async def echo(limits: ServerLimits) -> AsyncIterator[str]:
    server = GrpcServer(limits)
    server.add(router_pb2_grpc.add_RouterServicer_to_server, Echo(), SERVICE_NAME)
    address = server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


async def status(address: str) -> str:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        answer: router_pb2.StatusResponse = await stub.Status(router_pb2.StatusRequest(), timeout=5)
        return answer.router_id


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING or r.exc_info] == []
    return [r.getMessage() for r in caplog.records if "is refused" in r.getMessage()]


async def code_of(call: Any) -> grpc.StatusCode:
    """How the call ends, whatever it answered before."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            async for _ in call:
                pass
    code: grpc.StatusCode = await call.code()
    return code


async def test_malformed_messages_to_a_router(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = write_model_folder(tmp_path / "tiny")
    async with FakeCluster(FakeConfig(vocab_size=VOCAB_SIZE), mixed=1) as cluster:
        for keys in ((), ("secret",)):
            async with (
                router_beside(cluster, model_folder=folder, api_keys=keys) as router,
                grpc.aio.insecure_channel(router.grpc or "") as channel,
            ):
                caplog.clear()
                metadata = [("authorization", f"Bearer {key}") for key in keys]
                unary = channel.unary_unary("/baton.v1.Router/Status")
                stream = channel.unary_stream("/baton.v1.Router/Generate")
                assert await code_of(unary(GARBAGE, metadata=metadata)) is grpc.StatusCode.INVALID_ARGUMENT
                assert await code_of(stream(GARBAGE, metadata=metadata)) is grpc.StatusCode.INVALID_ARGUMENT
                if keys:
                    assert await code_of(stream(GARBAGE)) is grpc.StatusCode.UNAUTHENTICATED
                assert len(lines(caplog)) == 2
                assert router.metrics.malformed.value == 2


def hello() -> bytes:
    node = codec.node_to_pb(describe("prefill-9", LAYOUT))
    message = transfer_pb2.ChannelRequest.Hello(
        node=node, transports=["tcp"], digest="xxh3_128/512k", encodings=[encoding_to_pb(IDENTITY)]
    )
    return transfer_pb2.ChannelRequest(hello=message).SerializeToString()


@pytest.mark.parametrize("greets", [False, True])
async def test_malformed_messages_to_a_transfer_channel(greets: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    num_malformed = 0

    def count() -> None:
        nonlocal num_malformed
        num_malformed += 1

    async with pair() as p:
        server = GrpcServer(on_malformed=count)
        service = "baton.v1.KvTransfer"
        server.add(transfer_pb2_grpc.add_KvTransferServicer_to_server, p.receiver, service)
        address = server.bind("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            for _ in range(10):

                async def messages() -> AsyncIterator[bytes]:
                    if greets:
                        yield hello()
                    yield GARBAGE
                    await asyncio.sleep(10)

                call = channel.stream_stream(f"/{service}/Channel")(messages())
                assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT
        await server.stop(0)
    assert len(lines(caplog)) == 10
    assert num_malformed == 10


async def test_a_writer_that_is_in_the_middle_ends_the_channel_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A message that is wrong in itself, right after the greeting: the welcome may still be on its way."""
    async with pair() as p, grpc.aio.insecure_channel(p.address) as channel:
        for _ in range(10):
            call = channel.stream_stream("/baton.v1.KvTransfer/Channel")(iter([hello(), hello()]))
            assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT
    lines(caplog)


async def test_silent_connections_are_closed() -> None:
    async with echo(ServerLimits(handshake_timeout_s=1.0)) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(10):
            while await reader.read(1024):
                pass
        writer.close()
        assert await status(address) == "here"


async def test_connections_are_bounded_and_come_free_again() -> None:
    async with echo(ServerLimits(handshake_timeout_s=1.0, max_connections=8)) as address:
        host, port = address.split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(40)]
        async with asyncio.timeout(20):
            while True:
                try:
                    assert await status(address) == "here"
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.2)
        for sock in silent:
            sock.close()


async def test_metadata_is_bounded() -> None:
    async with echo(ServerLimits()) as address, grpc.aio.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        call = stub.Status(router_pb2.StatusRequest(), metadata=[("x-large", "x" * 100_000)], timeout=5)
        assert await code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED
