"""`baton plan advise` beside fake nodes: what it asks of a cluster, what it refuses, what it tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from random import Random

import pytest
from rich.console import Console
from typer.testing import CliRunner

from baton.client import AsyncClient
from baton.errors import BadConfig, Unavailable
from baton.metrics import Metrics, exposition
from baton.metrics_server import MetricsServer
from baton.types import Role
from cli.app import app
from cli.plan_advise import commands_of, show
from cli.watch import watch
from planner.advise.advice import AdviceConfig, advised
from planner.advise.cluster import pool_uses
from planner.advise.setup import Setup
from planner.workload import drawn
from router.cluster.config import PolicyConfig
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import router_beside
from tests.support.watched import watched_as

ALWAYS = PolicyConfig(disaggregation="always")


@asynccontextmanager
async def exporting(read: Callable[[], bytes]) -> AsyncIterator[str]:
    """host:port of a port for metrics."""
    server = MetricsServer(read)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.close()


async def ask(client: AsyncClient, count: int) -> None:
    """So many requests, a few at a time, of several lengths."""
    rng, turns = Random(1), asyncio.Semaphore(8)

    async def one(prompt: int, tokens: int) -> None:
        async with turns:
            await client.complete([5] * prompt, max_tokens=tokens, min_tokens=tokens)

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one(rng.randint(10, 200), rng.randint(2, 20)))


async def test_a_cluster_under_load_is_watched_and_advised() -> None:
    metrics = Metrics()
    for name, value in (("max_batch_tokens", 512.0), ("max_num_seqs", 64.0), ("tbt_target_seconds", 0.0)):
        metrics.gauge(f"baton_{name}", "h", lambda value=value: value)  # type: ignore[misc]
    async with (
        exporting(lambda: exposition(metrics)) as address,
        FakeCluster(FakeConfig(metrics_address=address, transfer_s=0.001), prefill=1, decode=2) as cluster,
        router_beside(cluster, policy=ALWAYS) as router,
        AsyncClient(router.grpc or "") as client,
    ):
        asked = asyncio.create_task(ask(client, 120))
        ticks: list[float] = []
        watched = await watch([router.grpc or ""], "", 1.0, lambda done, _: ticks.append(done))
        await asked
        rest = asyncio.create_task(ask(client, 120))
        more = await watch([router.grpc or ""], "", 1.5, lambda done, _: None)
        await rest
    assert watched.seconds >= 1
    assert ticks
    assert [member.node_id for member in watched.members] == ["decode-0", "decode-1", "prefill-0"]
    assert set(watched.metrics) == {"decode-0", "decode-1", "prefill-0"}
    assert watched.observed.steps
    seen = max((watched, more), key=lambda each: each.routers[0].grown("baton_sequence_prompt_tokens_count"))
    advice = advised(seen, config=AdviceConfig(min_requests=10, num_requests=100))
    assert advice.setup == Setup(1, 2, disaggregation="always", max_batch_tokens=512, max_num_seqs=64)
    assert 10 <= (advice.load.prompts.mean or 0) <= 200
    assert 2 <= (advice.load.outputs.mean or 0) <= 20
    assert advice.fits


async def test_a_port_that_does_not_answer_is_named() -> None:
    async with (
        FakeCluster(FakeConfig(metrics_address="127.0.0.1:1"), prefill=1, decode=1) as cluster,
        router_beside(cluster) as router,
    ):
        with pytest.raises(
            Unavailable, match=r"(prefill|decode)-0 did not say its metrics at 127\.0\.0\.1:1 .* reachable"
        ):
            await watch([router.grpc or ""], "", 0.1, lambda done, total: None)


async def test_a_cluster_that_changes_meanwhile_is_refused() -> None:
    async with (
        FakeCluster(prefill=1, decode=2) as cluster,
        router_beside(cluster) as router,
        AsyncClient(router.grpc or "") as client,
    ):
        has_begun = asyncio.Event()
        # Long enough that the router hears of the change: nodes report every 50 ms.
        watching = asyncio.create_task(watch([router.grpc or ""], "", 1.0, lambda done, total: has_begun.set()))
        await has_begun.wait()
        await client.set_role("decode-1", Role.PREFILL)
        with pytest.raises(Unavailable, match=r"the cluster changed while it was watched \(decode-1 came, left, or"):
            await watching


def told(advice_of: Setup, rate: float) -> str:
    work = drawn(
        "x", lambda rng: rng.randint(500, 1500), lambda rng: rng.randint(10, 30), rate=rate, seconds=60.0, seed=1
    )
    watched = watched_as(advice_of, work)
    advice = replace(advised(watched, config=AdviceConfig(num_requests=150)), warnings=("mind this",))
    output = StringIO()
    console = Console(file=output, width=10_000)
    show(console, advice, tuple(pool_uses(watched)), commands_of(advice, watched, "baton", "r:1"))
    return output.getvalue()


def test_what_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(Setup(prefill=1, decode=3, disaggregation="always"), 8.0)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0].startswith("watched 59.8 s: 475 requests, 7.94 a second; prompts of 1,014 and outputs of 20 tokens")
    assert lines[1].startswith("today: 1 prefill + 3 decode, splitting always, no TBT target")
    order = [
        text.index(part)
        for part in ("busy", "today's cluster", "the model", "one change each", "    baton role decode-")
    ]
    assert order == sorted(order)
    assert "    baton role decode-2 prefill --router r:1" in lines
    assert "no change pays" not in text
    assert "warning: mind this" in capsys.readouterr().err


def test_that_nothing_pays_is_told() -> None:
    """Failure 30: that a change of splitting would not help a running cluster either."""
    assert told(Setup(mixed=1), 2.0).splitlines()[-1].startswith("no change pays")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--router", "nowhere"), "--router is 'nowhere', expected host:port"),
        (("--slo", "TTFT_slowdown:p99:2"), "expected a metric of TTFT_s, TBT_s, E2E_s"),
        (("--slo", "x"), "--slo is 'x', expected METRIC:PART:LIMIT"),
        (("--machine", "h900"), "--machine is 'h900', expected one of"),
        (("--machines", "nowhere.toml"), "cannot be read"),
    ],
)
def test_what_cannot_be_advised_is_said(arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(BadConfig, match=complaint):
        CliRunner().invoke(app, ["plan", "advise", *arguments], catch_exceptions=False)
