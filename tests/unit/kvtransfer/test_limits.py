"""What a peer of a transfer may say and open: bounded, with an error that names the bound."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from baton import codec
from baton.errors import InvalidRequest, NodeLost
from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer import wire_codec
from kvtransfer.config import TransferConfig
from kvtransfer.digest import DIGEST_NAME
from kvtransfer.encoding import IDENTITY
from kvtransfer.protocol.messages import Abort, Revoke
from kvtransfer.wire_codec import encoding_to_pb
from tests.support.transfer import LAYOUT, describe, pair, token, until


def hello(number: int = 0) -> pb.ChannelRequest.Hello:
    return pb.ChannelRequest.Hello(
        node=codec.node_to_pb(describe(f"stranger-{number}", LAYOUT)),
        transports=["tcp"],
        digest=DIGEST_NAME,
        encodings=[encoding_to_pb(IDENTITY)],
    )


@pytest.mark.parametrize("name", ["transports", "encodings", "reachable_memory"])
async def test_a_hello_that_lists_too_much_is_refused_by_the_name_of_the_list(name: str) -> None:
    said = hello()
    entry = encoding_to_pb(IDENTITY) if name == "encodings" else "tcp"
    getattr(said, name).extend([entry] * 100)
    count = len(getattr(said, name))
    async with pair() as p, grpc.aio.insecure_channel(p.address) as channel:
        call = transfer_pb2_grpc.KvTransferStub(channel).Channel()
        await call.write(pb.ChannelRequest(hello=said))
        with pytest.raises(grpc.aio.AioRpcError, match=f"lists {count} {name}, expected at most 64") as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_so_many_channels_and_no_more_are_open_and_one_that_ends_makes_room() -> None:
    config = TransferConfig(transports=("tcp",), max_channels=2)
    async with pair(receiver_config=config) as p, grpc.aio.insecure_channel(p.address) as channel:
        stub = transfer_pb2_grpc.KvTransferStub(channel)
        calls = [stub.Channel() for _ in range(2)]
        for number, call in enumerate(calls):
            await call.write(pb.ChannelRequest(hello=hello(number)))
            assert (await call.read()).HasField("welcome")
        push = p.sender.begin(p.receiver.grant("r", [1], ttl_s=30), [1], num_known_tokens=1)
        for layer in range(LAYOUT.num_layers):
            push.layer_ready(layer, 1)
        with pytest.raises(NodeLost, match="2 channels to decode-0 are open, the limit"):
            await push.commit(token("r"))
        calls[0].cancel()
        await until(lambda: len(p.receiver._writers) == 1)
        push = p.sender.begin(p.receiver.grant("s", [2], ttl_s=30), [1], num_known_tokens=1)
        for layer in range(LAYOUT.num_layers):
            push.layer_ready(layer, 1)
        assert (await push.commit(token("s"))).num_blocks == 1
        calls[1].cancel()


def test_why_a_peer_ends_a_transfer_is_kept_shortened() -> None:
    abort = wire_codec.request_from_pb(
        pb.ChannelRequest(abort=pb.ChannelRequest.Abort(sequence_id="s", epoch=1, reason="r" * 5000))
    )
    revoke = wire_codec.response_from_pb(
        pb.ChannelResponse(revoke=pb.ChannelResponse.Revoke(sequence_id="s", epoch=1, reason="r" * 5000))
    )
    assert isinstance(abort, Abort)
    assert isinstance(revoke, Revoke)
    assert len(abort.reason) < 400
    assert len(revoke.reason) < 400


def test_a_name_that_is_too_long_is_refused_before_it_is_compared() -> None:
    node = codec.node_to_pb(describe("d0", LAYOUT))
    node.host_id = "h" * 1000
    with pytest.raises(InvalidRequest, match="host_id has 1000 characters"):
        codec.node_from_pb(node)
