"""Hashes what arrived, in worker threads, while the rest is still on its way, and compares it at commit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from baton.errors import InvalidRequest
from baton.types import KvLayout
from kvtransfer.digest import DIGEST_BYTES, BlockDigests, ByteArray
from kvtransfer.plan import spans
from kvtransfer.protocol.messages import Commit, WrittenRange

# Hints beyond this many wait for the commit: a peer cannot pile up work.
_MAX_PENDING = 4096


class _Entry:
    def __init__(self, layout: KvLayout, block_ids: Sequence[int]) -> None:
        self.block_ids = block_ids
        self.digests = BlockDigests(layout.num_layers, len(block_ids), layout.block_bytes)
        self.pending: list[Future[None]] = []


class Verifier:
    """Digests of live leases by epoch. Methods on the event loop; the hashing is not."""

    def __init__(self, memory: ByteArray, layout: KvLayout, num_threads: int) -> None:
        self._memory = memory
        self._layout = layout
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="baton-kv-verify")
        self._entries: dict[int, _Entry] = {}

    def open(self, epoch: int, block_ids: Sequence[int]) -> None:
        self._entries.setdefault(epoch, _Entry(self._layout, block_ids))

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
            inside = 0 <= layer < self._layout.num_layers and first >= 0 and first + count <= len(entry.block_ids)
            if inside and count > 0 and len(entry.pending) < _MAX_PENDING:
                entry.pending.append(self._pool.submit(self._hash, entry, [layer], first, count))

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
            await asyncio.wrap_future(future)
        loop = asyncio.get_running_loop()
        parts = [range(i, num_layers, self._num_threads) for i in range(self._num_threads)]
        async with asyncio.TaskGroup() as group:
            for layers in parts:
                work = loop.run_in_executor(self._pool, self._hash, entry, layers, 0, commit.num_blocks)
                group.create_task(_finished(work))
        found = [entry.digests.layer_digest(layer, commit.num_blocks) for layer in range(num_layers)]
        return tuple(i for i in range(num_layers) if found[i] != commit.layer_digests[i])

    def _hash(self, entry: _Entry, layers: Sequence[int], first: int, num_blocks: int) -> None:
        size = self._layout.block_bytes
        for layer in layers:
            for start, count in entry.digests.missing(layer, first, num_blocks):
                position = start
                for span in spans(self._layout, layer, entry.block_ids, start, count):
                    entry.digests.update(self._memory, span.offset, layer, position, span.num_bytes // size)
                    position += span.num_bytes // size

    def close(self) -> None:
        self._entries.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)


async def _finished(work: asyncio.Future[None]) -> None:
    await work
