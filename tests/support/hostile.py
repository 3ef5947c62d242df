"""A peer that lies: messages with any field at its extremes or left out, bytes that are no message, and the visits that
bring them to every port of a worker."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from baton import PROTOCOL_VERSION
from baton.v1 import common_pb2, node_pb2, node_pb2_grpc, transfer_pb2
from kvtransfer.digest import DIGEST_NAME
from kvtransfer.encoding import IDENTITY
from kvtransfer.transports.local_wire import HINT
from kvtransfer.transports.tcp_socket import FRAME, MAGIC, PREAMBLE
from kvtransfer.wire_codec import encoding_to_pb

# A visit that takes longer is a hang.
VISIT_S = 20.0
# A worker's answers to a peer's fault. INTERNAL and UNKNOWN would be its own.
FAIR = frozenset(
    {
        "OK", "CANCELLED", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION", "ABORTED", "UNIMPLEMENTED", "UNAVAILABLE",
    }
)  # fmt: skip
# What grpc.aio makes of a call that the server ended while a message was being written; the server's status is lost.
_WROTE_TOO_LATE = "Internal error from Core"
INTEGERS = (0, 1, 2, 3, 7, 63, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -1.0, 0.5, 1.0, 30.0, 1e-300, 1e300, math.inf, -math.inf, math.nan)
TEXTS = ("", "a", "\0", "a\nb", " ", "ü" * 200, "x" * 70_000, "127.0.0.1:1", ":", "shm", "tcp", "float32", "cpu")
SEQUENCES = ("h0", "h1", "h2")
HEADS = (b"GET /metrics HTTP/1.1\r\n\r\n", b"GET ", b"POST / HTTP/1.1\r\n\r\n", b"\0\r\n\r\n", b"")
_BITS = {
    FieldDescriptor.CPPTYPE_INT32: 31,
    FieldDescriptor.CPPTYPE_INT64: 63,
    FieldDescriptor.CPPTYPE_UINT32: 32,
    FieldDescriptor.CPPTYPE_UINT64: 64,
    FieldDescriptor.CPPTYPE_ENUM: 31,
}
M = TypeVar("M", bound=Message)


class Liar:
    """Draws messages from a seed. ``known`` has good values by the name of a field, of which some get far."""

    def __init__(self, rng: Random, known: Mapping[str, Sequence[Any]]) -> None:
        self.rng = rng
        self._known = known

    def message(self, kind: type[M], rate: float = 0.6) -> M:
        found = kind()
        self._fill(found, rate)
        return found

    def bytes_of(self, message: Message) -> bytes:
        """Its bytes; now and then cut, or with one of them changed."""
        raw = bytearray(message.SerializeToString())
        if raw and self.rng.random() < 0.1:
            del raw[self.rng.randrange(len(raw)) :]
        elif raw and self.rng.random() < 0.1:
            raw[self.rng.randrange(len(raw))] ^= 1 << self.rng.randrange(8)
        return bytes(raw)

    def noise(self, most: int = 300) -> bytes:
        return self.rng.randbytes(self.rng.randrange(most))

    def _fill(self, message: Message, rate: float) -> None:
        if isinstance(message, common_pb2.SamplingParams):
            message.max_tokens, message.seed = self.rng.choice((1, 3, 50)), 1
            rate = 0.04
        for field in message.DESCRIPTOR.fields:
            if self.rng.random() < rate:
                self._set(message, field, rate)

    def _set(self, message: Message, field: FieldDescriptor, rate: float) -> None:
        of = field.message_type
        if of is not None and of.GetOptions().map_entry:
            key, value = (self._scalar(of.fields_by_name[name]) for name in ("key", "value"))
            getattr(message, field.name)[key] = value
        elif field.is_repeated:
            for _ in range(self.rng.choice((0, 1, 1, 2, 5))):
                if of is not None:
                    self._fill(getattr(message, field.name).add(), rate)
                else:
                    getattr(message, field.name).append(self._scalar(field))
        elif of is not None:
            getattr(message, field.name).SetInParent()
            self._fill(getattr(message, field.name), rate)
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        if field.name in self._known and self.rng.random() < 0.85:
            return self.rng.choice(self._known[field.name])
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_BOOL:
                return self.rng.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                value = self.rng.choice(FLOATS)
                return value if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE or abs(value) < 1e38 else math.inf
            case FieldDescriptor.CPPTYPE_STRING:
                text = self.rng.choice(TEXTS)
                return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
            case kind:
                return self.rng.choice(INTEGERS) % (1 << _BITS[kind])


class Visitor:
    """Brings hostile inputs to one worker and counts them by port and outcome. Fails for an outcome of the worker's
    fault; a worker that hangs is a TimeoutError."""

    PORTS = ("session", "unary", "transfer", "lease", "data", "metrics")

    def __init__(self, address: str, others: Sequence[str]) -> None:
        self.address = address
        self._others = others
        self.outcomes: Counter[tuple[str, str]] = Counter()

    @property
    def num_inputs(self) -> int:
        return self.outcomes.total()

    async def visit(self, port: str, rng: Random) -> None:
        async with asyncio.timeout(VISIT_S):
            await getattr(self, f"_visit_{port}")(rng)

    def _liar(self, rng: Random, **known: Sequence[Any]) -> Liar:
        small = (1, 5, 77, 900)
        usual: dict[str, Sequence[Any]] = {
            "sequence_id": SEQUENCES,
            "router_id": ("liar", "other liar"),
            "protocol_version": (PROTOCOL_VERSION,),
            "prompt_token_ids": small,
            "generated_token_ids": small,
            "token_ids": small,
            "block_ids": (0, 1, 2, 3),
            "address": (self.address, *self._others, "127.0.0.1:1"),
            "node_id": ("p0", "d0", "liar"),
            "prefill_node_id": ("p0", "liar"),
            "ttl_s": (0.2, 1.0, 30.0),
            "num_headroom_tokens": (0, 3),
            "priority": (0,),
            "cache_salt": (b"", b"salt"),
            "attempt": (1, 2),
            "num_blocks": (1, 2, 3),
            "num_sent_bytes": (0, 1, 3 * 48 * 2048),
        }
        return Liar(rng, usual | known)

    @asynccontextmanager
    async def _call(self, path: str, port: str) -> AsyncIterator[Any]:
        """A stream of bytes; when it is left its end is awaited and judged."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            call: Any = channel.stream_stream(path, request_serializer=None, response_deserializer=None)()
            try:
                yield call
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
                pass
            self._judge(port, await call.code(), await call.details())

    def _judge(self, port: str, code: grpc.StatusCode, details: str | None) -> None:
        if details == _WROTE_TOO_LATE:
            self.outcomes[port, "ended while written to"] += 1
            return
        assert code.name in FAIR, (port, code, details)
        assert "Traceback" not in (details or "")
        self.outcomes[port, code.name] += 1

    async def _write(self, call: Any, raw: bytes, port: str) -> None:
        self.outcomes[port, "sent"] += 1
        await call.write(raw)

    async def _visit_session(self, rng: Random) -> None:
        liar = self._liar(rng)
        async with self._call("/baton.v1.Node/Session", "session") as call:
            if rng.random() < 0.9:
                hello = node_pb2.SessionHello(router_id="liar", protocol_version=PROTOCOL_VERSION)
                await call.write(node_pb2.SessionRequest(hello=hello).SerializeToString())
            for _ in range(rng.randint(1, 8)):
                what = rng.choice(("run", "run", "reserve", "reserve", "cancel", "migrate", "hello", "noise"))
                if what == "noise":
                    await self._write(call, liar.noise(), "session")
                    continue
                request = node_pb2.SessionRequest()
                part = getattr(request, what)
                part.SetInParent()
                # A lease is for a sequence that is handed over: now and then there is none.
                part.CopyFrom(liar.message(type(part), rng.choice((0.7, 0.95, 1.0))))
                await self._write(call, liar.bytes_of(request), "session")

    async def _visit_unary(self, rng: Random) -> None:
        liar = self._liar(rng, role=(7, 100), expected_role=(9,), grace_s=(-1.0, math.nan, 1e300, math.inf))
        methods = {
            "Describe": node_pb2.DescribeRequest,
            "Ledger": node_pb2.LedgerRequest,
            "Cache": node_pb2.CacheRequest,
            "Clock": node_pb2.ClockRequest,
            "Trace": node_pb2.TraceRequest,
            # What these would do well ends the test.
            "SetRole": node_pb2.SetRoleRequest,
            "Drain": node_pb2.DrainRequest,
            "Nothing": node_pb2.ClockRequest,
        }
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            for _ in range(rng.randint(1, 6)):
                name = rng.choice(list(methods))
                message = liar.message(methods[name], 1.0)
                raw = message.SerializeToString()
                if name == "Drain" and 0 <= message.grace_s <= 86_400:
                    continue
                if name == "SetRole" and message.role in (0, 1, 2, 3):
                    continue
                if name not in ("Drain", "SetRole") and rng.random() < 0.4:
                    raw = liar.noise()
                call: Any = channel.unary_unary(
                    f"/baton.v1.Node/{name}", request_serializer=None, response_deserializer=None
                )
                self.outcomes["unary", "sent"] += 1
                asked = call(raw, timeout=VISIT_S / 2)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await asked
                self._judge("unary", await asked.code(), await asked.details())

    async def _hello(self, transport: str) -> transfer_pb2.ChannelRequest.Hello:
        """What an honest prefill node would say."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            described = await node_pb2_grpc.NodeStub(channel).Describe(node_pb2.DescribeRequest())
        hello = transfer_pb2.ChannelRequest.Hello(
            node=described.node, transports=[transport], digest=DIGEST_NAME, encodings=[encoding_to_pb(IDENTITY)]
        )
        hello.node.node_id, hello.node.incarnation = "liar", 77
        return hello

    async def _visit_transfer(self, rng: Random) -> None:
        """Without a lease: what a stranger can say."""
        await self._channel(rng, "transfer", epoch=rng.choice(INTEGERS))

    async def _visit_lease(self, rng: Random) -> None:
        """With a lease of its own, which it fills, commits and gives back in any order."""
        prompt = [rng.randint(1, 900) for _ in range(rng.randint(1, 60))]
        sampling = common_pb2.SamplingParams(max_tokens=5, seed=1, temperature=0.0)
        sequence = common_pb2.Sequence(sequence_id="h0", prompt_token_ids=prompt, sampling=sampling)
        reserve = node_pb2.SessionRequest.Reserve(sequence=sequence, ttl_s=20.0, prefill_node_id="liar")
        async with self._call("/baton.v1.Node/Session", "lease") as call:
            hello = node_pb2.SessionHello(router_id="liar with a lease", protocol_version=PROTOCOL_VERSION)
            await call.write(node_pb2.SessionRequest(hello=hello).SerializeToString())
            await call.write(node_pb2.SessionRequest(reserve=reserve).SerializeToString())
            while (raw := await call.read()) is not grpc.aio.EOF:
                response = node_pb2.SessionResponse.FromString(raw)
                if response.refused:
                    break
                if response.reserved:
                    await self._channel(rng, "lease", epoch=response.reserved[0].epoch)
                    break

    async def _channel(self, rng: Random, port: str, *, epoch: int) -> None:
        # A peer that takes the name of another one ends that one's channel.
        liar = self._liar(
            rng, epoch=(epoch, epoch, (epoch + 1) % 2**64), sequence_id=("h0", "h0", "h1"), node_id=("liar",)
        )  # fmt: skip
        transport = rng.choice(("tcp", "shm"))
        hello = await self._hello(transport)
        if rng.random() < 0.3:
            hello.MergeFrom(liar.message(type(hello), 0.15))
        async with self._call("/baton.v1.KvTransfer/Channel", port) as call:
            first = transfer_pb2.ChannelRequest(hello=hello).SerializeToString()
            await self._write(call, liar.noise() if rng.random() < 0.05 else first, port)
            raw = await call.read()
            if raw is grpc.aio.EOF:
                return
            welcome = transfer_pb2.ChannelResponse.FromString(raw).welcome
            with await _connected(welcome) as stream:
                if welcome.transport == "tcp":
                    self.outcomes[port, "sent"] += 1
                    await _send(stream, PREAMBLE.pack(MAGIC, welcome.token, rng.randrange(4)))
                else:
                    await _send(stream, welcome.token)
                for _ in range(rng.randint(1, 8)):
                    if rng.random() < 0.5:
                        self.outcomes[port, "sent"] += 1
                        await _send(stream, _datum(rng, welcome.transport, epoch))
                        continue
                    request = transfer_pb2.ChannelRequest()
                    part = getattr(request, rng.choice(("begin", "begin", "commit", "commit", "abort", "revoked")))
                    part.SetInParent()
                    part.CopyFrom(liar.message(type(part), 0.95))
                    await self._write(call, liar.bytes_of(request), port)

    async def _visit_data(self, rng: Random) -> None:
        """The ports of the data connections, without a token."""
        liar = self._liar(rng)
        hello = await self._hello(rng.choice(("tcp", "shm")))
        async with self._call("/baton.v1.KvTransfer/Channel", "data") as call:
            await call.write(transfer_pb2.ChannelRequest(hello=hello).SerializeToString())
            raw = await call.read()
            if raw is grpc.aio.EOF:
                return
            welcome = transfer_pb2.ChannelResponse.FromString(raw).welcome
            for _ in range(rng.randint(1, 5)):
                with await _connected(welcome) as stream:
                    self.outcomes["data", "sent"] += 1
                    # Not the magic and a token, in any length.
                    await _send(stream, b"\xff" + liar.noise(200))

    async def _visit_metrics(self, rng: Random) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            described = await node_pb2_grpc.NodeStub(channel).Describe(node_pb2.DescribeRequest())
        host, _, port = described.node.metrics_address.rpartition(":")
        liar = self._liar(rng)
        for _ in range(rng.randint(1, 4)):
            head = rng.choice(HEADS)
            reader, writer = await asyncio.open_connection(host, int(port))
            self.outcomes["metrics", "sent"] += 1
            writer.write(head if rng.random() < 0.5 else liar.noise(20_000) + b"\r\n\r\n" + head)
            with contextlib.suppress(OSError):
                writer.write_eof()
                answer = await reader.read()
                assert b"Traceback" not in answer
                assert not answer.startswith(b"HTTP/1.1 5")
                self.outcomes["metrics", answer[9:12].decode(errors="replace") or "closed"] += 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _connected(welcome: transfer_pb2.ChannelResponse.Welcome) -> socket.socket:
    loop = asyncio.get_running_loop()
    if welcome.transport == "tcp":
        host, _, port = welcome.endpoint.rpartition(":")
        stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        address: Any = (host, int(port))
    else:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address = f"\0{welcome.endpoint}"
    stream.setblocking(False)
    await loop.sock_connect(stream, address)
    return stream


async def _send(stream: socket.socket, data: bytes) -> None:
    """A peer that has hung up takes nothing."""
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_sendall(stream, data)


def _datum(rng: Random, transport: str, epoch: int) -> bytes:
    """A frame or a hint with any numbers, with more or fewer bytes than it says."""
    numbers = [rng.choice((0, 0, 1, 2, 3, 2**31, 2**32 - 1)) for _ in range(5)]
    epoch = epoch if rng.random() < 0.8 else rng.choice(INTEGERS)
    if transport != "tcp":
        return HINT.pack(epoch, *numbers)[: rng.choice((HINT.size, HINT.size, rng.randrange(HINT.size)))]
    size = rng.choice((0, 1, 2048, 3 * 2048, 70_000, 2**40, 2**64 - 1))
    head = FRAME.pack(epoch, *numbers[:4], size)
    return head[: rng.choice((FRAME.size, FRAME.size, rng.randrange(FRAME.size)))] + rng.randbytes(min(size, 70_000))
