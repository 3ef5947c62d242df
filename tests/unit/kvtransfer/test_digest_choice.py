"""The table of decision 3: which damage the digest finds, planted in transfers and in memory, with it and without."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from baton.types import KvLayout
from kvtransfer.config import TransferConfig
from kvtransfer.digest import LayerDigests, block_digest
from tests.support.transfer import LAYOUT, Pair, host_memory, pair, token

# 8 KiB a block: 64 make a segment.
WIDE = KvLayout(num_layers=2, num_blocks=160, num_kv_heads=4, head_dim=32, block_tokens=16, dtype="bfloat16")
BLOCK_IDS = [7, 3, 4, 5, *range(20, 120), 1, 30 + 100]
SOURCE_BLOCKS, TARGET_BLOCKS = [4, 5, 6, 7], [10, 11, 12, 13]
RUN_BYTES = len(SOURCE_BLOCKS) * LAYOUT.block_bytes


async def push(p: Pair) -> int:
    """How often layers were written again."""
    num_blocks = len(SOURCE_BLOCKS)
    lease = p.receiver.grant("r", TARGET_BLOCKS, ttl_s=30)
    push = p.sender.begin(lease, SOURCE_BLOCKS, num_known_tokens=num_blocks * LAYOUT.block_tokens)
    for layer in range(LAYOUT.num_layers):
        push.layer_ready(layer, num_blocks)
    return (await push.commit(token("r"))).retransmits


def is_whole(p: Pair) -> bool:
    for layer in range(LAYOUT.num_layers):
        a, b = LAYOUT.offset(layer, SOURCE_BLOCKS[0]), p.receiver._layout.offset(layer, TARGET_BLOCKS[0])
        if not np.array_equal(p.source[a : a + RUN_BYTES], p.target[b : b + RUN_BYTES]):
            return False
    return True


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("is_stale", [False, True])
@pytest.mark.parametrize("mischief", ["swap=1", "tear=1", "drop=1", "corrupt=1"])
@pytest.mark.parametrize("digest", [True, False])
async def test_a_damaged_transfer_is_repaired_with_a_digest_and_taken_over_without(
    transport: str, is_stale: bool, mischief: str, digest: bool
) -> None:
    config = TransferConfig(
        transports=(f"fake:{mischief},over={transport}",), digest=digest, layerwise_from_bytes={transport: 1 << 40}
    )
    async with pair(sender_config=config, receiver_config=replace(config, transports=(transport,))) as p:
        if is_stale:  # What another sequence left: as if its writer came late and ours never.
            p.target[: p.source.nbytes] = np.roll(p.source, LAYOUT.block_bytes)
        assert (await push(p) > 0) == digest
        assert is_whole(p) == digest


def test_every_single_flipped_bit_is_found() -> None:
    memory, random = np.random.default_rng(0).integers(0, 256, WIDE.total_bytes, dtype=np.uint8), Random(1)
    num_blocks = len(BLOCK_IDS)
    whole = LayerDigests(host_memory(memory), WIDE, BLOCK_IDS).layer_digest(1, num_blocks)
    for _ in range(1000):
        block, offset = random.choice(BLOCK_IDS), random.randrange(WIDE.block_bytes)
        bit = 1 << random.randrange(8)
        memory[WIDE.offset(1, block) + offset] ^= bit
        assert LayerDigests(host_memory(memory), WIDE, BLOCK_IDS).layer_digest(1, num_blocks) != whole
        memory[WIDE.offset(1, block) + offset] ^= bit
    assert LayerDigests(host_memory(memory), WIDE, BLOCK_IDS).layer_digest(1, num_blocks) == whole


def test_the_digest_of_a_block_is_over_all_its_layers_and_nothing_else() -> None:
    memory = np.random.default_rng(0).integers(0, 256, WIDE.total_bytes, dtype=np.uint8)
    before = [block_digest(host_memory(memory), WIDE, block) for block in range(WIDE.num_blocks)]
    assert len(set(before)) == WIDE.num_blocks
    for layer in range(WIDE.num_layers):
        for offset in (0, WIDE.block_bytes - 1):
            at = WIDE.offset(layer, 5) + offset
            memory[at] ^= 1
            after = [block_digest(host_memory(memory), WIDE, block) for block in range(WIDE.num_blocks)]
            assert [block for block in range(WIDE.num_blocks) if after[block] != before[block]] == [5]
            memory[at] ^= 1
