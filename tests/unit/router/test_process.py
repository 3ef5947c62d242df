"""What holds for a process that is a router and nothing else."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path

import httpx

from router.config import RouterConfig
from router.serve import serve
from tests.support.fake_nodes import FakeCluster
from tests.support.router import until


async def test_requests_leave_nothing_to_a_collector_that_rarely_looks(tmp_path: Path) -> None:
    thresholds, stop = gc.get_threshold(), asyncio.Event()
    ready = tmp_path / "ready.json"
    try:
        async with FakeCluster(prefill=1, decode=1) as cluster, asyncio.TaskGroup() as group:
            config = RouterConfig(nodes=tuple(cluster.addresses), ready_file=ready, ready_needs_nodes=True)
            group.create_task(serve(config, stop))
            await until(ready.exists, timeout_s=20)
            assert gc.get_threshold()[2] > thresholds[2]
            async with httpx.AsyncClient(base_url=json.loads(ready.read_text())["http"], timeout=30) as client:
                body = {"prompt": [5, 6, 7], "max_tokens": 5, "seed": 1, "stream": True}
                (await client.post("/v1/completions", json=body)).raise_for_status()
                gc.collect()
                gc.disable()
                for _ in range(50):
                    assert (await client.post("/v1/completions", json=body)).text.endswith("data: [DONE]\n\n")
                # Client, nodes and gRPC are in this process as well; a request's own objects are some hundreds.
                assert gc.collect() < 50 * 100
            stop.set()
    finally:
        gc.enable()
        gc.unfreeze()
        gc.set_threshold(*thresholds)
