"""Whatever the delays, the blocks, the order of the news and the damage: what arrives is what was computed, no byte
outside the lease changes, and nothing is written after a lease's release."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BatonError
from kvtransfer.config import TransferConfig
from kvtransfer.protocol.receiver_events import Arrived, Released
from tests.support.transfer import LAYOUT, Pair, fake_device, pair, token

MISCHIEF = ["", "corrupt=1", "corrupt=1,drop=1", "reorder=1", "delay_s=0.004", "die=3", "die=1"]
ENDS = ["commit", "abort", "revoke"]


async def compute(p: Pair, push: object, blocks: list[int], random_: random.Random) -> None:
    """As an engine does: layer by layer, in chunks of the prompt, each announced right after it was queued."""
    device, memory = fake_device(p.source_memory), p.source_memory
    done = 0
    while done < len(blocks):
        stop = random_.randint(done + 1, len(blocks))
        for layer in range(LAYOUT.num_layers):
            for i in range(done, stop):
                data = np.frombuffer(random_.randbytes(LAYOUT.block_bytes), dtype=np.uint8)
                device.compute.write(memory.address + LAYOUT.offset(layer, blocks[i]), data)
            await asyncio.to_thread(push.layer_ready, layer, stop)
        done = stop


async def one_run(transport: str, seed: int, mischief: str, end: str, *, is_layerwise: bool) -> None:
    random_ = random.Random(seed)
    num_blocks = random_.randint(1, 7)
    source_blocks = random_.sample(range(LAYOUT.num_blocks), num_blocks)
    leased = random_.sample(range(LAYOUT.num_blocks + 11), num_blocks + random_.randint(0, 2))
    spec = f"fake:{mischief},seed={seed},over={transport}" if mischief else transport
    sender_config = TransferConfig(
        transports=(spec,), layerwise_from_bytes={transport: 0 if is_layerwise else 1 << 40}, copy_threads=2
    )
    receiver_config = TransferConfig(transports=(transport,))
    async with pair(
        sender_config=sender_config, receiver_config=receiver_config, source_on_device=True, target_on_device=True
    ) as p:
        lease = p.receiver.grant("r", leased, ttl_s=30)
        push = p.sender.begin(lease, source_blocks, num_known_tokens=num_blocks * LAYOUT.block_tokens)
        await compute(p, push, source_blocks, random_)
        if end != "commit":
            await asyncio.sleep(random_.random() * 0.01)
        if end == "revoke":
            p.receiver.revoke("r", "client left")
        try:
            await (push.abort("client left") if end == "abort" else push.commit(token("r")))
            has_arrived = end != "abort"
        except BatonError:
            has_arrived = False
        # From here on the engine may use the source's blocks again: nothing reads them.
        if has_arrived:
            await p.inbox.wait(Arrived, "r")
            p.check_copied(LAYOUT, source_blocks, p.receiver._layout, lease.block_ids)
            assert end == "commit"
        else:
            assert end != "commit" or "die" in mischief
            await p.inbox.wait(Released, "r")
            p.target[:] = 0xEE
            await asyncio.to_thread(fake_device(p.target_memory).settle)
            await asyncio.to_thread(fake_device(p.source_memory).settle)
            assert (p.target == 0xEE).all(), "a write after the release"


@pytest.mark.parametrize("transport", ["cuda_ipc", "tcp"])
@settings(max_examples=25)
@given(st.integers(0, 1 << 30), st.sampled_from(MISCHIEF), st.sampled_from(ENDS), st.booleans())
def test_kv_arrives_whole_or_not_at_all(transport: str, seed: int, mischief: str, end: str, is_layerwise: bool) -> None:
    asyncio.run(one_run(transport, seed, mischief, end, is_layerwise=is_layerwise))
