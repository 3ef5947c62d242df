"""One prefill and one decode node: split while idle, whole where prompts queue, by the step times that nodes tell."""

from __future__ import annotations

import asyncio
from collections import Counter

import baton
from router.cluster.config import PolicyConfig
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import router_beside

# A prompt of 400 tokens takes 0.4 s.
CONFIG = FakeConfig(prefill_token_s=1e-3, max_batch_tokens=400)
NUM_TOKENS = 4


async def ask(router: Router, numbers: range) -> Counter[str]:
    """All at once; the placements by "prefill node, decode node"."""

    async def one(client: baton.AsyncClient, number: int) -> str:
        prompt = [1 + number % 500] * 400
        done = await client.complete(prompt, max_tokens=NUM_TOKENS, seed=number, ignore_eos=True)
        assert list(done.token_ids) == expected_tokens(prompt, number, NUM_TOKENS, CONFIG.vocab_size)
        return f"{done.relay.prefill_node_id} {done.relay.decode_node_id}"

    async with baton.AsyncClient(router.grpc or "") as client, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(client, number)) for number in numbers]
    return Counter(task.result() for task in running)


def reasons(router: Router) -> Counter[str]:
    return Counter(x["placement"] for x in router.status.snapshot(router.dispatcher.clock.now())["recent"])


async def test_an_idle_cluster_splits_and_one_whose_prompts_queue_uses_both_nodes() -> None:
    async with FakeCluster(CONFIG, prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        for number in range(5):
            assert await ask(router, range(number, number + 1)) == {"prefill-0 decode-0": 1}
        found = await ask(router, range(100, 108))
        assert set(found) == {"prefill-0 decode-0", "decode-0 decode-0"}
        assert found["decode-0 decode-0"] >= 2
        # Whatever was before, an idle cluster splits.
        assert await ask(router, range(200, 201)) == {"prefill-0 decode-0": 1}
        assert reasons(router)["whole"] == found["decode-0 decode-0"]


async def test_the_setting_holds_under_the_same_load() -> None:
    for mode, expected in (("always", {"prefill-0 decode-0"}), ("never", {"prefill-0 prefill-0", "decode-0 decode-0"})):
        policy = PolicyConfig(disaggregation=mode)
        async with FakeCluster(CONFIG, prefill=1, decode=1) as cluster, router_beside(cluster, policy=policy) as router:
            assert set(await ask(router, range(6))) == expected
