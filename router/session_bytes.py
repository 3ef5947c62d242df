"""The messages of a node's session: commands to bytes, node messages to events. Knows the wire's fields and no node.

A prompt of 100,000 tokens takes protobuf 2 ms to build, 2 ms to put into another message and 1 ms to serialize. It is
sent once for each choice and again for each attempt, to two nodes. So it is serialized once, and each message is put
together around those bytes: fields of a message may come in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol, TypeVar

from baton import codec, errors
from baton.address import as_dialled
from baton.defects import Defects
from baton.types import Failure, NodeStatus, SequenceSpec
from baton.v1 import common_pb2, node_pb2
from router.flow_messages import (
    Command,
    HandedOff,
    Joined,
    NodeEvent,
    PrefillDone,
    Prompt,
    Refused,
    Reserved,
    SendCancel,
    SendReserve,
    SendRun,
    SequenceFailed,
    Tokens,
)

_Request = node_pb2.SessionRequest
_LENGTH_DELIMITED = 2


def encode(command: Command) -> bytes:
    """A SessionRequest. Raises ValueError for ids that no message can hold."""
    match command:
        case SendReserve():
            others = _Request.Reserve(ttl_s=command.ttl_s, prefill_node_id=command.prefill_id).SerializeToString()
            sequence = _nested(_Request.Reserve.SEQUENCE_FIELD_NUMBER, *_sequence(command.spec, command.prompt))
            return b"".join(_nested(_Request.RESERVE_FIELD_NUMBER, *sequence, others))
        case SendRun():
            lease = None if command.lease is None else codec.lease_to_pb(command.lease)
            others = _Request.Run(lease=lease).SerializeToString()
            sequence = _nested(_Request.Run.SEQUENCE_FIELD_NUMBER, *_sequence(command.spec, command.prompt))
            return b"".join(_nested(_Request.RUN_FIELD_NUMBER, *sequence, others))
        case SendCancel():
            cancel = node_pb2.Cancel(sequence_id=command.sequence_id, reason=command.reason)
            return _Request(cancel=cancel).SerializeToString()


def _sequence(spec: SequenceSpec, prompt: Prompt) -> tuple[bytes, bytes]:
    """The fields of a Sequence."""
    if prompt.encoded is None:
        prompt.encoded = common_pb2.Sequence(prompt_token_ids=prompt.token_ids).SerializeToString()
    if prompt.encoded_spec is None or prompt.encoded_spec[0] is not spec:
        others = common_pb2.Sequence(
            sequence_id=spec.sequence_id,
            generated_token_ids=spec.generated_token_ids,
            sampling=codec.sampling_to_pb(spec.sampling),
        )
        prompt.encoded_spec = spec, others.SerializeToString()
    return prompt.encoded_spec[1], prompt.encoded


def _nested(field_number: int, *parts: bytes) -> tuple[bytes, ...]:
    """A field that holds a message: its tag, its length, and the message's own bytes."""
    return (_varint(field_number << 3 | _LENGTH_DELIMITED), _varint(sum(map(len, parts))), *parts)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


class _OfSequence(Protocol):
    """An item of a node's message, which belongs to one sequence."""

    @property
    def sequence_id(self) -> str: ...


_ItemT = TypeVar("_ItemT", bound=_OfSequence)


class Reader:
    """Decodes the messages of one node.

    An item that cannot be decoded fails its own sequence, and the failure is blamed on the node; the other items of the
    message are not affected.
    """

    def __init__(self, node_id: str, address: str, defects: Defects) -> None:
        self._node_id = node_id
        self._address = address
        self._defects = defects

    def events(self, message: node_pb2.SessionResponse) -> list[NodeEvent]:
        events: list[NodeEvent] = []
        self._read(message.reserved, self._reserved, events)
        self._read(message.refused, _refused, events)
        self._read(message.prefills, _prefill_done, events)
        self._read(message.joined, _joined, events)
        self._read(message.handed_off, _handed_off, events)
        # Tokens before failures: a sequence that is complete has not failed.
        self._read(message.tokens, self._tokens, events)
        self._read(message.failed, self._failed, events)
        return events

    def status(self, message: node_pb2.SessionResponse) -> NodeStatus | None:
        """None if there is none, or none that can be decoded: the previous one then stays."""
        if message.HasField("status"):
            with self._defects.contained("message", f"status of {self._node_id}"):
                return codec.status_from_pb(message.status)
        return None

    def _read(self, items: Iterable[_ItemT], event_of: Callable[[_ItemT], NodeEvent], events: list[NodeEvent]) -> None:
        for item in items:
            try:
                events.append(event_of(item))
            except Exception as error:
                about = errors.quoted(f"{item.sequence_id} from {self._node_id}")
                failure = Failure.of(self._defects.caught("message", error, about), self._node_id)
                events.append(SequenceFailed(self._node_id, item.sequence_id, failure))

    def _reserved(self, message: common_pb2.Lease) -> NodeEvent:
        lease = codec.lease_from_pb(message)
        return Reserved(replace(lease, address=as_dialled(lease.address, self._address)))

    def _tokens(self, message: common_pb2.Tokens) -> NodeEvent:
        return Tokens(self._node_id, codec.tokens_from_pb(message))

    def _failed(self, message: node_pb2.SequenceFailed) -> NodeEvent:
        return SequenceFailed(self._node_id, message.sequence_id, codec.failure_from_pb(message.failure))


def _prefill_done(message: node_pb2.SessionResponse.PrefillDone) -> NodeEvent:
    queue_s = codec.duration_from_pb("queue_s", message.queue_s)
    compute_s = codec.duration_from_pb("compute_s", message.compute_s)
    return PrefillDone(message.sequence_id, queue_s, compute_s, message.num_computed_tokens, message.num_cached_tokens)


def _handed_off(message: node_pb2.SessionResponse.HandedOff) -> NodeEvent:
    return HandedOff(message.sequence_id, codec.report_from_pb(message.report))


def _refused(message: node_pb2.SequenceFailed) -> NodeEvent:
    return Refused(message.sequence_id, codec.failure_from_pb(message.failure))


def _joined(message: node_pb2.SessionResponse.Joined) -> NodeEvent:
    return Joined(message.sequence_id, codec.duration_from_pb("wait_s", message.wait_s))
