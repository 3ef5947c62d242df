"""The data between scheduler and runner: live sequences, step plans, sampled tokens. No torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from baton.types import PositionLogprobs, SamplingParams, SequenceSpec, TokenChunk
from engine.pooling import Pool

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TokenMask(Protocol):
    """Which tokens may come next; asked when a step that draws one is launched, in the engine thread.

    What it says depends on the tokens alone. It raises for a sequence that cannot go on.
    """

    @property
    def is_ready(self) -> bool:
        """It can be asked. Until then no token is drawn; it becomes true in any thread, and stays so."""
        ...

    @property
    def follows_tokens(self) -> bool:
        """What it says is not always the same: the host has to know a token before it can tell the mask behind it."""
        ...

    def is_over(self, token_ids: Seq[int]) -> bool:
        """No token may follow these, prompt included: the sequence ends here."""
        ...

    def bits(self, token_ids: Seq[int]) -> bytes:
        """After these, prompt included: bit i % 8 of byte i / 8 allows token i; filled up to whole words of 32 bits."""
        ...


class Sequence:
    """The tokens of one request on this node. Written by the scheduler alone; read by the runner while it launches a
    step or takes in its result.

    Invariant: ``len(block_ids) * block_tokens >= num_computed`` and ``0 <= num_computed <= len(token_ids)``.
    """

    __slots__ = ("block_hashes", "block_ids", "first_scored", "max_total_tokens", "num_computed", "pool", "spec",
                 "token_ids", "token_mask")  # fmt: skip

    def __init__(self, spec: SequenceSpec) -> None:
        self.spec = spec
        # The spec's, which computes it anew each time.
        self.max_total_tokens = spec.max_total_tokens
        # Prompt, then generated tokens.
        self.token_ids: list[int] = [*spec.prompt_token_ids, *spec.generated_token_ids]
        # Block i holds the KV of positions [i * block_tokens, (i + 1) * block_tokens). The pool's own list, not a copy.
        self.block_ids: Seq[int] = ()
        # Of the leading full blocks of the known tokens, as far as they were asked for; see PrefixCache.
        self.block_hashes: Seq[bytes] = ()
        # Tokens whose KV is in the blocks.
        self.num_computed = 0
        # A position is scored by reporting the log-probability of the prompt token behind it. The first one that is to
        # be scored, behind all there are if there is none: tokens follow a prompt that was scored. For a mean all
        # positions count the same way.
        sampling, is_new = spec.sampling, not spec.generated_token_ids
        wants_scores = sampling.prompt_logprobs is not None or sampling.pooling == "mean"
        self.first_scored = 0 if wants_scores and is_new else sys.maxsize
        # What the embedding is made of: the hidden states of the positions that are scored and of the one that samples.
        self.pool = Pool() if sampling.pooling and is_new else None
        # None allows all.
        self.token_mask: TokenMask | None = None

    @property
    def sequence_id(self) -> str:
        return self.spec.sequence_id

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.spec.prompt_token_ids)

    def scored(self, start: int, end: int) -> range:
        """The positions of [start, end) that are to be scored."""
        return range(max(start, self.first_scored), min(end, len(self.spec.prompt_token_ids) - 1))


# Positions.
_NONE = range(0)


@dataclass(frozen=True, slots=True)
class Piece:
    """One sequence's part of a step: tokens at positions [start, start + num_tokens) are computed.

    If ``samples``, tokens from position ``end`` on are drawn. A piece that starts where the known tokens end computes
    the token that the step launched before this one draws.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    # Of these positions the log-probability of the next prompt token is reported, or the hidden state pooled.
    scored: range = _NONE

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def token_is_on_device(self) -> bool:
        """The host does not know the token yet; true only until the step before this one is applied."""
        return self.start == len(self.sequence.token_ids)


class StepShape(NamedTuple):
    """What decides how long a step takes."""

    num_prompt_tokens: int = 0
    # (query, key) pairs of these.
    num_prompt_pairs: int = 0
    # Sequences that decode, and the tokens in their KV.
    num_decoding: int = 0
    num_kv_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.num_prompt_tokens or self.num_decoding)

    def with_prompt(self, start: int, num_tokens: int) -> StepShape:
        """And ``num_tokens`` of a prompt, from position ``start`` on."""
        num_pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return self._replace(
            num_prompt_tokens=self.num_prompt_tokens + num_tokens, num_prompt_pairs=self.num_prompt_pairs + num_pairs
        )


NO_SHAPE = StepShape()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One engine step. Pieces of different sequences are independent; their order never changes a result."""

    pieces: tuple[Piece, ...]
    # Empty for a plan that is not measured.
    shape: StepShape = NO_SHAPE
    # Those that decode without a piece each; see `Scheduler.schedule`.
    in_bulk: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum([p.num_tokens for p in self.pieces])


def drawn_chunk(sequence: Sequence, token_id: int, logprobs: PositionLogprobs | None) -> TokenChunk:
    """One token, drawn behind all that ``sequence`` has."""
    reports = () if logprobs is None else (logprobs,)
    return TokenChunk(sequence.sequence_id, sequence.num_generated, (token_id,), reports)


@dataclass(frozen=True, slots=True)
class StepResult:
    """By sequence id, one entry in one of the first two for every piece that samples."""

    # The drawn tokens, at least one, as if none ended the sequence: the scheduler decides that. The KV of all of them
    # but the last is in the sequence's blocks.
    sampled: dict[str, TokenChunk] = field(default_factory=dict)
    # Why there is no token for this sequence; the other sequences of the step have theirs.
    failed: dict[str, Exception] = field(default_factory=dict)
    # Of the prompt tokens behind the positions that were scored; a sequence that failed may have none.
    scored: dict[str, tuple[PositionLogprobs, ...]] = field(default_factory=dict)
    # [positions, features]: of sequences with a pool, of the positions that were scored, then the one that samples.
    hidden: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def changes_logits(params: SamplingParams, num_generated: int) -> bool:
    """Whether the next token is drawn from other logits than the model's."""
    return bool(params.logit_bias or banned_ids(params, num_generated) or has_penalty(params))


def banned_ids(params: SamplingParams, num_generated: int) -> tuple[int, ...]:
    return params.stop_token_ids if num_generated < params.min_tokens else ()


def has_penalty(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)
