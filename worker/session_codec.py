"""What sessions carry, from and to protobuf: a request becomes a message of the router, messages become a response."""

from __future__ import annotations

from baton import codec
from baton.defects import Defects
from baton.errors import InvalidRequest, quoted, shortened
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
from baton.types import Embedding, Lease, PromptLogprobs, TokenChunk
from baton.v1 import common_pb2, node_pb2

# Of what a router says why it cancels, for logs.
_MAX_REASON_CHARS = 300


class Unreadable(Exception):
    """A run, reservation or migration that cannot be read; the session goes on."""

    def __init__(
        self, sequence_id: str, cause: Exception, answer: type[Refused | SequenceFailed | NotMigrated]
    ) -> None:
        super().__init__(str(cause))
        self._sequence_id = sequence_id
        self._cause = cause
        self._answer = answer

    def refusal(self, defects: Defects) -> NodeMessage:
        failure = defects.failure("session", self._cause, quoted(self._sequence_id))
        return self._answer(self._sequence_id, failure)


def message_from_pb(request: node_pb2.SessionRequest) -> RouterMessage:
    """Raises Unreadable for a sequence that is refused, and InvalidRequest if the router broke the protocol."""
    kind = request.WhichOneof("message")
    match kind:
        case "run":
            run = request.run
            try:
                spec = codec.sequence_from_pb(run.sequence)
                lease = codec.lease_from_pb(run.lease) if run.HasField("lease") else None
            except Exception as error:
                raise Unreadable(run.sequence.sequence_id, error, SequenceFailed) from error
            return Run(spec, lease)
        case "reserve":
            reserve = request.reserve
            try:
                spec = codec.sequence_from_pb(reserve.sequence)
            except Exception as error:
                raise Unreadable(reserve.sequence.sequence_id, error, Refused) from error
            return Reserve(spec, reserve.ttl_s, reserve.prefill_node_id, reserve.num_headroom_tokens)
        case "migrate":
            migrate = request.migrate
            try:
                return Migrate(migrate.sequence_id, codec.lease_from_pb(migrate.lease))
            except Exception as error:
                raise Unreadable(migrate.sequence_id, error, NotMigrated) from error
        case "cancel":
            return Cancel(request.cancel.sequence_id, shortened(request.cancel.reason, _MAX_REASON_CHARS))
        case _:
            raise InvalidRequest(f"a session carries {kind} after its hello, expected run, reserve, migrate or cancel")


class Composer:
    """Puts messages into one response; consecutive tokens of a sequence are merged, for routers that read slowly."""

    def __init__(self) -> None:
        self._response = node_pb2.SessionResponse()
        self._tokens: dict[str, common_pb2.Tokens] = {}
        self._all_tokens: list[common_pb2.Tokens] = []

    def add(self, message: NodeMessage) -> None:  # noqa: C901 - one case per message
        response = self._response
        match message:
            case TokenChunk():
                self._add_tokens(message)
            case Lease():
                response.reserved.append(codec.lease_to_pb(message))
            case Refused(sequence_id, failure):
                response.refused.add(sequence_id=sequence_id, failure=codec.failure_to_pb(failure))
            case PromptLogprobs(sequence_id, index, logprobs):
                reports = map(codec.logprobs_to_pb, logprobs)
                response.prompt_logprobs.add(sequence_id=sequence_id, index=index, logprobs=reports)
            case Embedding(sequence_id, values):
                response.embeddings.add(sequence_id=sequence_id, values=values)
            case PrefillDone():
                response.prefills.add(
                    sequence_id=message.sequence_id,
                    queue_s=message.queue_s,
                    compute_s=message.compute_s,
                    num_computed_tokens=message.num_computed_tokens,
                    num_cached_tokens=message.num_cached_tokens,
                )
            case Joined(sequence_id, wait_s):
                response.joined.add(sequence_id=sequence_id, wait_s=wait_s)
            case HandedOff(sequence_id, report):
                response.handed_off.add(sequence_id=sequence_id, report=codec.report_to_pb(report))
            case NotMigrated(sequence_id, failure):
                response.not_migrated.add(sequence_id=sequence_id, failure=codec.failure_to_pb(failure))
            case CacheChanged():
                self._cache(message)
            case SequenceFailed(sequence_id, failure):
                response.failed.add(sequence_id=sequence_id, failure=codec.failure_to_pb(failure))

    def response(self) -> node_pb2.SessionResponse:
        self._response.tokens.extend(self._all_tokens)
        return self._response

    def _cache(self, message: CacheChanged) -> None:
        change = self._response.cache
        assert not change.number, "changes are put together before"
        change.number = message.number
        change.stored = _key_bytes(message.stored)
        change.dropped = _key_bytes(message.dropped)
        change.is_snapshot = message.is_snapshot

    def _add_tokens(self, chunk: TokenChunk) -> None:
        known = self._tokens.get(chunk.sequence_id)
        if known is None or known.index + len(known.token_ids) != chunk.index:
            message = self._tokens[chunk.sequence_id] = codec.tokens_to_pb(chunk)
            self._all_tokens.append(message)
            return
        known.token_ids.extend(chunk.token_ids)
        known.logprobs.extend(codec.logprobs_to_pb(position) for position in chunk.logprobs)
        known.finish_reason = codec.finish_to_pb(chunk.finish_reason)


def _key_bytes(keys: tuple[int, ...]) -> bytes:
    return b"".join(key.to_bytes(KEY_BYTES, "little") for key in keys)
