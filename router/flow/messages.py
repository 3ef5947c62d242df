"""Events that a sequence's flow takes, actions that it asks for, and its outcomes.

The dispatcher feeds events and carries actions out. The messages between router and node are in
`baton/node_messages.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from baton import errors
from baton.node_messages import NodeMessage, RouterMessage
from baton.observe import FailedAttempt
from baton.prefix import PrefixScheme, key_of
from baton.types import Embedding, FinishReason, PromptLogprobs, SequenceSpec, TokenChunk
from router.cluster.load import Placement
from router.cluster.rebalance import MoveReason
from router.flow.move import MoveOutcome

# Blocks of a prompt that are hashed at first; then as many as there are.
_FIRST_HASHED = 8


class Phase(Enum):
    QUEUED = "queued"
    RESERVING = "reserving"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    # Every token is out, the outcome is fixed; only the report of the transfer is missing.
    SETTLING = "settling"
    ENDED = "ended"


class Prompt:
    """One prompt, shared by every choice and attempt that runs it.

    What is encoded belongs to the session layer: a prompt of 100,000 tokens takes 5 ms to serialize, once.
    """

    __slots__ = ("_hashes", "_is_scored", "_keys", "_scheme", "cache_salt", "encoded", "encoded_spec", "num_choices",
                 "token_ids")  # fmt: skip

    def __init__(
        self, token_ids: tuple[int, ...], cache_salt: bytes = b"", num_choices: int = 1, *, is_scored: bool = False
    ) -> None:
        """``cache_salt``: only sequences of one salt share KV blocks. One that ``is_scored`` is computed whole by each
        choice, whatever blocks its node holds."""
        self.token_ids = token_ids
        self.cache_salt = cache_salt
        self.num_choices = 1 if is_scored else num_choices
        self._is_scored = is_scored
        self._scheme: PrefixScheme | None = None
        self._hashes: list[bytes] = []
        self._keys: list[int] = []
        self.encoded: bytes | None = None
        # The other fields of the sequence that was encoded last: a run says the same as the reservation before it.
        self.encoded_spec: tuple[SequenceSpec, bytes] | None = None

    def keys(self, scheme: PrefixScheme) -> Iterator[int]:
        """Of its full blocks, once for all choices and attempts, and no further than they are asked for: of most
        prompts no node holds anything, and 100,000 tokens take 6 ms."""
        if self._scheme is not scheme:
            self._scheme, self._hashes, self._keys = scheme, [], []
        size = scheme.layout.block_tokens
        num_blocks = 0 if self._is_scored else len(self.token_ids) // size
        for index in range(num_blocks):
            if index == len(self._keys):
                stop = size * min(num_blocks, max(_FIRST_HASHED, 2 * index))
                self._hashes = scheme.block_hashes(
                    self.token_ids[:stop], len(self.token_ids), salt=self.cache_salt, known=self._hashes
                )
                self._keys += map(key_of, self._hashes[index:])
            yield self._keys[index]


class OutcomeKind(Enum):
    FINISHED = "finished"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a sequence ended. FINISHED has a reason, every other kind an error."""

    kind: OutcomeKind
    finish_reason: FinishReason | None = None
    error: errors.BatonError | None = None


# ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Begin:
    pass


@dataclass(frozen=True, slots=True)
class Placed:
    placement: Placement
    # The rule that chose these nodes.
    reason: str = ""


@dataclass(frozen=True, slots=True)
class NoNodeAvailable:
    """No node is available at all."""


@dataclass(frozen=True, slots=True)
class NodeAvailable:
    """A node is available again."""


@dataclass(frozen=True, slots=True)
class FromNode:
    """A message of a node, about one of the sequence's attempts."""

    node_id: str
    message: NodeMessage


@dataclass(frozen=True, slots=True)
class NodeLost:
    node_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ClientCancelled:
    reason: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """The router gives up on the sequence: shutdown, a changed model."""

    error: errors.BatonError


@dataclass(frozen=True, slots=True)
class StopText:
    """A stop string was found in the text."""


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """Others need the place: wait in the queue again, and go on from there."""


@dataclass(frozen=True, slots=True)
class MoveTo:
    """Go on at another node, without a break; ignored if the sequence cannot move now (`Flow.can_move`)."""

    target_id: str
    reason: MoveReason
    # That it may generate until it has moved.
    num_headroom_tokens: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed `wake_at_s`."""


Event = (
    FromNode | Begin | Placed | NoNodeAvailable | NodeAvailable | NodeLost | ClientCancelled | Abandon | StopText
    | MakeRoom | MoveTo | Tick
)  # fmt: skip


# ── Actions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Enqueue:
    """Find a placement and answer Placed. Sequences that already ran go first."""

    is_rerun: bool


@dataclass(frozen=True, slots=True)
class ToNode:
    node_id: str
    message: RouterMessage
    # Of the message's sequence.
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Detach:
    """The attempt is over: nothing that still arrives under its sequence id matters."""

    sequence_id: str


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """For the log: another attempt follows."""

    sequence_id: str
    failure: FailedAttempt


@dataclass(frozen=True, slots=True)
class MoveOver:
    """Exactly one for each MoveTo that was not ignored."""

    source_id: str
    target_id: str
    reason: MoveReason
    outcome: MoveOutcome
    # What a node said of it.
    why: str = ""


@dataclass(frozen=True, slots=True)
class NodeFull:
    node_id: str


@dataclass(frozen=True, slots=True)
class PairFailed:
    placement: Placement


@dataclass(frozen=True, slots=True)
class PairWorked:
    placement: Placement


@dataclass(frozen=True, slots=True)
class End:
    outcome: Outcome


# What was asked of the prompt and new tokens are for the reader; how the sequence ends is said by the Outcome.
Action = (
    ToNode | Enqueue | PromptLogprobs | Embedding | TokenChunk | Detach | AttemptFailed | MoveOver | NodeFull
    | PairFailed | PairWorked | End
)  # fmt: skip
