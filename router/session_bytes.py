"""What nodes are told of a sequence, as the bytes of a session's message. Knows the wire's fields and no node.

A prompt of 100,000 tokens takes protobuf 2 ms to build, 2 ms to put into another message and 1 ms to serialize. It is
told once for each choice and again for each attempt, to two nodes. So it is serialized once, and each message is put
together around those bytes: fields of a message may come in any order.
"""

from __future__ import annotations

from baton import codec
from baton.types import SequenceSpec
from baton.v1 import common_pb2, node_pb2
from router.flow_messages import SendCancel, SendReserve, SendRun

_Prefill, _Decode = node_pb2.PrefillSessionRequest, node_pb2.DecodeSessionRequest
_LENGTH_DELIMITED = 2


class Prompt:
    """One prompt, shared by all that is said of it."""

    __slots__ = ("_data", "token_ids")

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self.token_ids = token_ids
        self._data: bytes | None = None

    @property
    def data(self) -> bytes:
        """The field of a Sequence. Raises ValueError for ids that no message can hold."""
        if self._data is None:
            self._data = common_pb2.Sequence(prompt_token_ids=self.token_ids).SerializeToString()
        return self._data


def besides_prompt(spec: SequenceSpec) -> bytes:
    """What a Sequence has beside its prompt; a reservation and the run after it say the same."""
    others = common_pb2.Sequence(
        sequence_id=spec.sequence_id,
        generated_token_ids=spec.generated_token_ids,
        sampling=codec.sampling_to_pb(spec.sampling),
    )
    return others.SerializeToString()


def reserve(action: SendReserve, prompt: Prompt, besides: bytes) -> bytes:
    """A DecodeSessionRequest."""
    others = _Decode.Reserve(ttl_s=action.ttl_s, prefill_node_id=action.prefill_id)
    sequence = _nested(_Decode.Reserve.SEQUENCE_FIELD_NUMBER, besides, prompt.data)
    return b"".join(_nested(_Decode.RESERVE_FIELD_NUMBER, *sequence, others.SerializeToString()))


def run(action: SendRun, prompt: Prompt, besides: bytes) -> bytes:
    """A PrefillSessionRequest."""
    lease = None if action.lease is None else codec.lease_to_pb(action.lease)
    sequence = _nested(_Prefill.Run.SEQUENCE_FIELD_NUMBER, besides, prompt.data)
    return b"".join(_nested(_Prefill.RUN_FIELD_NUMBER, *sequence, _Prefill.Run(lease=lease).SerializeToString()))


def cancel(action: SendCancel) -> bytes:
    """A message of the session that the action names."""
    said = node_pb2.Cancel(sequence_id=action.sequence_id, reason=action.reason)
    message = _Decode(cancel=said) if action.is_decode else _Prefill(cancel=said)
    return message.SerializeToString()


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
