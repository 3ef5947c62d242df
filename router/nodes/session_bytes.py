"""The router's end of a session: its messages to bytes, responses to node messages. Knows the wire's fields, no node.

A prompt of 100,000 tokens takes protobuf 2 ms to build, 2 ms to put into another message and 1 ms to serialize. It is
sent once for each choice and again for each attempt, to two nodes. So it is serialized once, and each message is put
together around those bytes: fields of a message may come in any order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol, TypeVar

from baton import codec, errors
from baton.address import as_dialled
from baton.defects import Defects
from baton.node_messages import (
    CacheChanged,
    Cancel,
    HandedOff,
    Joined,
    Migrate,
    NodeMessage,
    NotMigrated,
    PrefillDone,
    Refused,
    Reserve,
    RouterMessage,
    Run,
    SequenceFailed,
)
from baton.prefix import KEY_BYTES
from baton.types import Embedding, Failure, Lease, NodeStatus, PromptLogprobs, SequenceSpec
from baton.v1 import common_pb2, node_pb2
from router.flow.messages import Prompt

_Request = node_pb2.SessionRequest
_LENGTH_DELIMITED = 2


def encode(message: RouterMessage, prompt: Prompt) -> bytes:
    """A SessionRequest; ``prompt`` is its sequence's. Raises ValueError for ids that no message can hold."""
    match message:
        case Reserve(spec, ttl_s, prefill_node_id, num_headroom_tokens):
            others = _Request.Reserve(
                ttl_s=ttl_s, prefill_node_id=prefill_node_id, num_headroom_tokens=num_headroom_tokens
            ).SerializeToString()
            sequence = _nested(_Request.Reserve.SEQUENCE_FIELD_NUMBER, *_sequence(spec, prompt))
            return b"".join(_nested(_Request.RESERVE_FIELD_NUMBER, *sequence, others))
        case Run(spec, lease):
            others = _Request.Run(lease=None if lease is None else codec.lease_to_pb(lease)).SerializeToString()
            sequence = _nested(_Request.Run.SEQUENCE_FIELD_NUMBER, *_sequence(spec, prompt))
            return b"".join(_nested(_Request.RUN_FIELD_NUMBER, *sequence, others))
        case Migrate(sequence_id, lease):
            migrate = node_pb2.Migrate(sequence_id=sequence_id, lease=codec.lease_to_pb(lease))
            return _Request(migrate=migrate).SerializeToString()
        case Cancel(sequence_id, reason):
            return _Request(cancel=node_pb2.Cancel(sequence_id=sequence_id, reason=reason)).SerializeToString()


def _sequence(spec: SequenceSpec, prompt: Prompt) -> tuple[bytes, bytes]:
    """The fields of a Sequence."""
    if prompt.encoded is None:
        prompt.encoded = common_pb2.Sequence(prompt_token_ids=prompt.token_ids).SerializeToString()
    if prompt.encoded_spec is None or prompt.encoded_spec[0] is not spec:
        others = common_pb2.Sequence(
            sequence_id=spec.sequence_id,
            generated_token_ids=spec.generated_token_ids,
            sampling=codec.sampling_to_pb(spec.sampling),
            cache_salt=spec.cache_salt,
            priority=spec.priority,
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

    def messages(self, response: node_pb2.SessionResponse) -> list[NodeMessage]:
        """In the order in which they count."""
        found: list[NodeMessage] = []
        if response.HasField("cache"):
            found.append(self._cache_changed(response.cache))
        self._read(response.reserved, self._reserved, found)
        self._read(response.refused, _refused, found)
        self._read(response.prompt_logprobs, _prompt_logprobs, found)
        self._read(response.embeddings, _embedding, found)
        self._read(response.prefills, _prefill_done, found)
        self._read(response.joined, _joined, found)
        # Tokens before failures: a sequence that is complete has not failed. And before the word that the node has let
        # go of their sequence: from then on its tokens come from elsewhere.
        self._read(response.tokens, codec.tokens_from_pb, found)
        self._read(response.handed_off, _handed_off, found)
        self._read(response.not_migrated, _not_migrated, found)
        self._read(response.failed, _failed, found)
        return found

    def status(self, response: node_pb2.SessionResponse) -> NodeStatus | None:
        """None if there is none, or none that can be decoded: the previous one then stays."""
        if response.HasField("status"):
            with self._defects.contained("message", f"status of {self._node_id}"):
                return codec.status_from_pb(response.status)
        return None

    def _read(
        self, items: Iterable[_ItemT], message_of: Callable[[_ItemT], NodeMessage], found: list[NodeMessage]
    ) -> None:  # fmt: skip
        for item in items:
            try:
                found.append(message_of(item))
            except Exception as error:
                about = errors.quoted(f"{item.sequence_id} from {self._node_id}")
                failure = Failure.of(self._defects.caught("message", error, about), self._node_id)
                found.append(SequenceFailed(item.sequence_id, failure))

    def _cache_changed(self, item: node_pb2.SessionResponse.CacheChange) -> CacheChanged:
        with self._defects.contained("message", f"cache of {self._node_id}"):
            return CacheChanged(item.number, _keys(item.stored), _keys(item.dropped), item.is_snapshot)
        # Nothing that was known before is certain.
        return CacheChanged(item.number, (), is_snapshot=True)

    def _reserved(self, item: common_pb2.Lease) -> Lease:
        lease = codec.lease_from_pb(item)
        return replace(lease, address=as_dialled(lease.address, self._address))


def _keys(data: bytes) -> tuple[int, ...]:
    num_keys, rest = divmod(len(data), KEY_BYTES)
    if rest:
        raise errors.InvalidRequest(f"keys take {len(data)} bytes, expected a multiple of {KEY_BYTES}")
    return struct.unpack(f"<{num_keys}Q", data)


def _refused(item: node_pb2.SequenceFailed) -> Refused:
    return Refused(item.sequence_id, codec.failure_from_pb(item.failure))


def _prompt_logprobs(item: node_pb2.SessionResponse.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(item.sequence_id, item.index, tuple(map(codec.logprobs_from_pb, item.logprobs)))


def _embedding(item: node_pb2.SessionResponse.Embedding) -> Embedding:
    if not item.values or len(item.values) % 4:
        raise errors.InvalidRequest(f"an embedding has {len(item.values)} bytes, expected numbers of four bytes")
    return Embedding(item.sequence_id, item.values)


def _prefill_done(item: node_pb2.SessionResponse.PrefillDone) -> PrefillDone:
    queue_s = codec.duration_from_pb("queue_s", item.queue_s)
    compute_s = codec.duration_from_pb("compute_s", item.compute_s)
    return PrefillDone(item.sequence_id, queue_s, compute_s, item.num_computed_tokens, item.num_cached_tokens)


def _joined(item: node_pb2.SessionResponse.Joined) -> Joined:
    return Joined(item.sequence_id, codec.duration_from_pb("wait_s", item.wait_s))


def _handed_off(item: node_pb2.SessionResponse.HandedOff) -> HandedOff:
    return HandedOff(item.sequence_id, codec.report_from_pb(item.report))


def _not_migrated(item: node_pb2.SequenceFailed) -> NotMigrated:
    return NotMigrated(item.sequence_id, codec.failure_from_pb(item.failure))


def _failed(item: node_pb2.SequenceFailed) -> SequenceFailed:
    return SequenceFailed(item.sequence_id, codec.failure_from_pb(item.failure))
