"""Hashes what arrived, in worker threads, while the rest is still on its way, and compares it at commit."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from baton.errors import InvalidRequest
from baton.types import KvLayout
from kvtransfer.digest import DIGEST_BYTES, LayerDigests
from kvtransfer.host import keep_apart
from kvtransfer.memory import CacheMemory
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

    def __init__(self, memory: CacheMemory, layout: KvLayout, num_threads: int) -> None:
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
            return ()  # The lease ended while this was on its way; nobody asks any more.
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
        damaged: set[int] = set()
        async with asyncio.TaskGroup() as group:
            for layers in self._shares(entry, commit):
                group.create_task(self._compare(entry, layers, commit, damaged))
        return tuple(sorted(damaged))

    def _shares(self, entry: _Entry, commit: Commit) -> list[list[int]]:
        """Layers for one worker thread each; all for one if almost nothing is left to hash."""
        layers = range(self._layout.num_layers)
        num_missing = sum(len(entry.digests.missing(layer, commit.num_blocks)) for layer in layers)
        num_shares = max(1, min(self._num_threads, num_missing // 2))
        return [list(layers[i::num_shares]) for i in range(num_shares)]

    async def _compare(self, entry: _Entry, layers: Sequence[int], commit: Commit, damaged: set[int]) -> None:
        def differing() -> list[int]:
            return [
                layer
                for layer in layers
                if entry.digests.layer_digest(layer, commit.num_blocks) != commit.layer_digests[layer]
            ]

        damaged.update(await asyncio.get_running_loop().run_in_executor(self._pool, differing))

    def close(self) -> None:
        self._entries.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
