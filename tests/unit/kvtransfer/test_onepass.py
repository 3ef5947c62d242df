"""The compiled pass gives the library's hashes and an exact copy, however the stream is cut into rows."""

import ctypes
import os
import threading

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import KvLayout
from kvtransfer.digest import LayerDigests
from kvtransfer.host import keep_apart
from kvtransfer.plan import Copy
from tests.support.transfer import host_memory

pytest.importorskip("llvmlite")
from kvtransfer.onepass import OnePass

ONE_PASS = OnePass()
KIB = 1024
GUARD = 64


def aligned(num_bytes: int) -> np.ndarray:
    raw = np.zeros(num_bytes + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + num_bytes]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 63),
)
def test_hashes_and_copies_equal_the_librarys(
    rows: list[tuple[int, int]], segment_kib: int, is_copying: bool, shift: int
) -> None:
    total = sum(size + gap for size, gap in rows) * KIB
    source = np.random.default_rng(7).integers(0, 256, total + shift, dtype=np.uint8)[shift:]
    target = aligned(total + GUARD)
    expected, stream, table, at = target.copy(), b"", [], 0
    for size, gap in rows:
        place = at + gap * KIB
        part = source[place : place + size * KIB]
        stream += part.tobytes()
        expected[place : place + size * KIB] = part if is_copying else 0
        table += [source.ctypes.data + place, target.ctypes.data + place, size * KIB]
        at = place + size * KIB
    segments = [stream[i : i + segment_kib * KIB] for i in range(0, len(stream), segment_kib * KIB)]
    hashes = np.zeros((len(segments) + 1, 2), np.uint64)
    packed = (ctypes.c_uint64 * len(table))(*table)
    run = ONE_PASS.copy_rows if is_copying else ONE_PASS.hash_rows
    run(ctypes.addressof(packed), len(stream), segment_kib * KIB, hashes.ctypes.data)
    wanted = [xxhash.xxh3_128_intdigest(segment) for segment in segments]
    assert [int(low) | int(high) << 64 for low, high in hashes[:-1]] == wanted
    assert not hashes[-1].any()
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("first", [0, 8, 3])
def test_a_digest_taken_while_copying_is_the_digest_of_what_lies_there(first: int) -> None:
    layout = KvLayout(num_layers=2, num_blocks=24, num_kv_heads=4, head_dim=64, block_tokens=64, dtype="bfloat16")
    source_ids, target_ids = [5, 6, 7, 2, *range(9, 20)], [20, 3, 4, 5, *range(6, 17)]
    source, target = (
        np.random.default_rng(1).integers(0, 256, layout.total_bytes, np.uint8),
        aligned(layout.total_bytes),
    )
    host = host_memory(source)
    digests, n = LayerDigests(host, layout, source_ids), len(source_ids)
    pairs = list(zip(source_ids[first:], target_ids[first:], strict=True))
    copies = [Copy(layout.offset(1, s), layout.offset(1, d), layout.block_bytes) for s, d in pairs]
    is_taken = digests.copy(host, 1, first, n - first, copies, target)
    assert is_taken == (first % 8 == 0), "a range that begins inside a segment cannot be hashed by itself"
    if not is_taken:
        assert not target.any()
        return
    assert digests.missing(1, n) == [(start, 8) for start in range(0, first, 8)]
    for copy in copies:
        moved = target[copy.dst_offset : copy.dst_offset + copy.num_bytes]
        assert np.array_equal(moved, source[copy.src_offset : copy.src_offset + copy.num_bytes])
    if first == 0:
        assert digests.layer_digest(1, n) == LayerDigests(host_memory(target), layout, target_ids).layer_digest(1, n)


def test_an_unaligned_target_or_odd_block_size_is_left_to_two_passes() -> None:
    layout = KvLayout(num_layers=1, num_blocks=4, num_kv_heads=1, head_dim=64, block_tokens=64, dtype="bfloat16")
    source, target = host_memory(np.zeros(layout.total_bytes, np.uint8)), aligned(layout.total_bytes + 8)
    whole = [Copy(0, 0, 4 * layout.block_bytes)]
    assert LayerDigests(source, layout, range(4)).copy(source, 0, 0, 4, whole, target)
    assert not LayerDigests(source, layout, range(4)).copy(source, 0, 0, 4, whole, target[8:])
    odd = KvLayout(num_layers=1, num_blocks=4, num_kv_heads=1, head_dim=8, block_tokens=3, dtype="bfloat16")
    assert not LayerDigests(source, odd, range(4)).copy(source, 0, 0, 4, [Copy(0, 0, 4 * odd.block_bytes)], target)


def test_threads_with_successive_numbers_keep_to_different_cpus() -> None:
    allowed = os.sched_getaffinity(0)
    found: dict[int, set[int]] = {}

    def stay(number: int) -> None:
        keep_apart(number)
        found[number] = os.sched_getaffinity(0)

    for number in range(4):
        thread = threading.Thread(target=stay, args=(number,))
        thread.start()
        thread.join()
    assert set().union(*found.values()) == allowed == os.sched_getaffinity(0)
    assert len(allowed) == 1 or not found[0] & found[1]
