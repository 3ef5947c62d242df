"""Many steps at once that do nothing but decode the same sequences, and those of a step with prompts at once: for
simulators, which read tokens only when these matter.

Pure. Equal to one step after the other, and to one sequence after the other, in tokens, blocks and cached blocks
(`tests/properties/engine/test_plain_steps_properties.py`), at a cost that hardly depends on the number of steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from baton.types import blocks_for
from engine import step
from engine.blocks import BlockPool
from engine.entry import Entry, Order, Phase
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
    num_hashes = [len(entry.sequence.block_hashes) for entry in entries] if cache.is_on else []
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
    for number, is_full, place in sorted(due):
        entry = entries[place]
        if is_full:
            sequence = entry.sequence
            end, sequence.num_computed = sequence.num_computed, sequence.num_computed - num_steps + number + 1
            cache.store(entry)
            sequence.num_computed = end
        else:
            pool.grow(entry.sequence_id, 1)
    for entry, num_before in zip(entries, num_hashes, strict=False):
        # Those of blocks that were full when the last one was stored, and not of all that are known by now.
        hashes, num_known = entry.sequence.block_hashes, (entry.num_stored * block_tokens + 1) // block_tokens
        if len(hashes) > max(num_before, num_known):
            entry.sequence.block_hashes = hashes[: max(num_before, num_known)]
    return full


class Stretch:
    """Sequences that decode step after step and nothing else: how far they have come is kept once for all of them, and
    written to each when it is read. So steps cost the same, however many sequences are in them.

    Invariant: they are all that is active. None is to stop, lent to a reader outside, or has a mask; blocks are theirs
    when a step needs them.
    """

    __slots__ = ("_block_tokens", "_ends", "_needs", "_pool", "_since", "num_kv_tokens", "num_steps", "token_id")

    def __init__(self, entries: Sequence[Entry], pool: BlockPool, block_tokens: int, token_id: int) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self.token_id = token_id
        # Steps so far, and the KV tokens that the next one reads.
        self.num_steps = 0
        self.num_kv_tokens = 0
        # By sequence, the number of steps that are written to it.
        self._since: dict[Entry, int] = {}
        # The step before which a sequence needs a block, and the one with its last token; of those that left as well.
        self._needs: list[tuple[int, Order, Entry]] = []
        self._ends: list[tuple[int, Order, Entry]] = []
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        return len(self._since)

    def add(self, entry: Entry) -> None:
        sequence = entry.sequence
        start = sequence.num_computed
        self._since[entry] = self.num_steps
        self.num_kv_tokens += start + 1
        num_room = len(sequence.block_ids) * self._block_tokens - start
        num_left = sequence.max_total_tokens - len(sequence.token_ids)
        heapq.heappush(self._needs, (self.num_steps + num_room, entry.order, entry))
        heapq.heappush(self._ends, (self.num_steps + num_left, entry.order, entry))

    def limit(self, most: int) -> int:
        """As `limit`."""
        ends = self._ends
        while ends and ends[0][2] not in self._since:
            heapq.heappop(ends)
        if ends:
            most = min(most, ends[0][0] - self.num_steps)
        num_available = self._pool.num_available
        if most <= 0 or num_available >= len(self._since) * blocks_for(most, self._block_tokens):
            return max(0, most)
        self.settle()
        return _with_blocks([*self._since], num_available, self._block_tokens, most)

    def advance(self, num_steps: int) -> list[Entry]:
        """As `advance`."""
        since, needs, ends, number = self._since, self._needs, self._ends, self.num_steps + num_steps
        while needs and needs[0][0] < number:
            at, order, entry = heapq.heappop(needs)
            if entry in since:
                self._pool.grow(entry.sequence_id, 1)
                heapq.heappush(needs, (at + self._block_tokens, order, entry))
        self.num_steps = number
        self.num_kv_tokens += num_steps * len(since)
        full: list[Entry] = []
        while ends and ends[0][0] <= number:
            _, _, entry = heapq.heappop(ends)
            if entry in since:
                full.append(entry)
        return full

    def write(self, entry: Entry) -> None:
        """What it has drawn by now; nothing for one that is not here."""
        since = self._since.get(entry, self.num_steps)
        num_new = self.num_steps - since
        if num_new:
            self._since[entry] = self.num_steps
            entry.sequence.token_ids += [self.token_id] * num_new
            entry.sequence.num_computed += num_new
            entry.num_computed_total += num_new

    def settle(self) -> None:
        """Write to all of them."""
        for entry in self._since:
            self.write(entry)

    def remove(self, entry: Entry) -> None:
        """It is to be active no more."""
        if entry in self._since:
            self.write(entry)
            del self._since[entry]
            self.num_kv_tokens -= entry.sequence.num_computed + 1

    def check(self, active: Collection[Entry]) -> None:
        """Assert the invariant."""
        self.settle()
        assert self._since.keys() == set(active), "a stretch of others than are active"
        assert self.num_kv_tokens == sum(entry.sequence.num_computed + 1 for entry in active)
        assert not any(entry.hands_off or entry.num_flights or entry.max_tokens is not None for entry in active)
        assert all(entry.is_prefilled and entry.num_remaining == 1 for entry in active)


def can_stretch(entries: Sequence[Entry], cache: PrefixCache) -> bool:
    """Of what decodes plainly now."""
    return not cache.is_on and all(entry.max_tokens is None and entry.sequence.token_mask is None for entry in entries)


class PlainStep(NamedTuple):
    """What decodes in the next step, with nothing to decide about it, and what else is active."""

    decoding: tuple[Entry, ...]
    others: list[Entry]
    # Of the decoding alone.
    shape: StepShape


def next_step(entries: Sequence[Entry], pool: BlockPool, block_tokens: int) -> PlainStep | None:
    """With blocks for it, if none is under way; None, and no block is taken, if a sequence may have to yield, to stop,
    or to wait for the host."""
    decoding: list[Entry] = []
    others: list[Entry] = []
    growing: list[step.Sequence] = []
    num_kv_tokens = 0
    for entry in entries:
        sequence = entry.sequence
        start = sequence.num_computed
        if not entry.is_prefilled or len(sequence.token_ids) - start != 1:
            others.append(entry)
            continue
        if entry.hands_off or entry.max_tokens is not None or sequence.token_mask is not None:
            return None
        decoding.append(entry)
        num_kv_tokens += start + 1
        if start >= len(sequence.block_ids) * block_tokens:
            growing.append(sequence)
    if len(growing) > pool.num_available:
        return None
    for sequence in growing:
        pool.grow(sequence.sequence_id, 1)
    return PlainStep(tuple(decoding), others, StepShape(0, 0, len(decoding), num_kv_tokens))


def board(entries: Sequence[Entry]) -> tuple[step.Sequence, ...]:
    """As `Entry.board` of a piece of one token that is drawn from."""
    for entry in entries:
        entry.num_flights += 1
        entry.num_underway += 1
        entry.num_unknown += 1
    return tuple([entry.sequence for entry in entries])


def land(entries: Sequence[Entry], cache: PrefixCache, token_id: int, last: Collection[str]) -> Iterator[Entry]:
    """The step is over, and each that was not to end meanwhile has drawn ``token_id``. Those that there is something to
    be done about, one by one: what is done about one comes before what the next one draws."""
    is_on = cache.is_on
    for entry in entries:
        entry.num_flights -= 1
        entry.num_underway -= 1
        entry.num_unknown -= 1
        if entry.phase is Phase.ACTIVE:
            sequence = entry.sequence
            sequence.token_ids.append(token_id)
            sequence.num_computed += 1
            entry.num_computed_total += 1
            if is_on:
                cache.store(entry)
            is_whole = len(sequence.token_ids) >= sequence.max_total_tokens or sequence.spec.sequence_id in last
            if not is_whole and not entry.hands_off:
                continue
        yield entry
