"""What a router's /metrics says of itself and of the nodes it sees: labels, the process, who left and who was lost."""

from __future__ import annotations

import os
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from baton.client import AsyncClient
from baton.metrics import Metrics, add_process, exposition
from baton.registry import RegistryConfig
from router.cluster.config import PolicyConfig
from router.cluster.membership import State
from router.config import RouterConfig
from router.serve import Router
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside, until


def samples(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


async def scrape(router: Router, path: str = "/metrics") -> httpx.Response:
    assert router.http is not None
    async with httpx.AsyncClient(base_url=router.http) as client:
        return (await client.get(path)).raise_for_status()


async def test_every_series_of_a_router_says_its_cluster_and_model_once() -> None:
    settings = {"registry": RegistryConfig(cluster="west"), "model_names": ("m",)}
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, **settings) as router:
        found = samples((await scrape(router)).text)
    assert {(s.labels["cluster"], s.labels["model_name"]) for s in found} == {("west", "m")}
    assert {s.name for s in found} >= {"process_open_fds", "vllm:num_requests_running", "baton_build_info"}


async def test_the_model_is_named_as_soon_as_a_node_has_named_it() -> None:
    """A router without a model folder learns the name from its nodes."""
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        found = samples((await scrape(router)).text)
        assert {s.labels["model_name"] for s in found} == {router.frontend.model.name} != {""}


async def test_lengths_of_sequences_and_the_way_of_splitting_are_exported() -> None:
    """What a planner draws a workload from."""
    policy = PolicyConfig(disaggregation="always")
    async with (
        FakeCluster(prefill=1, decode=1) as cluster,
        router_beside(cluster, policy=policy) as router,
        AsyncClient(router.grpc or "") as client,
    ):
        for prompt, tokens in (([5] * 3, 2), ([5] * 40, 5), ([5] * 40, 5)):
            await client.complete(prompt, max_tokens=tokens, min_tokens=tokens)
        shown = samples((await scrape(router)).text)
    found = {(s.name, s.labels.get("le", s.labels.get("mode", ""))): s.value for s in shown}

    def counted(what: str, *bounds: str) -> list[float]:
        return [found[(f"baton_sequence_{what}_tokens_bucket", bound)] for bound in bounds]

    assert counted("prompt", "2.0", "3.0", "32.0", "48.0", "+Inf") == [0, 1, 1, 3, 3]
    assert counted("generated", "1.0", "2.0", "4.0", "6.0") == [0, 1, 1, 3]
    assert [found[(f"baton_sequence_{what}_tokens_sum", "")] for what in ("prompt", "generated")] == [83, 12]
    assert [found[("baton_disaggregation", mode)] for mode in ("always", "auto", "never")] == [1, 0, 0]


def test_the_registry_names_the_cluster() -> None:
    assert RouterConfig(registry=RegistryConfig("redis://h:1", "east")).registry.cluster == "east"
    assert RouterConfig(nodes=("h:1",)).registry.cluster == "default"


async def test_nodes_that_leave_as_they_said_are_told_from_lost_ones() -> None:
    """And only the lost are still looked for by Prometheus."""
    async with (
        FakeCluster(FakeConfig(metrics_address="h:1"), prefill=2, decode=2) as cluster,
        router_beside(cluster) as router,
    ):
        states = [State.DRAINING, State.LEFT]
        cluster["decode-0"].drain(0.0)
        await until(lambda: states[0] in [m.state for m in router.dispatcher.nodes.members])
        await cluster["decode-0"].die()
        await until(lambda: states[1] in [m.state for m in router.dispatcher.nodes.members])
        assert len((await scrape(router, "/metrics/targets")).json()) == 3
        await cluster["prefill-1"].die()
        await until(lambda: [m.state for m in router.dispatcher.nodes.members].count(State.LOST) == 1)
        counted = {(s.name, s.labels.get("pool")): s.value for s in samples((await scrape(router)).text)}
        ends = {name: [counted[(f"baton_node_{name}_total", pool)] for pool in ("prefill", "decode", "mixed")]
                for name in ("losses", "drains")}  # fmt: skip
        assert ends == {"losses": [1, 0, 0], "drains": [0, 1, 0]}
        assert len((await scrape(router, "/metrics/targets")).json()) == 3


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_a_process_shows_its_memory_time_files_and_start() -> None:
    metrics = Metrics({"node": "n"})
    add_process(metrics, "worker")
    found = {s.name: s for s in samples(exposition(metrics).decode())}
    assert found["baton_build_info"].labels.items() >= {"component": "worker", "node": "n"}.items()
    assert found["process_resident_memory_bytes"].value > 10e6
    assert found["process_virtual_memory_bytes"].value >= found["process_resident_memory_bytes"].value
    assert 0 < found["process_start_time_seconds"].value <= time.time() + 1
    assert found["process_open_fds"].value < found["process_max_fds"].value
    pipe = os.pipe()
    try:
        again = {s.name: s for s in samples(exposition(metrics).decode())}
    finally:
        for end in pipe:
            os.close(end)
    assert again["process_open_fds"].value == found["process_open_fds"].value + 2
    assert again["process_cpu_seconds_total"].value >= found["process_cpu_seconds_total"].value > 0
