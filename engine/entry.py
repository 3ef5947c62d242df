"""The scheduling state of a sequence: which tokens are computed, in a running step, or still to be planned."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from engine.step import Piece, Sequence

# (rank, priority, number): smaller goes first.
Order = tuple[int, int, int]


class Phase(Enum):
    # Wants blocks.
    WAITING = 1
    # Has blocks, is computed.
    ACTIVE = 2
    # Stopped between two tokens with its blocks; waits for release() or resume().
    HELD = 3
    # Over; its blocks wait for the end of a step, or for release().
    ENDED = 4


class Leader(NamedTuple):
    """Another sequence that is computing what this one lacks."""

    entry: Entry
    # Leading blocks that both have in common.
    num_common: int

    @property
    def is_computing(self) -> bool:
        return self.entry.phase is Phase.ACTIVE and self.entry.num_stored < self.num_common


class Entry:
    """One sequence as the scheduler sees it. Plans board and land; all else the scheduler writes itself."""

    __slots__ = (
        "arrived_s",
        "came_s",
        "hands_off",
        "is_overtaken",
        "is_prefilled",
        "is_released",
        "leader",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_total",
        "num_flights",
        "num_preemptions",
        "num_stored",
        "num_underway",
        "num_unknown",
        "order",
        "phase",
        "sequence",
        "started_s",
    )

    def __init__(self, sequence: Sequence, *, order: Order, now: float) -> None:
        self.sequence = sequence
        # It stops at the next place between two tokens, see ``can_hand_off``.
        self.hands_off = False
        # The rank is 0, and the priority too, for sequences that were preempted too often or whose prompt waited too
        # long, else 1. The number rises in the order they came.
        self.order = order
        self.phase = Phase.WAITING
        self.num_preemptions = 0
        # Of the plans that are under way: how many it is in, tokens they compute, tokens they draw.
        self.num_flights = 0
        self.num_underway = 0
        self.num_unknown = 0
        # The pieces under way will be dropped. They still read and write its blocks.
        self.is_overtaken = False
        # Has drawn a token here, or came with one: it decodes.
        self.is_prefilled = False
        # No reader outside has the blocks.
        self.is_released = True
        # While they are lent: the KV of so many tokens has room in those that the reader knows.
        self.max_tokens: int | None = None
        self.arrived_s = now
        # The same, or when it was last preempted: since then it waits for its prompt to be computed.
        self.came_s = now
        self.started_s: float | None = None
        self.num_computed_total = 0
        # Tokens whose KV was there when it started; before that, when it came.
        self.num_cached_tokens = 0
        # Leading blocks that the prefix cache has been told of, or was asked for.
        self.num_stored = 0
        # While it waits: it starts when this one has what both begin with.
        self.leader: Leader | None = None

    @property
    def sequence_id(self) -> str:
        return self.sequence.sequence_id

    @property
    def num_remaining(self) -> int:
        return len(self.sequence.token_ids) - self.sequence.num_computed

    @property
    def num_expected(self) -> int:
        """Tokens that remain to be computed, as far as one can tell before it starts."""
        return self.num_remaining - (self.num_cached_tokens if self.started_s is None else 0)

    @property
    def start(self) -> int:
        """Where the next piece starts."""
        return self.sequence.num_computed + self.num_underway

    @property
    def num_unplanned(self) -> int:
        """Tokens, one that is being drawn included, that are neither computed nor under way."""
        return len(self.sequence.token_ids) + self.num_unknown - self.start

    @property
    def is_decoding(self) -> bool:
        """All but the newest token, which it draws here or came with, is computed or under way."""
        return (self.is_prefilled or self.num_unknown > 0) and self.num_unplanned == 1

    @property
    def is_ending(self) -> bool:
        """Nothing more of it is to be planned: it is to stop here, its reader knows no further block, or the token that
        is being drawn is the last one."""
        if self.has_filled_loan or (self.hands_off and self.is_decoding):
            return True
        max_tokens = self.sequence.spec.sampling.max_tokens
        return self.num_unknown > 0 and self.sequence.num_generated + self.num_unknown == max_tokens

    @property
    def can_lend(self) -> bool:
        """It decodes, with the KV of all tokens but the newest, and has no reader outside."""
        is_whole = self.is_prefilled and self.num_remaining == 1 and not self.is_overtaken
        return is_whole and self.phase is Phase.ACTIVE and self.is_released

    @property
    def is_lent(self) -> bool:
        """A reader outside has the blocks while it goes on here."""
        return self.phase is Phase.ACTIVE and not self.is_released and not self.hands_off

    @property
    def has_filled_loan(self) -> bool:
        """The next token's KV would be in a block that its reader does not know."""
        return self.max_tokens is not None and self.start >= self.max_tokens

    @property
    def can_hand_off(self) -> bool:
        """It is to stop, the KV of all tokens but the newest is there, and no step reads or writes its blocks."""
        return self.hands_off and self.phase is Phase.ACTIVE and not self.num_flights and self.is_decoding

    @property
    def is_ready(self) -> bool:
        """What its tokens are drawn by is there."""
        mask = self.sequence.token_mask
        return mask is None or mask.is_ready

    @property
    def needs_host(self) -> bool:
        """The token that is being drawn decides which may follow it, and only the host can tell."""
        mask = self.sequence.token_mask
        return self.num_unknown > 0 and mask is not None and mask.follows_tokens

    def board(self, piece: Piece) -> None:
        self.num_flights += 1
        self.num_underway += piece.num_tokens
        self.num_unknown += piece.samples

    def land(self, piece: Piece) -> None:
        self.num_flights -= 1
        if not self.is_overtaken:
            self.num_underway -= piece.num_tokens
            self.num_unknown -= piece.samples
        elif not self.num_flights:
            self.is_overtaken = False

    def overtake(self) -> None:
        """A step drew several tokens: what was planned ahead of it starts in the wrong place."""
        if self.num_flights:
            self.is_overtaken = True
            self.num_underway = 0
            self.num_unknown = 0


def in_order(entry: Entry) -> Order:
    return entry.order
