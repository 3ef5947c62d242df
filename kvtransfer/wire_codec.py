"""The control channel's messages to protobuf and back, handshake checks, gRPC options. No lifecycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baton import codec
from baton.errors import Incompatible, InvalidRequest, quoted, shortened
from baton.types import NodeDescription
from baton.v1 import transfer_pb2 as pb
from kvtransfer.encoding import Encoding
from kvtransfer.protocol import messages as m
from kvtransfer.transports.interface import Transport

# A commit carries 16 bytes per layer and one token.
MAX_MESSAGE_BYTES = 4 << 20
# Of each list in a Hello; a process knows fewer of everything.
_MAX_OFFERED = 64
# Of what a peer says why it ends a transfer, which is kept until its blocks are free.
_MAX_REASON_CHARS = 300

# A channel is opened anew on every attempt: gRPC's own reconnection and its back-off would only hide what happened.
CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)


def request_to_pb(message: m.SenderMessage) -> pb.ChannelRequest:
    match message:
        case m.Begin():
            return pb.ChannelRequest(
                begin=pb.ChannelRequest.Begin(sequence_id=message.sequence_id, epoch=message.epoch)
            )
        case m.Commit():
            return pb.ChannelRequest(
                commit=pb.ChannelRequest.Commit(
                    sequence_id=message.sequence_id,
                    epoch=message.epoch,
                    attempt=message.attempt,
                    num_blocks=message.num_blocks,
                    layer_digests=message.layer_digests,
                    first_token=codec.tokens_to_pb(message.first_token),
                    num_sent_bytes=message.num_sent_bytes,
                )
            )
        case m.Abort():
            abort = pb.ChannelRequest.Abort(sequence_id=message.sequence_id, epoch=message.epoch, reason=message.reason)
            return pb.ChannelRequest(abort=abort)
        case m.Revoked():
            revoked = pb.ChannelRequest.Revoked(sequence_id=message.sequence_id, epoch=message.epoch)
            return pb.ChannelRequest(revoked=revoked)
        case m.Heartbeat():
            return pb.ChannelRequest(heartbeat=pb.Heartbeat())


def request_from_pb(msg: pb.ChannelRequest) -> m.SenderMessage:
    """Raises InvalidRequest for what no sender of this protocol version says after its Hello."""
    match msg.WhichOneof("message"):
        case "begin":
            return m.Begin(msg.begin.sequence_id, msg.begin.epoch)
        case "commit":
            c = msg.commit
            token = codec.tokens_from_pb(c.first_token)
            digests = tuple(c.layer_digests)
            return m.Commit(c.sequence_id, c.epoch, c.attempt, c.num_blocks, digests, token, c.num_sent_bytes)
        case "abort":
            return m.Abort(msg.abort.sequence_id, msg.abort.epoch, shortened(msg.abort.reason, _MAX_REASON_CHARS))
        case "revoked":
            return m.Revoked(msg.revoked.sequence_id, msg.revoked.epoch)
        case "heartbeat":
            return m.Heartbeat()
        case other:
            raise InvalidRequest(f"message {other!r} is not expected on a transfer channel after Hello")


def response_to_pb(message: m.ReceiverMessage) -> pb.ChannelResponse:
    match message:
        case m.Begun():
            begun = pb.ChannelResponse.Begun(sequence_id=message.sequence_id, epoch=message.epoch)
            return pb.ChannelResponse(begun=begun)
        case m.Ack():
            return pb.ChannelResponse(ack=pb.ChannelResponse.Ack(sequence_id=message.sequence_id, epoch=message.epoch))
        case m.Nack():
            return pb.ChannelResponse(
                nack=pb.ChannelResponse.Nack(
                    sequence_id=message.sequence_id,
                    epoch=message.epoch,
                    attempt=message.attempt,
                    failure=codec.failure_to_pb(message.failure),
                    retransmit_layers=message.retransmit_layers,
                )
            )
        case m.Revoke():
            revoke = pb.ChannelResponse.Revoke(
                sequence_id=message.sequence_id, epoch=message.epoch, reason=message.reason
            )
            return pb.ChannelResponse(revoke=revoke)
        case m.Heartbeat():
            return pb.ChannelResponse(heartbeat=pb.Heartbeat())


def response_from_pb(msg: pb.ChannelResponse) -> m.ReceiverMessage:
    """Raises InvalidRequest for what no receiver of this protocol version says after its Welcome."""
    match msg.WhichOneof("message"):
        case "begun":
            return m.Begun(msg.begun.sequence_id, msg.begun.epoch)
        case "ack":
            return m.Ack(msg.ack.sequence_id, msg.ack.epoch)
        case "nack":
            n = msg.nack
            failure = codec.failure_from_pb(n.failure)
            return m.Nack(n.sequence_id, n.epoch, n.attempt, failure, tuple(n.retransmit_layers))
        case "revoke":
            return m.Revoke(msg.revoke.sequence_id, msg.revoke.epoch, shortened(msg.revoke.reason, _MAX_REASON_CHARS))
        case "heartbeat":
            return m.Heartbeat()
        case other:
            raise InvalidRequest(f"message {other!r} is not expected on a transfer channel after Welcome")


def check_offers(hello: pb.ChannelRequest.Hello) -> None:
    """Raise InvalidRequest for a Hello that lists more than any process has."""
    for name in ("transports", "encodings", "reachable_memory"):
        count = len(getattr(hello, name))
        if count > _MAX_OFFERED:
            raise InvalidRequest(f"a Hello lists {count} {name}, expected at most {_MAX_OFFERED}", param=name)


def check_compatible(mine: NodeDescription, theirs: NodeDescription, my_digest: str, their_digest: str) -> None:
    """Raise Incompatible, with both values, if two nodes must not exchange a byte of KV."""
    pairs = (
        ("protocol_version", mine.protocol_version, theirs.protocol_version),
        ("model fingerprint", mine.model.fingerprint, theirs.model.fingerprint),
        ("model dtype", mine.model.dtype, theirs.model.dtype),
        ("kernels", mine.kernels, theirs.kernels),
        ("digest", my_digest or "off", their_digest or "off"),
    )
    who = f"{mine.node_id} and {theirs.node_id} cannot exchange KV"
    for name, here, there in pairs:
        if here != there:
            raise Incompatible(f"{who}: {name} is {here} at {mine.node_id} and {there} at {theirs.node_id}")
    mismatch = mine.kv_layout.mismatch(theirs.kv_layout)
    if mismatch is not None:
        raise Incompatible(f"{who}: KV layout differs, {mismatch} ({theirs.node_id})")


def choose_transport(
    mine: NodeDescription,
    theirs: NodeDescription,
    offered: Sequence[str],
    supported: Mapping[str, Transport],
    *,
    can_reach_memory: bool = False,
) -> Transport:
    """The first transport of the sender's list that both have and that reaches. Raises Incompatible if none does.

    ``can_reach_memory``: the sender's device can write to the memory of mine.
    """
    for name in offered:
        transport = supported.get(name)
        if transport is not None and transport.reaches(mine, theirs, can_reach_memory=can_reach_memory):
            return transport
    raise Incompatible(
        f"{theirs.node_id} offers transports {[*offered]} from host {quoted(theirs.host_id)}, "
        f"{mine.node_id} has {[*supported]} on host {quoted(mine.host_id)}: none of them connects the two"
    )


def encoding_to_pb(encoding: Encoding) -> pb.Encoding:
    return pb.Encoding(name=encoding.name, digest_covers=encoding.digest_covers)


def encoding_from_pb(msg: pb.Encoding) -> Encoding:
    return Encoding(msg.name, msg.digest_covers)
