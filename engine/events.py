"""What the engine tells of its sequences."""

from __future__ import annotations

from dataclasses import dataclass

from baton.types import Embedding, Failure, PromptLogprobs, TokenChunk


@dataclass(frozen=True, slots=True)
class PrefillTimes:
    """How the prompt went: waiting for its first chunk, then computing until the token was drawn."""

    queue_s: float
    compute_s: float
    num_computed_tokens: int
    # Leading tokens whose KV was there.
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """A sequence that is to be handed over has all its blocks; its first chunk is in the step that begins now."""

    sequence_id: str
    block_ids: tuple[int, ...]
    # The first of these are final.
    num_cached_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens; ``prefill`` is set with the first one."""

    sequence_id: str
    chunk: TokenChunk
    prefill: PrefillTimes | None = None


@dataclass(frozen=True, slots=True)
class Handoff:
    """The sequence stopped between two tokens; its blocks stay until ``release``, or ``resume`` lets it go on here.

    ``tokens``: all that were generated here or came with ``join``. Another node that has the blocks and the tokens goes
    on with the same token ids.
    """

    sequence_id: str
    tokens: TokenChunk
    # These hold the KV of all tokens but the last, and do not change any more.
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The step this sequence was in went wrong, or its own token did; it will get no more."""

    sequence_id: str
    failure: Failure


# What was scored of a prompt is its PromptLogprobs: before the first Output, in order, without gaps. So its Embedding.
EngineEvent = Started | PromptLogprobs | Embedding | Output | Handoff | Failed
