"""Which blocks are found by the hash of their content, and what followers of that have not been told yet. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from baton.node_messages import CacheChanged
from baton.prefix import key_of


class Untold(NamedTuple):
    """What a follower is to be told next."""

    number: int
    # By hash, whether it is found.
    changed: dict[bytes, bool]
    is_snapshot: bool

    def message(self) -> CacheChanged:
        stored = tuple(key_of(value) for value, is_found in self.changed.items() if is_found)
        dropped = tuple(key_of(value) for value, is_found in self.changed.items() if not is_found)
        return CacheChanged(self.number, stored, dropped, self.is_snapshot)


class CacheFeed:
    """For one follower: first all that is found, then what changes.

    It keeps the sum of what the follower was not told, so at most two entries for each block of the pool, and a slow
    follower misses nothing.
    """

    __slots__ = ("_is_begun", "_untold")

    def __init__(self, found: Iterable[bytes]) -> None:
        # By hash, whether it is found.
        self._untold = dict.fromkeys(found, True)
        self._is_begun = False

    def changed(self, content_hash: bytes, *, is_found: bool) -> None:
        # One that is there says the opposite: in sum the follower knows already.
        if self._untold.pop(content_hash, None) is None:
            self._untold[content_hash] = is_found

    def take(self, number: int, most: int) -> Untold | None:
        """Up to ``most`` changes, ``number`` being that of the newest of all; None if the follower knows all."""
        if self._is_begun and not self._untold:
            return None
        is_snapshot, self._is_begun = not self._is_begun, True
        taken = {value: self._untold.pop(value) for value in list(islice(self._untold, most))}
        return Untold(number, taken, is_snapshot)


class KnownBlocks:
    """Block by content hash and content hash by block."""

    def __init__(self) -> None:
        self._hashes: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}
        self._feeds: list[CacheFeed] = []
        # Changes since the start.
        self.number = 0
        self.num_stored = 0

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, block: int) -> bool:
        return block in self._hashes

    def __iter__(self) -> Iterator[int]:
        return iter(self._hashes)

    def find(self, content_hash: bytes) -> int | None:
        return self._blocks.get(content_hash)

    def add(self, block: int, content_hash: bytes) -> None:
        assert block not in self._hashes, "the content of a block with a hash does not change"
        self._blocks[content_hash] = block
        self._hashes[block] = content_hash
        self.num_stored += 1
        self._changed(content_hash, is_found=True)

    def remove(self, block: int) -> None:
        content_hash = self._hashes.pop(block)
        del self._blocks[content_hash]
        self._changed(content_hash, is_found=False)

    def follow(self) -> CacheFeed:
        feed = CacheFeed(self._blocks)
        self._feeds.append(feed)
        return feed

    def unfollow(self, feed: CacheFeed) -> None:
        if feed in self._feeds:
            self._feeds.remove(feed)

    def check(self) -> None:
        assert self._blocks == {value: block for block, value in self._hashes.items()}, "a hash names another block"

    def _changed(self, content_hash: bytes, *, is_found: bool) -> None:
        self.number += 1
        for feed in self._feeds:
            feed.changed(content_hash, is_found=is_found)
