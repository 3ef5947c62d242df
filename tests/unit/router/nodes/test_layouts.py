"""Nodes whose KV has another shape, as shards of another tensor parallelism have: refused at the handshake with both
layouts, while the others serve."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import pytest

import baton
from baton.types import KvLayout, Role
from router.cluster.membership import State
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.figures import figure
from tests.support.router import baseline, router_beside, until

NUM_REQUESTS = 128


@dataclass(frozen=True, slots=True)
class HalvedConfig(FakeConfig):
    """The half of the heads that a node of two has of each layer, and the layers of a stage of two."""

    num_layers: int = 1
    num_kv_heads: int = 2

    @property
    def layout(self) -> KvLayout:
        return KvLayout(self.num_layers, self.num_blocks, self.num_kv_heads, 1, self.block_tokens, "float32")


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (HalvedConfig(num_kv_heads=2), "num_kv_heads is 1 here and 2 there"),
        (HalvedConfig(num_layers=2, num_kv_heads=1), "num_layers is 1 here and 2 there"),
        (FakeConfig(block_tokens=32), "block_tokens is 16 here and 32 there"),
    ],
    ids=["heads", "layers", "block"],
)
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_18_a_node_of_another_layout_is_refused_with_both_and_harms_no_request(
    odd: FakeConfig, said: str, role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = FakeCluster(prefill=1, decode=1)
    cluster.add("odd", role, odd)
    async with cluster:
        # The cluster's layout is that of the nodes that were there first.
        await cluster["odd"].die()
        async with router_beside(cluster, all_up=False) as router:
            members = router.dispatcher.nodes.members
            await until(lambda: sum(m.state is State.READY for m in members) == 2, 20.0)
            began_s = time.monotonic()
            await cluster["odd"].start()
            async with baton.AsyncClient(router.grpc or "") as client:
                calls = [
                    asyncio.create_task(client.complete([3, n], max_tokens=12, seed=n)) for n in range(NUM_REQUESTS)
                ]
                await until(lambda: any(m.state is State.REFUSED for m in members), 20.0)
                figure(18, "start of a node of another layout to its refusal", time.monotonic() - began_s)
                done = await asyncio.gather(*calls)
                told = [n.state for n in (await client.status()).nodes if n.state.startswith("refused")]
            vocab = FakeConfig().vocab_size
            for n, completion in enumerate(done):
                assert list(completion.token_ids) == expected_tokens([3, n], n, 12, vocab)
                assert completion.relay.attempts == 1
                assert "odd" not in (completion.relay.prefill_node_id, completion.relay.decode_node_id)
            assert len(told) == 1
            assert said in told[0]
            assert "(here) and odd (there)" in told[0]
            assert said in caplog.text
            assert cluster["odd"].used_blocks == 0
            await baseline(cluster)
