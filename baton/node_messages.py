"""The messages of a session, and the events and actions that both machines of a node share.

Router and node use the same types: `router/nodes/session_bytes.py` and `worker/session_codec.py` convert them.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.types import Embedding, Failure, Lease, PromptLogprobs, SequenceSpec, TokenChunk, TransferReport

# -- messages from a router to a node


@dataclass(frozen=True, slots=True)
class Run:
    """Compute the prompt; with a lease push its KV there, without one generate the tokens here."""

    spec: SequenceSpec
    lease: Lease | None

    @property
    def sequence_id(self) -> str:
        return self.spec.sequence_id


@dataclass(frozen=True, slots=True)
class Reserve:
    """Lease blocks for the sequence to the prefill node; answered by the Lease or by Refused."""

    spec: SequenceSpec
    ttl_s: float
    prefill_node_id: str
    # Tokens that it may generate elsewhere before its KV arrives: room for these is leased as well.
    num_headroom_tokens: int = 0

    @property
    def sequence_id(self) -> str:
        return self.spec.sequence_id


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the sequence in whatever phase it is; an unknown one is ignored."""

    sequence_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move a sequence that decodes here into the lease while it generates; answered by HandedOff or NotMigrated."""

    sequence_id: str
    lease: Lease


RouterMessage = Run | Reserve | Migrate | Cancel

# -- messages from a node to a router; a granted reservation is its Lease, new tokens are their TokenChunk, and what was
# -- scored of a prompt its PromptLogprobs


@dataclass(frozen=True, slots=True)
class Refused:
    """The decode node did not grant a lease."""

    sequence_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt is computed; sent with its first token."""

    sequence_id: str
    queue_s: float
    compute_s: float
    num_computed_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Joined:
    """The sequence's KV is verified and the sequence is in the decode node's running batch."""

    sequence_id: str
    # From the lease's grant to the verified commit.
    wait_s: float


@dataclass(frozen=True, slots=True)
class HandedOff:
    """The decode node has acknowledged; the prefill node has returned its blocks."""

    sequence_id: str
    report: TransferReport


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """The sequence ended on this node without being finished."""

    sequence_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class NotMigrated:
    """The sequence was to move, and goes on here."""

    sequence_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class CacheChanged:
    """Blocks that the node finds by hash from now on, and those that it finds no more; about no sequence.

    A hash is named by its key, see baton.prefix.key_of. ``number`` counts the changes of the node's cache up to these.
    """

    number: int
    stored: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    # ``stored`` is all that the node has; what was known of it before is void.
    is_snapshot: bool = False

    @property
    def sequence_id(self) -> str:
        """Empty: it is about no sequence."""
        return ""


NodeMessage = (
    Lease | Refused | PromptLogprobs | Embedding | PrefillDone | Joined | TokenChunk | HandedOff | SequenceFailed
    | NotMigrated | CacheChanged
)  # fmt: skip

# -- events and actions of both machines; a session's number is unique in the node's process


@dataclass(frozen=True, slots=True)
class FromRouter:
    """Both machines get every message; each handles those of its phase."""

    session: int
    message: RouterMessage

    @property
    def sequence_id(self) -> str:
        return self.message.sequence_id


@dataclass(frozen=True, slots=True)
class SessionLost:
    session: int

    @property
    def sequence_id(self) -> str:
        """Empty: the event is about all sequences of the session."""
        return ""


@dataclass(frozen=True, slots=True)
class LetGo:
    """A running sequence is to move: the decode machine lets go of it, and the prefill machine has it from now on."""

    session: int
    message: Migrate

    @property
    def sequence_id(self) -> str:
        return self.message.sequence_id


@dataclass(frozen=True, slots=True)
class Defect:
    """An exception was raised while the sequence was handled: it ends on this node, in whatever phase it is."""

    sequence_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Send:
    """Tell the session's router; dropped if the session is over."""

    session: int
    message: NodeMessage

    @property
    def sequence_id(self) -> str:
        return self.message.sequence_id
