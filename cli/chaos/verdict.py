"""Compares what a stream brought with an undisturbed run's, and says what the whole run was worth. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    WHOLE = "whole"
    # Every token that was read is right; the client left before the end.
    LEFT = "left"
    WRONG = "wrong token"
    REPEATED = "repeated token"
    LOST = "lost token"
    # Ended early, and said that it was whole.
    SHORT = "short"
    # Told so: an error, or refused to the end.
    FAILED = "failed"
    # Neither an end nor an error.
    NONE = "no outcome"


BAD = (Outcome.WRONG, Outcome.REPEATED, Outcome.LOST, Outcome.SHORT, Outcome.NONE)


@dataclass(frozen=True, slots=True)
class Heard:
    """What a client got: token ids and text, the reason for which it ended, or the error."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    has_left: bool = False


def judged(heard: Heard, expected: Heard) -> Outcome:
    """``expected``: of the undisturbed run."""
    ids, right = heard.token_ids, expected.token_ids
    if ids != right[: len(ids)]:
        return _difference(ids, right)
    if heard.has_left:
        return Outcome.LEFT
    if heard.error is not None:
        return Outcome.FAILED
    if heard.finish_reason is None:
        return Outcome.NONE
    if len(ids) < len(right):
        return Outcome.SHORT
    is_same = (heard.text, heard.finish_reason) == (expected.text, expected.finish_reason)
    return Outcome.WHOLE if is_same else Outcome.WRONG


def _difference(ids: Sequence[int], right: Sequence[int]) -> Outcome:
    """Of ids that are no beginning of the right ones: where they part, they may go on further back or further on."""
    first = next((i for i, pair in enumerate(zip(ids, right, strict=False)) if pair[0] != pair[1]), len(right))
    rest = tuple(ids[first:])
    jumps = ((Outcome.REPEATED, range(first - 1, -1, -1)), (Outcome.LOST, range(first + 1, len(right))))
    for outcome, starts in jumps:
        if any(tuple(right[start : start + len(rest)]) == rest for start in starts):
            return outcome
    return Outcome.WRONG


@dataclass(frozen=True, slots=True)
class Ledger:
    """Blocks at the end. ``held``: by owners that should be gone; ``off``: by which a node's sum is wrong."""

    nodes: int
    unreachable: int
    held: int
    off: int

    @property
    def is_right(self) -> bool:
        return not (self.unreachable or self.held or self.off)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reasons``: why the run failed; empty if it passed."""

    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.reasons


def verdict(outcomes: Mapping[Outcome, int], ledger: Ledger, num_struck: int) -> Verdict:
    counts = Counter(outcomes)
    reasons = [f"{counts[outcome]} streams: {outcome.value}" for outcome in BAD if counts[outcome]]
    if ledger.unreachable:
        reasons.append(f"{ledger.unreachable} nodes did not give their ledger")
    if ledger.held:
        reasons.append(f"{ledger.held} blocks are held after all requests have ended")
    if ledger.off:
        reasons.append(f"{ledger.off} blocks are neither free nor held")
    if not counts[Outcome.WHOLE]:
        reasons.append("no stream was whole")
    if not num_struck:
        reasons.append("no fault struck, so nothing was shown")
    return Verdict(tuple(reasons))
