"""A router that stood still blames no node for it, and a node that was only suspect is a node again."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

import baton
from baton.client import Options
from baton.clock import catch_up_s
from baton.errors import DeadlineExceeded
from baton.patience import patient_timeout
from router.cluster.membership import MembershipConfig, State
from router.config import RouterConfig
from router.flow.config import FlowConfig
from router.serve import Router, running
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.figures import figure
from tests.support.router import baseline, until

pytestmark = pytest.mark.alone
VOCAB = FakeConfig().vocab_size


@contextmanager
def child(*arguments: str) -> Iterator[Callable[[], bytes]]:
    """Another Python process, which ends with its input; gives what reads its first line."""
    with subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield process.stdout.readline
        finally:
            process.stdin.close()
            process.wait(20.0)


@asynccontextmanager
async def router_beside_processes(flow: FlowConfig, membership: MembershipConfig) -> AsyncIterator[Router]:
    """Nodes in a process of their own: they go on while the router's loop stands still."""
    with child("-m", "worker.fake", "--prefill", "1", "--decode", "1", "--step-s", "0.01") as first_line:
        addresses = json.loads(await asyncio.to_thread(first_line))
        config = RouterConfig(nodes=tuple(addresses), flow=flow, membership=membership)
        async with running(config) as router:
            await until(lambda: all(x.state is State.READY for x in router.dispatcher.nodes.members), 20.0)
            yield router


def stand_still(seconds: float) -> None:
    """One call that lets no other thread run either, as a long tokenization does; up to twice as long."""
    hard = re.compile(r"(a+)+$")
    began_s, num_letters = time.monotonic(), 18
    hard.match("a" * num_letters + "b")
    once_s = time.monotonic() - began_s
    # Each letter doubles it.
    hard.match("a" * (num_letters + math.ceil(math.log2(seconds / once_s))) + "b")


async def test_a_router_that_stood_still_loses_no_node_and_repeats_no_attempt() -> None:
    flow = FlowConfig(reserve_timeout_s=0.5, gap_timeout_s=0.5, token_timeout_s=0.5)
    membership = MembershipConfig(suspect_s=0.8, lost_s=1.2)
    async with router_beside_processes(flow, membership) as router:
        assert router.grpc is not None
        states: set[State] = set()
        router.dispatcher.nodes.watch(lambda: states.update(x.state for x in router.dispatcher.nodes.members))
        async with baton.AsyncClient(router.grpc) as client:
            calls = [asyncio.create_task(client.complete([7, i], max_tokens=300, seed=i)) for i in range(8)]
            await until(lambda: sum(len(x.flow.tokens) > 2 for x in router.dispatcher.scheduler.in_flight) == 8, 20.0)
            # Some are placed and not yet answered when it stops.
            calls += [asyncio.create_task(client.complete([7, i], max_tokens=20, seed=i)) for i in range(8, 12)]
            await until(lambda: router.dispatcher.scheduler.num_in_flight == 12, 20.0)
            stand_still(2.0)
            done = await asyncio.gather(*calls)
        for i, completion in enumerate(done):
            assert list(completion.token_ids) == expected_tokens([7, i], i, 300 if i < 8 else 20, VOCAB)
            assert completion.relay.attempts == 1, i
        assert State.LOST not in states


async def test_21_an_answer_that_was_done_in_time_is_no_timeout_however_late_it_is_read() -> None:
    """Known failure 21: the nodes are done before the deadline, the router reads it after."""
    in_time = Options(timeout_s=3.0)
    async with router_beside_processes(FlowConfig(), MembershipConfig()) as router:
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            # 40 tokens take 0.4 s, and 5,000 would take 50 s.
            calls = [
                asyncio.create_task(client.complete([7, i], max_tokens=40, seed=i, options=in_time)) for i in range(8)
            ]
            endless = asyncio.create_task(client.complete([8], max_tokens=5000, seed=1, options=in_time))
            await until(lambda: sum(bool(x.flow.tokens) for x in router.dispatcher.scheduler.in_flight) == 9, 20.0)
            stand_still(3.5)
            done = await asyncio.gather(*calls, return_exceptions=True)
            num_false = sum(isinstance(x, DeadlineExceeded) for x in done)
            figure(21, f"false time-outs of {len(calls)} answers that were read too late", num_false, "answers")
            for i, completion in enumerate(done):
                assert not isinstance(completion, BaseException), completion
                assert list(completion.token_ids) == expected_tokens([7, i], i, 40, VOCAB)
                assert completion.relay.attempts == 1
            with pytest.raises(DeadlineExceeded):
                await endless


async def test_a_time_limit_does_not_strike_before_what_came_meanwhile_is_read() -> None:
    code = (
        "import socket, sys, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); "
        "c, _ = s.accept(); time.sleep(0.2); c.sendall(b'x'); sys.stdin.read()"
    )
    with child("-c", code) as first_line:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(await asyncio.to_thread(first_line)))
        async with patient_timeout(0.5):
            reading = asyncio.create_task(reader.readexactly(1))
            await asyncio.sleep(0)
            time.sleep(1.0)  # noqa: ASYNC251 - the loop is to stand still
            # As much as it takes to get there from another thread or process.
            await asyncio.sleep(0.2)
            assert await reading == b"x"
        with pytest.raises(TimeoutError):
            async with patient_timeout(0.05):
                await reader.read(1)
        writer.close()
        await writer.wait_closed()


def test_only_who_is_late_catches_up_and_for_a_bounded_time() -> None:
    assert [catch_up_s(x) for x in (0.0, 0.05, 0.3, 100.0)] == [0.0, 0.0, 0.3, 1.0]


@pytest.mark.parametrize("nodes", [{"prefill": 1, "decode": 1}, {"mixed": 1}], ids=["split", "mixed"])
async def test_a_blip_of_every_node_leaves_no_timer_running_in_who_waits(nodes: dict[str, int]) -> None:
    """Suspect and never lost: no node comes up afterwards, and the sequences that wait must not fail for it later."""
    config = FakeConfig(step_s=0.05, num_blocks=8, block_tokens=16)
    membership = MembershipConfig(suspect_s=0.3, lost_s=60.0)
    flow = FlowConfig(no_node_timeout_s=0.6)
    settings = {"membership": membership, "flow": flow}
    async with (
        FakeCluster(config, **nodes) as cluster,
        running(RouterConfig(nodes=cluster.addresses, **settings)) as router,  # type: ignore[arg-type]
    ):
        await until(lambda: all(x.state is State.READY for x in router.dispatcher.nodes.members))
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            # One at a time fits, and takes a second; the others wait.
            prompts = [[i] * 100 for i in range(3)]
            calls = [asyncio.create_task(client.complete(p, max_tokens=20, seed=1)) for p in prompts]
            await until(lambda: router.dispatcher.scheduler.num_waiting == 2)
            for node in cluster.nodes.values():
                node.mute()
            await until(lambda: all(x.state is State.SUSPECT for x in router.dispatcher.nodes.members))
            for node in cluster.nodes.values():
                node.resume()
            await until(lambda: all(x.state is State.READY for x in router.dispatcher.nodes.members))
            async with asyncio.timeout(60.0):
                done = await asyncio.gather(*calls)
        assert [list(x.token_ids) for x in done] == [expected_tokens(p, 1, 20, VOCAB) for p in prompts]
        await baseline(cluster)
