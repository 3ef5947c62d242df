"""A sender's connection to one receiver: gRPC control channel and data connection, opened together and lost
together."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import grpc.aio

from baton import codec
from baton.address import as_dialled
from baton.channels import dial
from baton.errors import BatonError, Incompatible, InvalidRequest, NodeLost, TransferFailed, quoted
from baton.faults.faults import Faults
from baton.patience import patient_timeout
from baton.types import KvLayout, NodeDescription
from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer import wire_codec
from kvtransfer.config import TransferConfig
from kvtransfer.control import Outbox
from kvtransfer.digest import DIGEST_NAME
from kvtransfer.encoding import ENCODINGS
from kvtransfer.faulty import ControlLine, FaultyWire
from kvtransfer.memory import Memory
from kvtransfer.protocol import messages
from kvtransfer.transports.interface import Dial, Transport
from kvtransfer.writing import Lanes, Wire

_Call = grpc.aio.StreamStreamCall[pb.ChannelRequest, pb.ChannelResponse]


class Connection:
    """``run`` carries messages until the connection is lost; ``close`` lets go of what it holds."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        call: _Call,
        node: NodeDescription,
        outbox: Outbox[pb.ChannelRequest],
        transport: Transport,
        wire: Wire,
        line: ControlLine[messages.SenderMessage] | None = None,
    ) -> None:
        self._line = line
        self.node = node
        self.transport = transport
        self.wire = wire
        self._channel = channel
        self._call = call
        self._outbox = outbox

    @classmethod
    async def open(
        cls,
        address: str,
        node: NodeDescription,
        config: TransferConfig,
        lanes: Lanes | None,
        memory: Memory,
        faults: Faults | None = None,
    ) -> Connection:
        """Handshake and data wire. Raises Incompatible if the two must not exchange KV, NodeLost or TransferFailed if
        the receiver cannot be reached within ``connect_timeout_s``."""
        channel = dial(address, config.access, wire_codec.CLIENT_OPTIONS)
        outbox: Outbox[pb.ChannelRequest] = Outbox()
        try:
            async with patient_timeout(config.connect_timeout_s):
                call, welcome = await _greet(channel, node, config, memory)
                theirs = codec.node_from_pb(welcome.node)
                wire_codec.check_compatible(node, theirs, _digest_name(config), welcome.digest)
                transport = _chosen(welcome, theirs, node, config)
                offer = Dial(
                    endpoint=as_dialled(welcome.endpoint, address),
                    token=welcome.token,
                    num_target_bytes=theirs.kv_layout.total_bytes,
                    memory=memory,
                    lanes=lanes,
                    num_lanes=config.copy_threads,
                    num_streams=config.tcp_streams,
                    on_lost=outbox.lose,
                    access=config.access,
                )
                wire = await transport.connect(offer)
        except TimeoutError:
            await channel.close()
            raise NodeLost(f"{address} did not answer a transfer handshake in {config.connect_timeout_s} s") from None
        except grpc.aio.AioRpcError as error:
            await channel.close()
            raise _mapped(error, address) from error
        except BaseException:
            await channel.close()
            raise
        if faults is None:
            return cls(channel, call, theirs, outbox, transport, wire)
        peer = theirs.node_id
        line = ControlLine[messages.SenderMessage](
            faults, peer, lambda message: outbox.put(wire_codec.request_to_pb(message)), outbox.lose
        )
        return cls(channel, call, theirs, outbox, transport, FaultyWire(wire, faults, peer, outbox.lose), line)

    @property
    def target_layout(self) -> KvLayout:
        return self.node.kv_layout

    def send(self, message: messages.SenderMessage) -> None:
        """Queue a message. A full queue costs the connection."""
        if self._line is None:
            self._outbox.put(wire_codec.request_to_pb(message))
        else:
            self._line.send(message)

    def lose(self, reason: str) -> None:
        self._outbox.lose(reason)

    async def run(self, on_message: Callable[[messages.ReceiverMessage], None]) -> str:
        """Carry messages both ways; returns why the connection was lost."""
        results = await self._outbox.carry(self._read(on_message), self._call.write, last_write_timeout_s=0.0)
        for result in results:
            if isinstance(result, grpc.aio.AioRpcError):
                return f"{result.code().name}: {result.details()}"
        if self._outbox.lost.done():
            return self._outbox.lost.result()
        errors = [r for r in results if isinstance(r, Exception)]
        return f"{type(errors[0]).__name__}: {errors[0]}" if errors else "the receiver closed it"

    async def _read(self, on_message: Callable[[messages.ReceiverMessage], None]) -> None:
        while isinstance(response := await self._call.read(), pb.ChannelResponse):
            on_message(wire_codec.response_from_pb(response))
        await self._call.done_writing()
        # A stream that ends with a status other than OK raises it here.
        await self._call.read()

    async def close(self) -> None:
        """Wait for writes under way, let go of the peer's memory, close the channel."""
        if self._line is not None:
            self._line.close()
        await self.wire.close()
        self._call.cancel()
        await self._channel.close()


def _digest_name(config: TransferConfig) -> str:
    return DIGEST_NAME if config.digest else ""


async def _greet(
    channel: grpc.aio.Channel, node: NodeDescription, config: TransferConfig, memory: Memory
) -> tuple[_Call, pb.ChannelResponse.Welcome]:
    stub = transfer_pb2_grpc.KvTransferStub(channel)
    call: _Call = stub.Channel(metadata=config.access.metadata)
    hello = pb.ChannelRequest.Hello(
        node=codec.node_to_pb(node),
        transports=config.transport_names,
        digest=_digest_name(config),
        reachable_memory=() if memory.device is None else memory.device.reachable_ids,
        encodings=[wire_codec.encoding_to_pb(encoding) for encoding in ENCODINGS],
    )
    await call.write(pb.ChannelRequest(hello=hello))
    response = await call.read()
    if not isinstance(response, pb.ChannelResponse) or response.WhichOneof("message") != "welcome":
        raise TransferFailed(f"expected Welcome on a transfer channel, got {quoted(response)}")
    return call, response.welcome


def _chosen(
    welcome: pb.ChannelResponse.Welcome, theirs: NodeDescription, node: NodeDescription, config: TransferConfig
) -> Transport:
    """The transport that the receiver chose. Raises Incompatible if it chose something that was not offered."""
    encoding = wire_codec.encoding_from_pb(welcome.encoding)
    if encoding not in ENCODINGS:
        offered = ", ".join(map(str, ENCODINGS))
        raise Incompatible(f"{theirs.node_id} chose encoding {quoted(str(encoding))}, {node.node_id} offered {offered}")
    transport = config.by_name.get(welcome.transport)
    if transport is None:
        raise Incompatible(
            f"{theirs.node_id} chose transport {quoted(welcome.transport)}, {node.node_id} offered "
            f"{', '.join(config.transport_names)}"
        )
    return transport


def _mapped(error: grpc.aio.AioRpcError, address: str) -> BatonError:
    details = f"{address}: {error.details()}"
    if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
        return Incompatible(details)
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(details)
    return NodeLost(details)
