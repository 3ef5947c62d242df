"""Block lists to copies, digests of blocks, and the memory they live in."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BadConfig, InvalidRequest
from baton.types import KvLayout
from kvtransfer.arena import Arena
from kvtransfer.digest import BlockDigests
from kvtransfer.host import host_id
from kvtransfer.plan import Copy, TransferPlan, spans
from kvtransfer.writing import as_bytes

SMALL = KvLayout(num_layers=3, num_blocks=12, num_kv_heads=1, head_dim=2, block_tokens=1, dtype="float16")
LARGE = KvLayout(num_layers=3, num_blocks=20, num_kv_heads=1, head_dim=2, block_tokens=1, dtype="float16")
SIZE = SMALL.block_bytes


def test_neighbours_merge_only_if_both_sides_are_contiguous() -> None:
    plan = TransferPlan.of(SMALL, LARGE, [4, 5, 6, 9, 10], [0, 1, 7, 8, 9])
    assert plan.copies(0, 0, 5) == [
        Copy(4 * SIZE, 0, 2 * SIZE),
        Copy(6 * SIZE, 7 * SIZE, SIZE),
        Copy(9 * SIZE, 8 * SIZE, 2 * SIZE),
    ]
    assert plan.copies(2, 1, 2) == [
        Copy((24 + 5) * SIZE, (40 + 1) * SIZE, SIZE),
        Copy((24 + 6) * SIZE, (40 + 7) * SIZE, SIZE),
    ]
    assert plan.copies(1, 2, 0) == []
    assert plan.num_bytes == 5 * 3 * SIZE


block_lists = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 11), min_size=n, max_size=n, unique=True),
        st.lists(st.integers(0, 19), min_size=n, max_size=n, unique=True),
        st.lists(st.integers(0, n), max_size=4),
    )
)


@given(block_lists)
def test_copies_in_any_pieces_move_exactly_the_blocks(lists: tuple[list[int], list[int], list[int]]) -> None:
    src_ids, dst_ids, cuts = lists
    plan = TransferPlan.of(SMALL, LARGE, src_ids, dst_ids)
    source = np.arange(SMALL.total_bytes, dtype=np.uint16) % 251 + 1
    target = np.zeros(LARGE.total_bytes, dtype=np.uint16)
    edges = sorted({0, len(src_ids), *cuts})
    for layer in range(3):
        for first, stop in itertools.pairwise(edges):
            for src, dst, size in plan.copies(layer, first, stop - first):
                assert not target[dst : dst + size].any(), "written twice"
                target[dst : dst + size] = source[src : src + size]
    expected = np.zeros_like(target)
    for layer in range(3):
        for src, dst in zip(src_ids, dst_ids, strict=True):
            a, b = SMALL.offset(layer, src), LARGE.offset(layer, dst)
            expected[b : b + SIZE] = source[a : a + SIZE]
    assert np.array_equal(target, expected)
    assert sum(s.num_bytes for s in spans(SMALL, 1, src_ids, 0, len(src_ids))) == len(src_ids) * SIZE


def test_bad_block_lists_are_refused() -> None:
    for src, dst in (([1], [1, 2]), ([12], [0]), ([-1], [0]), ([0], [20]), ([1, 1], [1, 2]), ([1, 2], [3, 3])):
        with pytest.raises(InvalidRequest):
            TransferPlan.of(SMALL, LARGE, src, dst)


@pytest.mark.parametrize("block_bytes", [16, 1000, 4096, 200_000])
def test_digest_is_the_hash_of_block_hashes_in_any_order(block_bytes: int) -> None:
    memory = np.random.default_rng(0).integers(0, 256, 6 * block_bytes, dtype=np.uint8)
    digests = BlockDigests(2, 5, block_bytes)
    digests.update(memory, 3 * block_bytes, 1, 3, 2)
    assert digests.missing(1, 0, 5) == [(0, 3)]
    digests.update(memory, block_bytes, 1, 1, 1)
    assert digests.missing(1, 0, 5) == [(0, 1), (2, 1)]
    digests.update(memory, 0, 1, 0, 1)
    digests.update(memory, 2 * block_bytes, 1, 2, 1)
    assert digests.missing(1, 0, 5) == []
    assert digests.missing(0, 2, 2) == [(2, 2)], "another layer"
    hashes = [xxhash.xxh3_128_intdigest(memory[i * block_bytes : (i + 1) * block_bytes]) for i in range(5)]
    row = b"".join(h.to_bytes(16, sys.byteorder) for h in hashes)
    assert digests.layer_digest(1, 5) == xxhash.xxh3_128_digest(row)
    before = digests.layer_digest(1, 5)
    memory[4 * block_bytes] ^= 1
    digests.forget(1)
    assert digests.missing(1, 0, 5) == [(0, 5)]
    digests.update(memory, 0, 1, 0, 5)
    assert digests.layer_digest(1, 5) != before
    with pytest.raises(AssertionError):
        digests.update(memory, 2 * block_bytes, 1, 0, 5)


def test_arena_is_shared_sealed_and_outlived_by_its_views() -> None:
    arena = Arena.create(1 << 20, prefault_pages=True)
    arena.buffer[:4] = b"abcd"
    with mmap.mmap(arena.fd, arena.num_bytes) as other:
        assert other[:4] == b"abcd"
        other[0:1] = b"z"
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(arena.fd, 0)
    view = as_bytes(arena.buffer)
    fd = arena.fd
    arena.close()
    arena.close()
    assert view[0] == ord("z")
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_arena_is_sparse_and_refuses_the_impossible() -> None:
    with Arena.create(1 << 40) as arena:
        arena.buffer[1 << 39] = 7
        assert os.fstat(arena.fd).st_blocks * 512 < 1 << 22
    for num_bytes in (0, -1, 1 << 62):
        with pytest.raises(BadConfig):
            Arena.create(num_bytes)


def test_host_id_is_equal_for_processes_of_one_host() -> None:
    code = "from kvtransfer.host import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert other.stdout.strip() == host_id()


def test_the_pure_modules_load_neither_torch_nor_numpy_nor_grpc_nor_asyncio() -> None:
    code = (
        "import sys; import kvtransfer.plan, kvtransfer.protocol.sender, kvtransfer.protocol.receiver;"
        "print([m for m in ('torch', 'numpy', 'grpc', 'asyncio') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
    code = "import sys; import kvtransfer.sender, kvtransfer.receiver; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "False"
