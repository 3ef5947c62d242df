"""Sender and receiver over real sockets: bytes arrive, failures are told, nothing is left behind."""

from __future__ import annotations

import asyncio

import pytest
from kvtransfer_pair import LAYOUT, pair, token

from kvtransfer.config import TransferConfig
from kvtransfer.receiver import Arrived


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("layerwise_from_bytes", [0, 1 << 40])
async def test_bytes_arrive_in_the_leased_blocks_and_nowhere_else(transport: str, layerwise_from_bytes: int) -> None:
    config = TransferConfig(transports=(transport,), layerwise_from_bytes={transport: layerwise_from_bytes})
    async with pair(sender_config=config, receiver_config=config) as p:
        source_blocks = [5, 6, 7, 1, 30]
        lease = p.receiver.grant("r/0/0", [11, 10, 12, 13, 50, 3], ttl_s=30)
        push = p.sender.begin(lease, source_blocks, num_known_tokens=4 * LAYOUT.block_tokens + 1)
        for layer in range(LAYOUT.num_layers):
            await asyncio.to_thread(push.layer_ready, layer, 2)
        for layer in range(LAYOUT.num_layers):
            await asyncio.to_thread(push.layer_ready, layer, 5)
        report = await push.commit(token("r/0/0"))
        assert push.layerwise == (layerwise_from_bytes == 0)
        assert (report.transport, report.num_blocks, report.retransmits) == (transport, 5, 0)
        assert report.num_bytes == 5 * LAYOUT.block_bytes * LAYOUT.num_layers
        arrived = await p.inbox.wait(Arrived, "r/0/0")
        assert arrived.first_token == token("r/0/0")
        p.check_copied(LAYOUT, source_blocks, p.receiver._layout, lease.block_ids)
