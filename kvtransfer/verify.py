"""Hashes received bytes in worker threads while the rest is on its way, and compares the hashes at commit."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from baton.errors import InvalidRequest
from baton.types import KvLayout
from kvtransfer.digest import DIGEST_BYTES, LayerDigests
from kvtransfer.host import keep_apart
from kvtransfer.memory import Memory
from kvtransfer.protocol.messages import Commit, WrittenRange

# Hints beyond this many wait for the commit: a peer cannot pile up work.
_MAX_PENDING = 4096


class _Entry:
    def __init__(self, digests: LayerDigests, num_blocks: int) -> None:
        self.digests = digests
        self.num_blocks = num_blocks
        self.pending: list[Future[None]] = []


class Verifier:
    """Digests of live leases by epoch. Methods on the event loop; the hashing is not."""

    def __init__(self, memory: Memory, layout: KvLayout, num_threads: int) -> None:
        self._memory = memory
        self._layout = layout
        self._num_threads = num_threads
        numbers = itertools.count()
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="baton-kv-verify", initializer=lambda: keep_apart(next(numbers))
        )
        self._entries: dict[int, _Entry] = {}

    def open(self, epoch: int, block_ids: Sequence[int]) -> None:
        """Begin, or go on with layers that are written again."""
        if epoch not in self._entries:
            self._entries[epoch] = _Entry(LayerDigests(self._memory, self._layout, block_ids), len(block_ids))

    def forget(self, epoch: int, layers: Sequence[int] | None) -> None:
        if layers is None:
            self._entries.pop(epoch, None)
            return
        entry = self._entries[epoch]
        for layer in layers:
            entry.digests.forget(layer)

    def digest(self, epoch: int, ranges: Sequence[WrittenRange]) -> None:
        """Begin to hash; ranges outside the lease are ignored, they are only hints."""
        entry = self._entries.get(epoch)
        if entry is None:
            return
        for layer, first, count in ((r.layer, r.first_block, r.num_blocks) for r in ranges):
            inside = 0 <= layer < self._layout.num_layers and first >= 0 and first + count <= entry.num_blocks
            if inside and count > 0 and len(entry.pending) < _MAX_PENDING:
                entry.pending.append(self._pool.submit(entry.digests.update, layer, first, count))

    def digest_here(self, epoch: int, layer: int, first: int, num_blocks: int) -> None:
        """Hash in the calling thread, which has just written these blocks and holds their epoch open."""
        entry = self._entries.get(epoch)
        if entry is not None:
            entry.digests.update(layer, first, num_blocks)

    async def verify(self, epoch: int, commit: Commit) -> tuple[int, ...]:
        """The layers whose digest differs. Raises InvalidRequest if there is not one digest per layer."""
        entry = self._entries.get(epoch)
        if entry is None:
            return ()  # The lease ended meanwhile; the result is not needed.
        num_layers = self._layout.num_layers
        if len(commit.layer_digests) != num_layers or any(len(d) != DIGEST_BYTES for d in commit.layer_digests):
            raise InvalidRequest(
                f"{len(commit.layer_digests)} digests of {num_layers} layers with {DIGEST_BYTES} bytes"
            )
        pending, entry.pending = entry.pending, []
        for future in pending:
            if not future.done():
                await asyncio.wrap_future(future)
            future.result()
        layers = range(num_layers)
        num_missing = sum(len(entry.digests.missing(layer, commit.num_blocks)) for layer in layers)
        if num_missing == 0:  # What is left takes less than going to another thread.
            return tuple(_differing(entry, layers, commit))
        num_shares = max(1, min(self._num_threads, num_missing // 2))
        loop = asyncio.get_running_loop()
        shares = [layers[i::num_shares] for i in range(num_shares)]
        found = [loop.run_in_executor(self._pool, _differing, entry, share, commit) for share in shares]
        return tuple(sorted(itertools.chain.from_iterable(await asyncio.gather(*found))))

    def close(self) -> None:
        self._entries.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _differing(entry: _Entry, layers: Sequence[int], commit: Commit) -> list[int]:
    """Layers whose digest is not the one committed; hashes what is missing."""
    digests = entry.digests
    return [i for i in layers if digests.layer_digest(i, commit.num_blocks) != commit.layer_digests[i]]
