"""Block lists to copies, digests of blocks, and the memory they live in."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BadConfig, InvalidRequest
from baton.types import KvLayout
from kvtransfer.digest import LayerDigests
from kvtransfer.hashing import ByteArray, segment_blocks
from kvtransfer.host import host_id
from kvtransfer.memory import HostMemory
from kvtransfer.plan import BlockList, Copy, End, Shard, TransferPlan
from tests.support.transfer import as_bytes, host_memory

SMALL = KvLayout(num_layers=3, num_blocks=12, num_kv_heads=1, head_dim=2, block_tokens=1, dtype="float16")
LARGE = KvLayout(num_layers=3, num_blocks=20, num_kv_heads=1, head_dim=2, block_tokens=1, dtype="float16")
SIZE = SMALL.block_bytes


def plan_of(src_ids: list[int], dst_ids: list[int]) -> TransferPlan:
    return TransferPlan.of(End.of(SMALL, src_ids, "source"), End.of(LARGE, dst_ids, "target"))


def test_neighbours_merge_only_if_both_sides_are_contiguous() -> None:
    plan = plan_of([4, 5, 6, 9, 10], [0, 1, 7, 8, 9])
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
    assert plan.bytes_of(plan.num_blocks) == 5 * 3 * SIZE


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
    plan = plan_of(src_ids, dst_ids)
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
    assert sum(r.num_bytes for r in BlockList(SMALL, src_ids).ranges(1, 0, len(src_ids))) == len(src_ids) * SIZE


MODEL = KvLayout(num_layers=4, num_blocks=6, num_kv_heads=6, head_dim=2, block_tokens=1, dtype="float16")
HEAD_BYTES = MODEL.block_bytes // MODEL.num_kv_heads
splits = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 6]))


def shards(num_stages: int, num_ranks: int) -> list[Shard]:
    layers, heads = MODEL.num_layers // num_stages, MODEL.num_kv_heads // num_ranks
    return [Shard(i * layers, layers, j * heads, heads) for i in range(num_stages) for j in range(num_ranks)]


def end(shard: Shard, num_blocks: int, block_ids: list[int], what: str) -> End:
    layout = replace(MODEL, num_layers=shard.num_layers, num_kv_heads=shard.num_heads, num_blocks=num_blocks)
    return End.of(layout, block_ids, what, shard)


@given(splits, splits, st.permutations(range(6)), st.permutations(range(9)), st.integers(1, 6))
def test_plans_between_all_shards_of_two_splits_move_every_head_of_every_layer_once(
    src_split: tuple[int, int], dst_split: tuple[int, int], src_ids: list[int], dst_ids: list[int], num_blocks: int
) -> None:
    """From any number of pipeline stages and tensor-parallel ranks to any other."""
    src_ids, dst_ids = src_ids[:num_blocks], dst_ids[:num_blocks]

    def name(layer: int, head: int, position: int) -> int:
        return 1 + (layer * MODEL.num_kv_heads + head) * num_blocks + position

    def filled(at: End) -> np.ndarray:
        cache = np.zeros(at.layout.total_bytes, dtype=np.uint16)
        for layer, head, (position, block) in itertools.product(
            range(at.shard.layer, at.shard.layer + at.shard.num_layers),
            range(at.shard.head, at.shard.head + at.shard.num_heads),
            enumerate(at.block_ids),
        ):
            start = at.offset(layer, head, block)
            cache[start : start + HEAD_BYTES] = name(layer, head, position)
        return cache

    sources = [end(shard, 6, src_ids, "source") for shard in shards(*src_split)]
    for dst in (end(shard, 9, dst_ids, "target") for shard in shards(*dst_split)):
        target, num_bytes = np.zeros(dst.layout.total_bytes, dtype=np.uint16), 0
        for src in sources:
            if src.shard.overlap(dst.shard) is None:
                with pytest.raises(InvalidRequest, match="in common"):
                    TransferPlan.of(src, dst)
                continue
            plan, cache = TransferPlan.of(src, dst), filled(src)
            num_bytes += plan.bytes_of(plan.num_blocks)
            for layer in range(plan.shard.num_layers):
                for a, b, size in plan.copies(layer, 0, num_blocks):
                    assert not target[b : b + size].any(), "written twice"
                    target[b : b + size] = cache[a : a + size]
        assert np.array_equal(target, filled(dst))
        assert num_bytes == np.count_nonzero(target)


def test_bad_block_lists_are_refused() -> None:
    for src, dst in (([1], [1, 2]), ([12], [0]), ([-1], [0]), ([0], [20]), ([1, 1], [1, 2]), ([1, 2], [3, 3])):
        with pytest.raises(InvalidRequest):
            plan_of(src, dst)


SEGMENTED = KvLayout(num_layers=2, num_blocks=40, num_kv_heads=2, head_dim=64, block_tokens=128, dtype="float32")
STEP = segment_blocks(SEGMENTED.block_bytes)
BLOCK_IDS = [7, 3, 4, 5, *range(20, 29), 1, 30]


def filled(layout: KvLayout) -> ByteArray:
    return np.random.default_rng(0).integers(0, 256, layout.total_bytes, dtype=np.uint8)


def expected_digest(memory: ByteArray, layer: int, block_ids: Sequence[int]) -> bytes:
    size = SEGMENTED.block_bytes
    blocks = [memory[SEGMENTED.offset(layer, b) :][:size].tobytes() for b in block_ids]
    segments = [b"".join(blocks[i : i + STEP]) for i in range(0, len(blocks), STEP)]
    return xxhash.xxh3_128_digest(b"".join(xxhash.xxh3_128_intdigest(s).to_bytes(16, sys.byteorder) for s in segments))


@settings(max_examples=40)
@given(st.lists(st.integers(0, len(BLOCK_IDS)), max_size=5), st.permutations(range(6)), st.integers(1, len(BLOCK_IDS)))
def test_digest_does_not_depend_on_how_the_writes_were_cut(cuts: list[int], order: list[int], num_blocks: int) -> None:
    assert STEP == 4, "the lists here are made for it"
    memory = filled(SEGMENTED)
    digests = LayerDigests(host_memory(memory), SEGMENTED, BLOCK_IDS)
    ranges = list(itertools.pairwise(sorted({0, len(BLOCK_IDS), *cuts})))
    for i in order:
        if i < len(ranges):
            digests.update(1, ranges[i][0], ranges[i][1] - ranges[i][0])
    for layer in range(2):
        assert digests.layer_digest(layer, num_blocks) == expected_digest(memory, layer, BLOCK_IDS[:num_blocks])
        assert digests.missing(layer, num_blocks) == []


def test_digest_tells_a_flipped_byte_swapped_blocks_and_another_length() -> None:
    memory = filled(SEGMENTED)
    size, n = SEGMENTED.block_bytes, len(BLOCK_IDS)
    whole = LayerDigests(host_memory(memory), SEGMENTED, BLOCK_IDS).layer_digest(0, n)
    assert LayerDigests(host_memory(memory), SEGMENTED, BLOCK_IDS).layer_digest(0, n - 1) != whole
    for i, j in ((0, 1), (1, 2), (3, 4), (0, n - 1), (4, 8)):
        swapped = list(BLOCK_IDS)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        assert LayerDigests(host_memory(memory), SEGMENTED, swapped).layer_digest(0, n) != whole
    for block, byte in ((BLOCK_IDS[0], 0), (BLOCK_IDS[5], size // 2), (BLOCK_IDS[-1], size - 1)):
        memory[SEGMENTED.offset(0, block) + byte] ^= 1
        assert LayerDigests(host_memory(memory), SEGMENTED, BLOCK_IDS).layer_digest(0, n) != whole
        memory[SEGMENTED.offset(0, block) + byte] ^= 1
    assert LayerDigests(host_memory(memory), SEGMENTED, BLOCK_IDS).layer_digest(0, n) == whole


def test_a_layer_that_is_written_again_is_hashed_again() -> None:
    memory = filled(SEGMENTED)
    digests = LayerDigests(host_memory(memory), SEGMENTED, BLOCK_IDS)
    n = len(BLOCK_IDS)
    digests.update(0, 0, n)
    before = digests.layer_digest(0, n)
    memory[SEGMENTED.offset(0, BLOCK_IDS[2])] ^= 1
    assert digests.layer_digest(0, n) == before, "hashed once"
    digests.forget(0)
    assert digests.missing(0, n) == [(i, min(STEP, n - i)) for i in range(0, n, STEP)]
    assert digests.layer_digest(0, n) != before
    with pytest.raises(AssertionError):
        digests.update(0, 1, n)


@pytest.mark.parametrize("block_tokens", [1, 16, 1024])
def test_block_sizes_from_much_less_to_more_than_a_segment(block_tokens: int) -> None:
    layout = replace(SEGMENTED, num_blocks=5, block_tokens=block_tokens)
    memory = filled(layout)
    one = LayerDigests(host_memory(memory), layout, [4, 2, 0])
    other = LayerDigests(host_memory(memory), layout, [4, 2, 0])
    other.update(1, 0, 3)
    assert one.layer_digest(1, 3) == other.layer_digest(1, 3) != one.layer_digest(0, 3)


def test_arena_is_shared_sealed_and_outlived_by_its_views() -> None:
    memory = HostMemory.create(1 << 20, prefault_pages=True)
    memory.buffer[:4] = b"abcd"
    with mmap.mmap(memory.fd, memory.num_bytes) as other:
        assert other[:4] == b"abcd"
        other[0:1] = b"z"
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(memory.fd, 0)
    view = as_bytes(memory)
    fd = memory.fd
    memory.close()
    memory.close()
    assert view[0] == ord("z")
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_arena_is_sparse_and_refuses_the_impossible() -> None:
    with HostMemory.create(1 << 40) as memory:
        memory.buffer[1 << 39] = 7
        assert os.fstat(memory.fd).st_blocks * 512 < 1 << 22
    for num_bytes in (0, -1, 1 << 62):
        with pytest.raises(BadConfig):
            HostMemory.create(num_bytes)


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


def test_pages_are_taken_in_the_background_where_asked_and_closing_waits() -> None:
    memory = HostMemory.create(64 << 20)
    memory.prefault_in_background([(0, 1 << 20), (33 << 20, 34 << 20)])
    prefaulting = memory._prefaulting
    assert prefaulting is not None
    prefaulting.join()
    assert os.fstat(memory.fd).st_blocks * 512 == 2 << 20
    memory.close()
    closed_early = HostMemory.create(512 << 20)
    closed_early.prefault_in_background([(0, 512 << 20)])
    closed_early.close()
    assert closed_early._prefaulting is not None
    assert not closed_early._prefaulting.is_alive()
