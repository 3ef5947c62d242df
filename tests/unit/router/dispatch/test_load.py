"""A thousand streams at once through the HTTP face, every token right."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from router.cluster.membership import State
from router.config import RouterConfig
from router.serve import Router, running
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import VOCAB_SIZE, baseline, until, write_model_folder

NUM_STREAMS = 1000
MAX_TOKENS = 24
PROMPT = list(range(10, 42))


async def stream(router: Router, seed: int) -> list[int]:
    assert router.http is not None
    host, port = router.http.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = {"prompt": PROMPT, "max_tokens": MAX_TOKENS, "seed": seed, "stream": True, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"data: [DONE]") == 1
    chunks = [json.loads(x[6:]) for x in answer.decode().splitlines() if x.startswith("data: {")]
    return [i for chunk in chunks for choice in chunk["choices"] for i in choice["token_ids"]]


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_thousand_streams_at_once(tmp_path: Path) -> None:
    # Slow steps: the last stream begins while the first still runs.
    config = FakeConfig(vocab_size=VOCAB_SIZE, num_blocks=1 << 16, step_s=1.0)
    async with FakeCluster(config, prefill=2, decode=2) as cluster:
        settings = RouterConfig(nodes=cluster.addresses, model_folder=write_model_folder(tmp_path / "model"))
        async with running(settings) as router:
            await until(lambda: all(m.state is State.READY for m in router.dispatcher.nodes.members))
            async with asyncio.TaskGroup() as group:
                streams = [group.create_task(stream(router, seed)) for seed in range(NUM_STREAMS)]
                await until(lambda: router.dispatcher.scheduler.num_in_flight == NUM_STREAMS, timeout_s=60)
            for seed, done in enumerate(streams):
                assert done.result() == expected_tokens(PROMPT, seed, MAX_TOKENS, VOCAB_SIZE), seed
            await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
            router.dispatcher.scheduler.check()
            await baseline(cluster)
