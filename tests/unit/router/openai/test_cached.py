"""What the router's faces say of the prefix cache, with nodes that have the first 32 tokens of every prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import baton
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.figures import figure
from tests.support.router import VOCAB_SIZE, router_beside, until, write_model_folder

CONFIG = FakeConfig(vocab_size=VOCAB_SIZE, num_cached_blocks=2)
PROMPT = [*range(2, 42)]


def total(router: Router, name: str) -> float:
    return {"queries": router.metrics.prompt_tokens, "hits": router.metrics.cached_tokens}[name].value


async def test_26_cached_tokens_in_the_usage_of_every_kind_of_answer(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "tiny")
    async with (
        FakeCluster(CONFIG, prefill=1, decode=1) as cluster,
        router_beside(cluster, model_folder=folder) as router,
        httpx.AsyncClient(base_url=router.http or "") as http,
        baton.AsyncClient(router.grpc or "") as grpc,
    ):

        async def usage(path: str, **body: Any) -> dict[str, Any]:
            answer = await http.post(f"/v1/{path}", json=body | {"max_tokens": 3, "seed": 1})
            assert answer.status_code == 200, answer.text
            if not body.get("stream"):
                assert " ms (32 tokens cached) | " in answer.headers["x-baton-relay"]
                return dict(answer.json()["usage"])
            *_, last, done = [event for event in answer.text.split("\n\n") if event]
            assert done == "data: [DONE]"
            return dict(json.loads(last.removeprefix("data: "))["usage"])

        num_checked = 0
        messages = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 4}]
        for stream in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            for path, said in (("completions", {"prompt": PROMPT}), ("chat/completions", {"messages": messages})):
                found = await usage(path, **said, **stream)
                assert found["prompt_tokens_details"] == {"cached_tokens": 32}, path
                num_checked += 1
                assert found["total_tokens"] == found["prompt_tokens"] + 3
        several = await usage("completions", prompt=[PROMPT, PROMPT[:20]], n=2)
        assert several["prompt_tokens"] == 60
        assert several["prompt_tokens_details"] == {"cached_tokens": 32 + 16}, "once for each prompt"
        answer = await grpc.complete(PROMPT, max_tokens=3)
        assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (40, 32)
        assert answer.relay.num_cached_tokens == 32
        short = await grpc.complete(PROMPT[:16], max_tokens=3)
        assert short.usage.cached_tokens == 0, "the last token is computed"
        figure(26, "kinds of answers whose cached tokens are not those of the prompt", num_checked + 3, "kinds")
        metrics = (await http.get("/metrics")).text
        model = 'model_name="tiny"'
        for name, value in (("queries", total(router, "queries")), ("hits", total(router, "hits"))):
            (line,) = [x for x in metrics.splitlines() if x.startswith(f"vllm:prefix_cache_{name}_total{{")]
            assert model in line
            assert 'engine="0"' in line
            assert float(line.split()[-1]) == value > 0


async def test_caches_are_shown_and_dropped_through_the_router() -> None:
    async with (
        FakeCluster(CONFIG, prefill=1, decode=2) as cluster,
        router_beside(cluster, all_up=False) as router,
        baton.AsyncClient(router.grpc or "") as client,
    ):
        await until(lambda: all(m.is_up for m in router.dispatcher.nodes.members))
        before = await client.cache()
        assert [(x.node_id, x.is_on, x.known_blocks) for x in before.nodes] == [
            (name, True, 2) for name in ("decode-0", "decode-1", "prefill-0")
        ]
        await cluster["decode-1"].die()
        await until(lambda: sum(m.is_up for m in router.dispatcher.nodes.members) == 2)
        dropped = await client.cache(drop=True)
        assert [(x.node_id, x.known_blocks, x.dropped_blocks) for x in dropped.nodes] == [
            ("decode-0", 0, 2),
            ("prefill-0", 0, 2),
        ]
        assert [*dropped.unreachable] == [cluster["decode-1"].address], "a node that has not dropped its cache is named"
        assert [x.known_blocks for x in (await client.cache()).nodes] == [0, 0]
        assert (await client.complete(PROMPT, max_tokens=1)).usage.cached_tokens == 0


async def test_the_status_page_has_cached_blocks_and_tokens() -> None:
    async with (
        FakeCluster(CONFIG, mixed=1) as cluster,
        router_beside(cluster) as router,
        baton.AsyncClient(router.grpc or "") as client,
    ):
        await client.complete(PROMPT, max_tokens=1)
        await until(lambda: router.status.snapshot(0.0)["nodes"][0]["blocks"]["cached"] == 2)
        now = router.dispatcher.clock.now()
        found = router.status.snapshot(now)
        (pool,) = found["pools"]
        assert pool["blocks"]["total"] == 1024
        assert pool["blocks"]["total"] - pool["blocks"]["free"] == 2, "cached ones alone"
        (recent,) = found["recent"]
        assert (recent["num_prompt_tokens"], recent["num_cached_tokens"]) == (40, 32)
        shares = router.status.snapshot(now + 3.0)["series"]["cached_share"]
        assert [x for x in shares if x is not None] == [pytest.approx(0.8)]
