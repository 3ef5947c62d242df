"""Many steps at once that do nothing but decode the same sequences: for simulators, which read tokens only when these
matter.

Pure. Equal to one step after the other in tokens, blocks and cached blocks (`tests/properties/engine/
test_plain_steps_properties.py`), at a cost that hardly depends on the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from baton.types import blocks_for
from engine.blocks import BlockPool
from engine.entry import Entry
from engine.prefix_cache import PrefixCache
from engine.step import StepShape


class PlainSteps(NamedTuple):
    """What the next steps are, unless something arrives, leaves or is to stop meanwhile."""

    # At most; a sequence may end in the last one of them, not before.
    num_steps: int
    # Of the first; each further one has a token more in the KV of each sequence.
    shape: StepShape
    # None of them may begin at this time or later: the order of what waits changes then.
    until_s: float


def limit(entries: Sequence[Entry], pool: BlockPool, block_tokens: int, most: int) -> tuple[int, int]:
    """How many of the ``most`` next steps decode exactly these, and the KV tokens that the first one reads; 0 steps if
    one of them does something else now."""
    num_kv_tokens = len(entries)
    for entry in entries:
        sequence = entry.sequence
        num_known, start = len(sequence.token_ids), sequence.num_computed
        if num_known - start != 1 or not entry.is_prefilled or entry.hands_off or entry.num_flights:
            return 0, 0
        num_left = sequence.max_total_tokens - num_known
        if num_left < most:
            most = num_left
        if entry.max_tokens is not None:
            most = min(most, entry.max_tokens - start)
        num_kv_tokens += start
    return _with_blocks(entries, pool.num_available, block_tokens, most), num_kv_tokens


def _with_blocks(entries: Sequence[Entry], num_available: int, block_tokens: int, most: int) -> int:
    """Of so many steps, those that there are blocks for without taking any from a sequence."""
    if most <= 0 or num_available >= len(entries) * blocks_for(most, block_tokens):
        return max(0, most)
    if _num_to_grow(entries, block_tokens, most) <= num_available:
        return most
    least, beyond = 0, most
    while beyond - least > 1:
        middle = (least + beyond) // 2
        fits = _num_to_grow(entries, block_tokens, middle) <= num_available
        least, beyond = (middle, beyond) if fits else (least, middle)
    return least


def _num_to_grow(entries: Sequence[Entry], block_tokens: int, num_steps: int) -> int:
    """Blocks that they take in so many steps."""
    count = 0
    for entry in entries:
        sequence = entry.sequence
        more = -(-(sequence.num_computed + num_steps) // block_tokens) - len(sequence.block_ids)
        if more > 0:
            count += more
    return count


def advance(
    entries: Sequence[Entry], pool: BlockPool, cache: PrefixCache, block_tokens: int, num_steps: int, token_id: int
) -> list[Entry]:
    """Each of them draws ``token_id`` in each of so many steps, which `limit` has allowed; returns those that may draw
    no more."""
    full: list[Entry] = []
    drawn = [token_id] * num_steps
    # By step and place in it: blocks are taken before the step, and found by hash after it.
    due: list[tuple[int, bool, int]] = []
    for place, entry in enumerate(entries):
        sequence = entry.sequence
        start = sequence.num_computed
        sequence.token_ids += drawn
        entry.num_computed_total += num_steps
        end = start + num_steps
        if len(sequence.token_ids) >= sequence.max_total_tokens:
            full.append(entry)
        first = len(sequence.block_ids) * block_tokens
        while first < end:
            due.append((max(0, first - start), False, place))
            first += block_tokens
        if cache.is_on:
            fulls = range(start // block_tokens * block_tokens + block_tokens, end + 1, block_tokens)
            due += [(full - start - 1, True, place) for full in fulls]
        sequence.num_computed = end
    for step, is_full, place in sorted(due):
        entry = entries[place]
        if is_full:
            sequence = entry.sequence
            end, sequence.num_computed = sequence.num_computed, sequence.num_computed - num_steps + step + 1
            cache.store(entry)
            sequence.num_computed = end
        else:
            pool.grow(entry.sequence_id, 1)
    return full
