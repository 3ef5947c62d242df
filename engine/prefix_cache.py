"""What a scheduler asks of the prefix cache: which leading blocks of a sequence are there, who is computing those that
are not, and which have become final.

Blocks lie in the pool; a sequence's hashes are kept with it, and computed once. Pure: the caller passes what reads
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from baton.prefix import PrefixScheme
from engine import step
from engine.blocks import BlockPool
from engine.entry import Entry, Leader


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Blocks now; tokens and blocks counted since the start."""

    is_on: bool
    total_blocks: int
    # Found by hash, and those of them that no sequence holds, with their limit.
    known_blocks: int
    cached_blocks: int
    max_cached_blocks: int
    # Known tokens of sequences that started or were reserved for, and those of them that were there.
    query_tokens: int
    hit_tokens: int
    stored_blocks: int
    evicted_blocks: int
    corrupt_blocks: int


class PrefixCache:
    """Without a scheme nothing is ever found."""

    def __init__(
        self,
        pool: BlockPool,
        scheme: PrefixScheme | None,
        block_tokens: int,
        digest_of: Callable[[int], bytes] | None = None,
    ) -> None:
        """``digest_of`` a block's bytes: taken when the block gets its hash, and compared when it is used."""
        self._pool = pool
        self._scheme = scheme
        self._block_tokens = block_tokens
        self._digest_of = digest_of
        # By block, of those with a hash.
        self._digests: dict[int, bytes] = {}
        self._num_query_tokens = 0
        self._num_hit_tokens = 0
        self._num_corrupt = 0

    @property
    def is_on(self) -> bool:
        return self._scheme is not None

    def find(self, sequence: step.Sequence, *, draws: bool) -> list[int]:
        """Leading blocks of its known tokens that are there; if it ``draws`` a token here, at least the last known one
        is left to be computed, and all that are to be scored."""
        most = min(len(sequence.token_ids) - draws, sequence.first_scored) // self._block_tokens
        return self._pool.lookup(islice(self._hashes(sequence), most))

    def intact(self, found: list[int]) -> list[int]:
        """Of blocks that are about to be used, those before the first whose bytes have changed: that one is found no
        more. It reads all of them, unlike ``find``, which is asked again and again while a sequence waits."""
        digest_of = self._digest_of
        for index, block in enumerate(() if digest_of is None else found):
            assert digest_of is not None
            if digest_of(block) != self._digests[block]:
                self._pool.forget([block])
                self._num_corrupt += 1
                return found[:index]
        return found

    def count(self, num_tokens: int, num_found: int) -> None:
        """Note that a sequence with so many known tokens begins behind ``num_found`` blocks."""
        if self._scheme is not None:
            self._num_query_tokens += num_tokens
            self._num_hit_tokens += num_found * self._block_tokens

    def leader(self, entry: Entry, num_found: int, active: Iterable[Entry]) -> Leader | None:
        """Who is computing the block behind those that were found for ``entry``."""
        most = min(len(entry.sequence.token_ids) - 1, entry.sequence.first_scored) // self._block_tokens
        hashes = self._hashes(entry.sequence)[:most]
        for other in active if num_found < len(hashes) else ():
            theirs = other.sequence.block_hashes
            if other.num_stored == num_found < len(theirs) and theirs[num_found] == hashes[num_found]:
                return Leader(other, _num_common(hashes, theirs))
        return None

    def store(self, entry: Entry) -> None:
        """Have the blocks found that are full now."""
        sequence = entry.sequence
        num_full = sequence.num_computed // self._block_tokens
        # Pieces that will be dropped still write to its blocks.
        if num_full <= entry.num_stored or self._scheme is None or entry.is_overtaken:
            return
        hashes = self._hashes(sequence)
        for index in range(entry.num_stored, num_full):
            is_new = self._pool.cache(sequence.sequence_id, index, hashes[index])
            if is_new and self._digest_of is not None:
                block = sequence.block_ids[index]
                self._digests[block] = self._digest_of(block)
        entry.num_stored = num_full

    def drop(self, blocks: Iterable[int] | None = None) -> int:
        """Find none of these any more, or nothing of all that is there; returns how many were found until now."""
        return self._pool.forget(list(self._pool.known) if blocks is None else blocks)

    def stats(self) -> CacheStats:
        pool = self._pool
        return CacheStats(
            is_on=self._scheme is not None,
            total_blocks=pool.num_blocks,
            known_blocks=len(pool.known),
            cached_blocks=pool.num_cached,
            max_cached_blocks=pool.max_cached,
            query_tokens=self._num_query_tokens,
            hit_tokens=self._num_hit_tokens,
            stored_blocks=pool.known.num_stored,
            evicted_blocks=pool.num_evicted,
            corrupt_blocks=self._num_corrupt,
        )

    def _hashes(self, sequence: step.Sequence) -> Sequence[bytes]:
        """Of the full blocks of its known tokens."""
        known, spec = sequence.block_hashes, sequence.spec
        if self._scheme is not None and len(known) < len(sequence.token_ids) // self._block_tokens:
            sequence.block_hashes = self._scheme.block_hashes(
                sequence.token_ids, len(spec.prompt_token_ids), salt=spec.cache_salt, known=known
            )
        return sequence.block_hashes


def _num_common(ours: Sequence[bytes], theirs: Sequence[bytes]) -> int:
    """Leading hashes that are equal."""
    for index, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            return index
    return min(len(ours), len(theirs))
