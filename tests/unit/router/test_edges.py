"""Imports stay light, settings are checked, the synchronous client works, the tokens of a slow reader gather."""

from __future__ import annotations

import asyncio
import pkgutil
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

import baton
import router as router_package
from baton import errors, settings
from baton.client import Accepted, Delta, Finished, Options
from baton.observe import Lifeline
from baton.server import LIVENESS
from baton.types import FinishReason, TransferReport
from router.config import LimitsConfig, RouterConfig
from router.dispatch.stream import Backlog, Pacer, TokenStream
from router.face.http_server import listen
from router.flow.config import FlowConfig
from router.flow.messages import Outcome, OutcomeKind
from router.turns import Turns
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.figures import figure
from tests.support.router import router_beside, until


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def modules(package: Any) -> list[str]:
    return [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]


@pytest.mark.parametrize("package", [baton, router_package])
def test_no_module_loads_torch_or_transformers(package: Any) -> None:
    imports = "\n".join(f"import {name}" for name in modules(package))
    heavy = "[m for m in ('torch', 'transformers', 'numpy', 'engine', 'kvtransfer') if m in sys.modules]"
    assert run(f"import sys\n{imports}\nprint({heavy})") == "[]"


def test_import_baton_is_light() -> None:
    heavy = "[m for m in ('grpc', 'google.protobuf', 'prometheus_client', 'fastapi') if m in sys.modules]"
    assert run(f"import sys, baton, baton.types, baton.errors\nprint({heavy})") == "[]"
    assert run("import sys, baton\nbaton.Client\nprint('prometheus_client' in sys.modules)") == "False"
    with pytest.raises(AttributeError):
        _ = baton.nothing


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"nodes": ()}, "nodes"),
        ({"nodes": ("nowhere",)}, "nodes"),
        ({"nodes": ("a:1", "a:1")}, "nodes"),
        ({"nodes": ("a:1",), "http_port": 70000}, "http_port"),
        ({"nodes": ("a:1",), "http_port": None, "grpc_port": None}, "http_port"),
        ({"nodes": ("a:1",), "flow": FlowConfig(max_attempts=0)}, "flow.max_attempts"),
        ({"nodes": ("a:1",), "limits": LimitsConfig(max_queued=-1)}, "limits.max_queued"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(errors.BadConfig) as refused:
        RouterConfig(**settings)
    assert refused.value.param == name


def test_settings_from_a_mapping() -> None:
    def config_of(table: dict[str, Any]) -> RouterConfig:
        return settings.build(RouterConfig, settings.flatten(table, list(settings.keys(RouterConfig)), "test.json: "))

    config = config_of({"nodes": ["a:1"], "flow": {"max_attempts": 3}})
    assert (config.nodes, config.flow.max_attempts) == (("a:1",), 3)
    for bad in ({"nodes": ["a:1"], "colour": 1}, {"nodes": ["a:1"], "flow": {"colour": 1}}):
        with pytest.raises(errors.BadConfig, match=r"test\.json: unknown setting '(flow\.)?colour'"):
            config_of(bad)


async def test_synchronous_client() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        address = router.grpc
        assert address is not None

        def use() -> None:
            with baton.Client(address) as client:
                parts = list(client.generate([1, 2], max_tokens=5, seed=1))
                assert isinstance(parts[0], Accepted)
                assert isinstance(parts[-1], Finished)
                ids = [i for p in parts if isinstance(p, Delta) for i in p.token_ids]
                assert ids == expected_tokens([1, 2], 1, 5, 512)
                assert client.complete([1, 2], Options(request_id="abc"), max_tokens=2).request_id == "abc"
                assert {n.node.node_id for n in client.status().nodes} == {"prefill-0", "decode-0"}
                assert len(client.ledger().nodes) == 2
                with pytest.raises(errors.InvalidRequest, match="colour"):
                    client.complete([1], colour="red")
                # Leaving the loop cancels the request.
                for part in client.generate([1], max_tokens=3000):
                    if isinstance(part, Delta):
                        break

        await asyncio.to_thread(use)
        await until(lambda: router.dispatcher.scheduler.num_in_flight == 0)
    with baton.Client("127.0.0.1:1") as client, pytest.raises(errors.Unavailable):
        client.complete([1])


async def test_health_service_follows_readiness() -> None:
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        assert router.grpc is not None
        async with aio.insecure_channel(router.grpc) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def state(service: str) -> int:
                return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)

            for service in ("", "baton.v1.Router", LIVENESS):
                assert await state(service) == health_pb2.HealthCheckResponse.SERVING
            for node in cluster.nodes.values():
                await node.die()
            await until(lambda: not router.dispatcher.is_ready)
            await asyncio.sleep(0.05)
            assert await state("baton.v1.Router") == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await state("") == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await state(LIVENESS) == health_pb2.HealthCheckResponse.SERVING


async def test_tokens_gather_while_the_reader_is_away() -> None:
    stream = TokenStream(
        Pacer(0.05, Turns(0.01)), Backlog(max_stream_bytes=1000, max_answer_bytes=1000, max_bytes=1000)
    )
    for i in range(5):
        stream.push((i,), ())
    assert (await stream.next()).token_ids == [0, 1, 2, 3, 4]
    reading = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    stream.push((5,), ())
    assert (await reading).token_ids == [5]
    stream.end(Outcome(OutcomeKind.FINISHED, FinishReason.STOP), Lifeline(0.0).relay())
    assert (await stream.next()).outcome is not None


def test_relay_line_reads_like_one() -> None:
    life = Lifeline(10.0)
    life.placed("p0", "d0", 10.0)
    life.sent(10.001)
    life.prefilled(0.002, 0.03, 7)
    life.transferred(TransferReport("shm", True, 3 << 20, 4, 0.01, 0.002), 10.05)
    life.tokens(1, 10.05)
    life.tokens(1, 10.06)
    life.tokens(2, 10.10)
    life.ended(10.11)
    relay = life.relay()
    assert relay.num_cached_tokens == 7
    assert relay.tbt_mean_s == pytest.approx(0.05 / 3)
    assert relay.line() == (
        "p0 -> d0 | queue 3.0 ms | prefill 30.0 ms (7 tokens cached) | transfer 2.0 ms (3.0 MiB shm, layer-wise) | "
        "TTFT 50.0 ms | TBT 16.7 ms (max 40.0 ms) | E2E 110.0 ms | 4 tokens"
    )


async def test_27_usage_and_timing_of_the_relay() -> None:
    """Known failure 27: the time to the first token is the sum of its stages."""
    config = replace(FakeConfig(), prefill_token_s=0.001)
    async with FakeCluster(config, prefill=1, decode=1) as cluster, router_beside(cluster) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            done = await asyncio.gather(*(client.complete([1] * 30, max_tokens=4, seed=i) for i in range(4)))
    gaps_s = [abs(sum(stage.duration_s for stage in one.relay.ttft_stages) - one.relay.ttft_s) for one in done]
    figure(27, "largest difference of a TTFT and the sum of its stages", max(gaps_s))
    for one in done:
        assert sum(stage.duration_s for stage in one.relay.ttft_stages) == pytest.approx(one.relay.ttft_s)
        assert all(stage.duration_s >= 0 for stage in one.relay.ttft_stages)
        assert one.relay.prefill_s > 0
        assert [stamp.name for stamp in one.relay.stamps][:2] == ["arrived", "queued"]
        assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (30, 4)


async def test_chunks_do_not_wait_for_acknowledgements() -> None:
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        accepted.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    server = await asyncio.start_server(on_client, sock=listen("127.0.0.1", 0))
    async with server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert await accepted == 1
        writer.close()
        await writer.wait_closed()
