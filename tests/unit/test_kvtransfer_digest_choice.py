"""The table of decision 3: which damage each choice of digest finds, planted in transfers and in memory."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from kvtransfer_pair import LAYOUT, Pair, pair, token

from baton.errors import BadConfig, Incompatible
from baton.types import KvLayout
from kvtransfer.config import TransferConfig
from kvtransfer.digest import ByteArray, LayerDigests
from kvtransfer.sampling import KIB_BYTES, LINE_BYTES, LINES, gather, kib_number, line_numbers

# 8 KiB a block: 64 make a segment.
WIDE = KvLayout(num_layers=2, num_blocks=160, num_kv_heads=4, head_dim=32, block_tokens=16, dtype="bfloat16")
BLOCK_IDS = [7, 3, 4, 5, *range(20, 120), 1, 30 + 100]
SOURCE_BLOCKS, NUM_BLOCKS = [4, 5, 6, 7], 4
RUN_BYTES = NUM_BLOCKS * LAYOUT.block_bytes
CERTAIN = ["swap=1", "tear=1", "drop=1"]


class WithoutCompiler(LayerDigests):
    _compiled = None


def is_read(layer: int, offset: int) -> bool:
    """Whether a sampled digest reads this byte of a layer's share of a lease."""
    line = line_numbers(kib_number(layer, 0, LINES * LINE_BYTES) + offset // KIB_BYTES, 1)[0]
    return bool(line == offset % KIB_BYTES // LINE_BYTES)


def flipped_byte(seed: int) -> int:
    """Where ``fake:corrupt=1,seed=...`` flips a byte of the first run."""
    random = Random(seed)
    random.random()
    return random.randrange(1 << 30) % RUN_BYTES


SEED_READ = next(seed for seed in range(1000) if is_read(0, flipped_byte(seed)))
SEED_NOT_READ = next(seed for seed in range(1000) if not is_read(0, flipped_byte(seed)))


async def push(p: Pair, blocks: list[int]) -> int:
    """How often layers were written again."""
    lease = p.receiver.grant("r", blocks, ttl_s=30)
    push = p.sender.begin(lease, SOURCE_BLOCKS, num_known_tokens=NUM_BLOCKS * LAYOUT.block_tokens)
    for layer in range(LAYOUT.num_layers):
        push.layer_ready(layer, NUM_BLOCKS)
    return (await push.commit(token("r"))).retransmits


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("is_stale", [False, True])
@pytest.mark.parametrize(
    ("mischief", "finders"),
    [
        *((kind, {"full", "sampled"}) for kind in CERTAIN),
        (f"corrupt=1,seed={SEED_READ}", {"full", "sampled"}),
        (f"corrupt=1,seed={SEED_NOT_READ}", {"full"}),
    ],
)
@pytest.mark.parametrize("digest", ["full", "sampled", "off"])
async def test_a_transfer_is_repaired_if_its_digest_finds_the_damage(
    transport: str, is_stale: bool, mischief: str, finders: set[str], digest: str
) -> None:
    config = TransferConfig(
        transports=(f"fake:{mischief},over={transport}",), digest=digest, layerwise_from_bytes={transport: 1 << 40}
    )
    receiver_config = replace(config, transports=(transport,))
    async with pair(sender_config=config, receiver_config=receiver_config) as p:
        if is_stale:  # What another sequence left: as if its writer came late and ours never.
            p.target[: p.source.nbytes] = np.roll(p.source, LAYOUT.block_bytes)
        else:
            p.target[:] = 0xEE
        blocks = [10, 11, 12, 13]
        assert (await push(p, blocks) > 0) == (digest in finders)
        is_whole = True
        for layer in range(LAYOUT.num_layers):
            a, b = LAYOUT.offset(layer, SOURCE_BLOCKS[0]), p.receiver._layout.offset(layer, blocks[0])
            is_whole &= np.array_equal(p.source[a : a + RUN_BYTES], p.target[b : b + RUN_BYTES])
        assert is_whole == (digest in finders)


async def test_ends_that_were_told_different_digests_refuse_each_other() -> None:
    async with pair(sender_config=TransferConfig(digest="sampled")) as p:
        with pytest.raises(Incompatible, match="digest is full at decode-0 and sampled at prefill-0"):
            await push(p, [1, 2, 3, 9])


def test_a_digest_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BadConfig, match="digest is 'maybe', expected full, sampled, off"):
        TransferConfig(digest="maybe")


def filled() -> ByteArray:
    return np.random.default_rng(0).integers(0, 256, WIDE.total_bytes, dtype=np.uint8)


def digest_of(memory: ByteArray, *, is_sampled: bool, layer: int = 1) -> bytes:
    return LayerDigests(memory, WIDE, BLOCK_IDS, is_sampled=is_sampled).layer_digest(layer, len(BLOCK_IDS))


def place(offset: int, layer: int = 1) -> int:
    """Where a byte of a layer's share of the lease lies."""
    return WIDE.offset(layer, BLOCK_IDS[offset // WIDE.block_bytes]) + offset % WIDE.block_bytes


def test_of_single_flipped_bits_a_sample_finds_those_in_its_lines() -> None:
    memory, random = filled(), Random(1)
    before = {is_sampled: digest_of(memory, is_sampled=is_sampled) for is_sampled in (False, True)}
    num_found = dict.fromkeys(before, 0)
    for _ in range(1000):
        offset = random.randrange(len(BLOCK_IDS) * WIDE.block_bytes)
        bit = 1 << random.randrange(8)
        memory[place(offset)] ^= bit
        found = {is_sampled: digest_of(memory, is_sampled=is_sampled) != whole for is_sampled, whole in before.items()}
        assert found == {False: True, True: is_read(1, offset)}
        for is_sampled in found:
            num_found[is_sampled] += found[is_sampled]
        memory[place(offset)] ^= bit
    assert num_found == {False: 1000, True: 71}


def test_a_sample_finds_every_run_of_2_kib() -> None:
    memory, random = filled(), Random(2)
    whole = digest_of(memory, is_sampled=True)
    for _ in range(300):
        offset = random.randrange(len(BLOCK_IDS) * WIDE.block_bytes - 2048)
        places = [place(i) for i in range(offset, offset + 2048)]
        memory[places] ^= 0x10
        assert digest_of(memory, is_sampled=True) != whole
        memory[places] ^= 0x10
    assert digest_of(memory, is_sampled=True) == whole


def test_a_sample_tells_swapped_blocks_and_another_length() -> None:
    memory, n = filled(), len(BLOCK_IDS)
    whole = digest_of(memory, is_sampled=True)
    for i, j in ((0, 1), (3, 67), (63, 64), (0, n - 1)):
        swapped = list(BLOCK_IDS)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        assert LayerDigests(memory, WIDE, swapped, is_sampled=True).layer_digest(1, n) != whole
    assert LayerDigests(memory, WIDE, BLOCK_IDS, is_sampled=True).layer_digest(1, n - 1) != whole


def test_damage_at_a_fixed_stride_does_not_hide_from_the_sample() -> None:
    """Neither in one layer nor at one place of each layer."""
    for stride_kib in range(1, 513):
        assert len(set(line_numbers(0, 256 * stride_kib)[::stride_kib].tolist())) == LINES, stride_kib
    for block_kib in (4, 8, 64):
        lines = {int(line_numbers(kib_number(layer, 5, block_kib * KIB_BYTES), 1)[0]) for layer in range(256)}
        assert len(lines) == LINES


@pytest.mark.parametrize("num_blocks", [1, 63, 64, 65, len(BLOCK_IDS)])
def test_a_sampled_digest_is_the_same_without_a_compiler(num_blocks: int) -> None:
    memory = filled()
    one = LayerDigests(memory, WIDE, BLOCK_IDS, is_sampled=True)
    other = WithoutCompiler(memory, WIDE, BLOCK_IDS, is_sampled=True)
    for layer in range(WIDE.num_layers):
        assert one.layer_digest(layer, num_blocks) == other.layer_digest(layer, num_blocks)
    assert one.layer_digest(0, num_blocks) != digest_of(memory, is_sampled=False, layer=0)


def test_the_lines_are_those_of_the_pattern() -> None:
    memory = np.random.default_rng(3).integers(0, 256, 40 << 10, dtype=np.uint8)
    rows = [(memory.ctypes.data, 0, 3 << 10), (memory.ctypes.data + (9 << 10), 0, 30 << 10)]
    stream = np.concatenate([memory[: 3 << 10], memory[9 << 10 : 39 << 10]]).reshape(33, LINES, LINE_BYTES)
    wanted = [stream[i, line] for i, line in enumerate(line_numbers(77, 33))]
    assert np.array_equal(gather(rows, 77), wanted)


def test_blocks_that_are_no_whole_kib_are_hashed_whole() -> None:
    odd = replace(WIDE, block_tokens=3)
    assert odd.block_bytes % KIB_BYTES
    memory = np.random.default_rng(4).integers(0, 256, odd.total_bytes, dtype=np.uint8)
    sampled, full = (LayerDigests(memory, odd, [3, 1], is_sampled=choice) for choice in (True, False))
    assert sampled.layer_digest(1, 2) == full.layer_digest(1, 2)
