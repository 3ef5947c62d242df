"""Bounded rings of a node's recent activity: engine steps, transfers, writes, arrivals, by its own monotonic clock.

Any thread may append; an append costs a microsecond or two. Metrics do not depend on the rings, so a full ring loses
no count. Times cannot be compared with those of another machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple, TypeVar

_MAX_STEPS = 8192
_MAX_TRANSFERS = 2048
_MAX_WRITES = 16384
# Upper bound on the prompts that a step names.
_MAX_NAMES = 8


class Step(NamedTuple):
    """One engine step. ``prompts`` names the sequences whose prompts it computed, the first few of them."""

    started_s: float
    ended_s: float
    num_prompt_tokens: int
    num_decoding: int
    prompts: tuple[str, ...]
    # (query, key) pairs of the prompt tokens, and tokens in the KV of the sequences that decode.
    num_prompt_pairs: int = 0
    num_kv_tokens: int = 0
    # From the end of the step before, or from when work came to an idle engine, to its end.
    turn_s: float = 0.0


class Transfer(NamedTuple):
    """A transfer that arrived; the report's times are differences of these three."""

    sequence_id: str
    target: str
    transport: str
    is_layerwise: bool
    num_bytes: int
    started_s: float
    # When the prompt's computation had ended and the commit was requested.
    computed_s: float
    ended_s: float


class Write(NamedTuple):
    """A lane at work on some layers of one sequence."""

    sequence_id: str
    lane: int
    layer: int
    num_layers: int
    num_bytes: int
    started_s: float
    ended_s: float


class Join(NamedTuple):
    """A sequence whose KV was verified; it decodes here from then on."""

    sequence_id: str
    at_s: float


class Recorded(NamedTuple):
    """All that is kept, oldest first."""

    steps: list[Step]
    transfers: list[Transfer]
    writes: list[Write]
    joins: list[Join]


_Span = TypeVar("_Span", Step, Transfer, Write, Join)


class Timeline:
    """The rings of one node."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque(maxlen=_MAX_STEPS)
        self._transfers: deque[Transfer] = deque(maxlen=_MAX_TRANSFERS)
        self._writes: deque[Write] = deque(maxlen=_MAX_WRITES)
        self._joins: deque[Join] = deque(maxlen=_MAX_TRANSFERS)

    def step(
        self,
        started_s: float,
        ended_s: float,
        num_prompt_tokens: int,
        num_decoding: int,
        prompts: Iterable[str],
        num_prompt_pairs: int = 0,
        num_kv_tokens: int = 0,
        turn_s: float = 0.0,
    ) -> None:
        names = tuple(islice(prompts, _MAX_NAMES))
        self._steps.append(
            Step(started_s, ended_s, num_prompt_tokens, num_decoding, names, num_prompt_pairs, num_kv_tokens, turn_s)
        )

    def transfer(self, transfer: Transfer) -> None:
        self._transfers.append(transfer)

    def write(self, write: Write) -> None:
        self._writes.append(write)

    def joined(self, sequence_id: str, at_s: float) -> None:
        self._joins.append(Join(sequence_id, at_s))

    def since(self, from_s: float) -> Recorded:
        """The entries that ended at ``from_s`` or later."""
        return Recorded(
            _since(self._steps, lambda x: x.ended_s >= from_s),
            _since(self._transfers, lambda x: x.ended_s >= from_s),
            _since(self._writes, lambda x: x.ended_s >= from_s),
            _since(self._joins, lambda x: x.at_s >= from_s),
        )


def _since(ring: deque[_Span], is_recent: Callable[[_Span], bool]) -> list[_Span]:
    # deque.copy() is atomic; iterating would raise when another thread appends.
    return [x for x in ring.copy() if is_recent(x)]
