"""A sender's connection to one receiver: gRPC control channel and data wire, opened together and lost together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from baton import codec
from baton.address import as_dialled
from baton.errors import BatonError, Incompatible, InvalidRequest, NodeLost, TransferFailed, quoted
from baton.patience import patient_timeout
from baton.types import KvLayout, NodeDescription
from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer import channel as wire_format
from kvtransfer.config import TransferConfig
from kvtransfer.devices.interface import Device
from kvtransfer.digest import DIGEST_NAME
from kvtransfer.protocol import messages
from kvtransfer.transports import cuda_ipc, shm
from kvtransfer.transports.cuda_ipc import CudaIpcWire
from kvtransfer.transports.fake import FakeWire
from kvtransfer.transports.shm import ShmWire
from kvtransfer.transports.tcp_wire import TcpWire
from kvtransfer.writing import Lanes, Wire

_Call = grpc.aio.StreamStreamCall[pb.ChannelRequest, pb.ChannelResponse]
# Messages waiting for a slow peer; with more the connection is given up.
_MAX_OUTBOX = 4096


class Connection:
    """``run`` carries messages until the connection is lost; ``close`` lets go of what it holds."""

    def __init__(
        self, channel: grpc.aio.Channel, call: _Call, node: NodeDescription, lost: asyncio.Future[str], wire: Wire
    ) -> None:
        self.node = node
        self.wire = wire
        self._channel = channel
        self._call = call
        self._outbox: asyncio.Queue[pb.ChannelRequest] = asyncio.Queue(_MAX_OUTBOX)
        self._lost = lost

    @classmethod
    async def open(
        cls,
        address: str,
        node: NodeDescription,
        config: TransferConfig,
        lanes: Lanes | None,
        device: Device | None = None,
    ) -> Connection:
        """Handshake and data wire. Raises Incompatible if the two must not exchange KV, NodeLost or TransferFailed if
        the receiver cannot be reached within ``connect_timeout_s``."""
        channel = grpc.aio.insecure_channel(address, options=wire_format.CLIENT_OPTIONS)
        try:
            async with patient_timeout(config.connect_timeout_s):
                call, welcome = await _greet(channel, node, config, device)
                theirs = codec.node_from_pb(welcome.node)
                wire_format.check_compatible(node, theirs, _digest_name(config), welcome.digest)
                loop = asyncio.get_running_loop()
                lost: asyncio.Future[str] = loop.create_future()
                welcome.endpoint = as_dialled(welcome.endpoint, address)
                wire = await _open_wire(welcome, theirs.kv_layout, node, config, lanes, device, lost)
        except TimeoutError:
            await channel.close()
            raise NodeLost(f"{address} did not answer a transfer handshake in {config.connect_timeout_s} s") from None
        except grpc.aio.AioRpcError as error:
            await channel.close()
            raise _mapped(error, address) from error
        except BaseException:
            await channel.close()
            raise
        return cls(channel, call, theirs, lost, wire)

    @property
    def target_layout(self) -> KvLayout:
        return self.node.kv_layout

    def send(self, message: messages.SenderMessage) -> None:
        """Queue a message. A full queue costs the connection."""
        try:
            self._outbox.put_nowait(wire_format.request_to_pb(message))
        except asyncio.QueueFull:
            self.lose(f"{_MAX_OUTBOX} messages were not taken")

    def lose(self, reason: str) -> None:
        _lose(self._lost, reason)

    async def run(self, on_message: Callable[[messages.ReceiverMessage], None]) -> str:
        """Carry messages both ways; returns why the connection was lost."""
        loop = asyncio.get_running_loop()
        reading = loop.create_task(self._read(on_message))
        writing = loop.create_task(self._write())
        try:
            waited_for: set[asyncio.Future[Any]] = {reading, writing, self._lost}
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reading, writing):
                task.cancel()
            results = await asyncio.gather(reading, writing, return_exceptions=True)
        for result in results:
            if isinstance(result, grpc.aio.AioRpcError):
                return f"{result.code().name}: {result.details()}"
        if self._lost.done():
            return self._lost.result()
        errors = [r for r in results if isinstance(r, Exception)]
        return f"{type(errors[0]).__name__}: {errors[0]}" if errors else "the receiver closed it"

    async def _read(self, on_message: Callable[[messages.ReceiverMessage], None]) -> None:
        while isinstance(response := await self._call.read(), pb.ChannelResponse):
            on_message(wire_format.response_from_pb(response))
        await self._call.done_writing()
        # A stream that ends with a status other than OK raises it here.
        await self._call.read()

    async def _write(self) -> None:
        while True:
            await self._call.write(await self._outbox.get())

    async def close(self) -> None:
        """Wait for writes under way, let go of the peer's memory, close the channel."""
        await self.wire.close()
        self._call.cancel()
        await self._channel.close()


def _digest_name(config: TransferConfig) -> str:
    return DIGEST_NAME if config.digest else ""


def _lose(lost: asyncio.Future[str], reason: str) -> None:
    if not lost.done():
        lost.set_result(reason)


async def _greet(
    channel: grpc.aio.Channel, node: NodeDescription, config: TransferConfig, device: Device | None
) -> tuple[_Call, pb.ChannelResponse.Welcome]:
    stub = transfer_pb2_grpc.KvTransferStub(channel)
    call: _Call = stub.Channel()
    hello = pb.ChannelRequest.Hello(
        node=codec.node_to_pb(node),
        transports=config.transport_names,
        digest=_digest_name(config),
        reachable_memory=() if device is None else device.reachable_ids,
    )
    await call.write(pb.ChannelRequest(hello=hello))
    response = await call.read()
    if not isinstance(response, pb.ChannelResponse) or response.WhichOneof("message") != "welcome":
        raise TransferFailed(f"expected Welcome on a transfer channel, got {quoted(response)}")
    return call, response.welcome


async def _open_wire(
    welcome: pb.ChannelResponse.Welcome,
    target: KvLayout,
    node: NodeDescription,
    config: TransferConfig,
    lanes: Lanes | None,
    device: Device | None,
    lost: asyncio.Future[str],
) -> Wire:
    name = welcome.transport
    if name not in config.transport_names:
        raise Incompatible(
            f"the receiver chose transport {quoted(name)}, offered were {', '.join(config.transport_names)}"
        )

    def on_lost(reason: str) -> None:
        _lose(lost, reason)

    wire: Wire
    if name == shm.NAME:
        assert lanes is not None, "the sender was not started"
        wire = await ShmWire.connect(
            welcome.endpoint, welcome.token, target.total_bytes, lanes, config.copy_threads, on_lost
        )
    elif name == cuda_ipc.NAME:
        assert lanes is not None and device is not None, "offered by senders on a device only"  # noqa: PT018
        wire = await CudaIpcWire.connect(
            welcome.endpoint, welcome.token, target.total_bytes, device, lanes, config.copy_threads, on_lost
        )
    else:
        wire = await TcpWire.connect(welcome.endpoint, welcome.token, config.tcp_streams, on_lost)
    mischief = config.mischief(name)
    return wire if mischief is None else FakeWire(wire, mischief, asyncio.get_running_loop(), on_lost)


def _mapped(error: grpc.aio.AioRpcError, address: str) -> BatonError:
    details = f"{address}: {error.details()}"
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return Incompatible(details)
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(details)
    return NodeLost(details)
