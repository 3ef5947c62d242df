"""What raises while one sequence is handled ends that sequence: not the watch over nodes, a link, or another one."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

import baton
from baton import errors
from baton.client import Completion
from baton.clock import MonotonicClock
from baton.defects import Defects, LogLimit
from baton.metrics import Metrics
from baton.node_messages import NodeMessage
from baton.registry import NodeRecord
from baton.types import NodeDescription, NodeStatus, SamplingParams
from router.cluster.membership import State
from router.config import LinkConfig, RouterConfig, WatchConfig
from router.dispatch.active import Active
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.records import Ended
from router.flow.messages import Prompt
from router.metrics import RouterMetrics
from router.nodes.registry import RegistryWatch
from router.nodes.sessions import NodeLink, hello
from router.serve import Router
from router.turns import Turns
from tests.support.fake_nodes import FakeCluster, FakeConfig, expected_tokens
from tests.support.router import baseline, quick, router_beside, until

VOCAB = FakeConfig().vocab_size
# No protobuf field holds it: encoding it raises a ValueError.
POISON = 2**40
_numbers = itertools.count()


def submit(router: Router, prompt: Sequence[int], max_tokens: int = 10, seed: int = 1) -> Active:
    """Past the checks at the door, so that what they would refuse gets inside."""
    now = router.dispatcher.clock.now()
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
    request_id = f"r{next(_numbers)}"
    active = router.dispatcher.submit(
        request_id, 0, Prompt(tuple(prompt)), sampling, arrived_s=now, deadline_s=now + 30.0
    )
    router.dispatcher.place()
    return active


async def outcome(active: Active) -> tuple[list[int], errors.BatonError | None]:
    token_ids: list[int] = []
    async with asyncio.timeout(10.0):
        while True:
            batch = await active.stream.next()
            token_ids += batch.token_ids
            if batch.outcome is not None:
                return token_ids, batch.outcome.error


def state(router: Router, node_id: str) -> State:
    return next(x.state for x in router.dispatcher.nodes.members if x.node is not None and x.node.node_id == node_id)


def defects(router: Router) -> dict[str, float]:
    counted = router.dispatcher._metrics.defects.children
    return {where: child.value for (where,), child in counted.items() if child.value}


async def frozen_is_noticed(cluster: FakeCluster, router: Router, node_id: str) -> None:
    cluster[node_id].mute()
    await until(lambda: state(router, node_id) is State.LOST)
    cluster[node_id].resume()
    await until(lambda: state(router, node_id) is State.READY)


async def test_what_cannot_be_encoded_fails_alone_also_when_it_waited_behind_a_full_node(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = FakeConfig(step_s=0.01, num_blocks=16, block_tokens=16)
    async with FakeCluster(config, prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        # Two fill the token pool, so that the third and all behind it wait for them.
        first = [submit(router, [i] * 100, max_tokens=20) for i in (1, 2)]
        poisoned = submit(router, [POISON] * 100)
        behind = submit(router, [3] * 100, max_tokens=20)
        await until(lambda: cluster["decode-0"].used_blocks > 0)
        assert poisoned in list(router.dispatcher.scheduler.waiting)
        tokens, error = await outcome(poisoned)
        assert tokens == []
        assert isinstance(error, errors.InternalError)
        for i, active in zip((1, 2, 3), [*first, behind], strict=True):
            assert await outcome(active) == (expected_tokens([i] * 100, 1, 20, VOCAB), None)
        assert {x.state for x in router.dispatcher.nodes.members} == {State.READY}
        assert defects(router) == {"sequence": 1}
        assert [bool(x.exc_info) for x in caplog.records if "defect" in x.message] == [True], "once, with its traceback"
        await baseline(cluster)
        # The ticker lives, and who was not lost is not dialled again.
        await frozen_is_noticed(cluster, router, "decode-0")


async def test_an_immediate_placement_that_cannot_be_encoded_books_nothing() -> None:
    async with FakeCluster(mixed=1) as cluster, router_beside(cluster, timing=quick) as router:
        for _ in range(5):
            assert isinstance((await outcome(submit(router, [POISON])))[1], errors.InternalError)
        router.dispatcher.scheduler.check()
        assert router.dispatcher.scheduler.num_running_of("") == 0, "its client has all of its share"
        assert (await outcome(submit(router, [1])))[0] == expected_tokens([1], 1, 10, VOCAB)
        assert cluster["mixed-0"].script.seen["cancel"] == 0, "no node ever heard of them"


async def test_a_request_too_long_for_a_nodes_session_is_refused_by_itself() -> None:
    link = LinkConfig(max_sent_bytes=2000)
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick, link=link) as router:
        beside = submit(router, [5], max_tokens=200)
        _, error = await outcome(submit(router, [300] * 1500))
        assert isinstance(error, errors.InvalidRequest)
        assert "expected at most 2000" in error.message
        assert await outcome(beside) == (expected_tokens([5], 1, 200, VOCAB), None)
        assert defects(router) == {}


@pytest.mark.parametrize("times", [1, 1000])
async def test_a_node_that_talks_nonsense_of_one_sequence_keeps_its_session(times: int) -> None:
    """Once, another node makes good for it; always, it is the outcome. Others go on all the while."""
    config = FakeConfig(step_s=0.005)
    async with FakeCluster(config, prefill=1, decode=2) as cluster, router_beside(cluster, timing=quick) as router:
        beside = submit(router, [5], max_tokens=150)
        await until(lambda: len(beside.flow.tokens) > 1)
        assert beside.flow.placement is not None
        other = next(x for x in ("decode-0", "decode-1") if x != beside.flow.placement.decode_id)
        victim = submit(router, [6], max_tokens=50)
        await until(lambda: victim.flow.placement is not None and len(victim.flow.tokens) > 1)
        assert victim.flow.placement is not None
        assert victim.flow.placement.decode_id == other
        cluster[other].garble(times)
        tokens, error = await outcome(victim)
        assert error is None
        assert tokens == expected_tokens([6], 1, 50, VOCAB)
        assert victim.flow.lifeline.attempts == 2
        assert await outcome(beside) == (expected_tokens([5], 1, 150, VOCAB), None)
        assert {x.state for x in router.dispatcher.nodes.members} == {State.READY}
        # Chunks that were on their way when the attempt ended belong to no attempt, and are counted as well.
        assert defects(router).keys() == {"message"}
        await baseline(cluster)


async def test_nonsense_from_every_node_ends_as_an_internal_error() -> None:
    async with FakeCluster(mixed=2) as cluster, router_beside(cluster, timing=quick) as router:
        for node in cluster.nodes.values():
            node.garble(1000)
        _, error = await outcome(submit(router, [6]))
        assert isinstance(error, errors.InternalError)
        assert "99" in error.message
        assert {x.state for x in router.dispatcher.nodes.members} == {State.READY}
        await baseline(cluster)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_an_error_says_the_same_however_many_choices_meet_it(n: int, stream: bool) -> None:
    async with (
        FakeCluster(mixed=2) as cluster,
        router_beside(cluster, timing=quick) as router,
        httpx.AsyncClient(base_url=router.http or "") as client,
    ):
        for node in cluster.nodes.values():
            node.garble(1000)
        answer = await client.post("/v1/completions", json={"prompt": [6], "n": n, "stream": stream})
        assert answer.status_code == 500
        assert "99" in answer.json()["error"]["message"]
        assert "sub-exception" not in answer.text
        await baseline(cluster)


def test_of_several_errors_the_unexpected_one_is_told() -> None:
    deep = ExceptionGroup("inner", [errors.Unavailable("on purpose"), KeyError("why")])
    group = ExceptionGroup("unhandled errors in a TaskGroup", [errors.Overloaded("on purpose, too"), deep])
    assert errors.described(group) == "KeyError: 'why'"
    assert errors.cause_of(ExceptionGroup("x", group.exceptions[:1])) is group.exceptions[0]
    assert errors.described(ValueError("a" * 1000)) == f"ValueError: {'a' * 200}... (1000 characters)"


async def test_who_watches_may_raise() -> None:
    def raises(*_: Any) -> None:
        raise RuntimeError("a watcher's defect")

    told: list[Ended] = []
    async with FakeCluster(prefill=1, decode=1) as cluster, router_beside(cluster, timing=quick) as router:
        router.dispatcher.nodes.watch(raises)
        router.dispatcher.records.watch(raises)
        router.dispatcher.records.watch(told.append)
        assert router.grpc is not None
        async with baton.AsyncClient(router.grpc) as client:
            done = await asyncio.gather(*(client.complete([i], max_tokens=5, seed=1) for i in range(3)))
        assert all(isinstance(x, Completion) for x in done)
        assert len(told) == 3
        await frozen_is_noticed(cluster, router, "prefill-0")
        assert defects(router).keys() == {"watcher", "record"}


async def test_watchers_are_told_of_changed_states_and_not_of_every_status() -> None:
    async with (
        FakeCluster(FakeConfig(status_s=0.01), prefill=1, decode=1) as cluster,
        router_beside(cluster, timing=quick) as router,
    ):
        nodes = router.dispatcher.nodes

        def states() -> list[State]:
            return [x.state for x in nodes.members]

        seen = [states()]
        nodes.watch(lambda: seen.append(states()))
        for _ in range(5):
            heard_s = [x.heard_s for x in nodes.members]
            await until(lambda before=heard_s: all(x.heard_s > s for x, s in zip(nodes.members, before, strict=True)))
        assert all(a != b for a, b in itertools.pairwise(seen))
        cluster["decode-0"].mute()
        await until(lambda: State.SUSPECT in seen[-1])


class BadLink:
    """Cannot be dialled at first."""

    def __init__(self) -> None:
        self.num_dials = 0

    def dial(self) -> None:
        self.num_dials += 1
        if self.num_dials < 3:
            raise RuntimeError("a link's defect")

    def hang_up(self) -> None: ...

    async def close(self) -> None: ...


async def test_an_address_that_could_not_be_dialled_is_dialled_again(caplog: pytest.LogCaptureFixture) -> None:
    links = {"a:1": BadLink(), "b:1": BadLink()}
    config = RouterConfig(nodes=tuple(links))
    metrics = RouterMetrics(Metrics())
    dispatcher = Dispatcher(config, MonotonicClock(), lambda address, _: links[address], metrics)  # type: ignore[arg-type, return-value]
    dispatcher.nodes.start()
    await until(lambda: all(x.num_dials == 3 for x in links.values()))
    await dispatcher.close()
    assert metrics.defects.children[("membership",)].value == 4


class Events:
    """Raises at every message."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.num_welcomes = 0

    def on_welcome(self, address: str, node: NodeDescription, status: NodeStatus) -> None:
        self.num_welcomes += 1

    def on_messages(self, address: str, messages: Sequence[NodeMessage], status: NodeStatus | None) -> None:
        raise ValueError("a reader's defect")

    def on_broken(self, address: str, reason: str, is_orderly: bool = False) -> None:
        self.broken.append(reason)


async def test_whatever_ends_a_link_is_reported_once() -> None:
    async with FakeCluster(mixed=1) as cluster:
        events = Events()
        link = NodeLink(cluster["mixed-0"].address, events, hello("r", 1), LinkConfig(), Turns(0.01))
        for num_lives in (1, 2):
            link.dial()
            await until(lambda n=num_lives: len(events.broken) == n)
            assert "a reader's defect" in events.broken[-1]
        link.dial()
        link.hang_up()
        link.dial()
        await until(lambda: len(events.broken) == 3)
        await asyncio.sleep(0.1)
        assert len(events.broken) == 3, "the one that was hung up says nothing"
        await link.close()


class BrokenRegistry:
    """Answers with something unexpected, then well."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def nodes(self) -> tuple[list[NodeRecord], list[str]]:
        self.num_asked += 1
        if self.num_asked in (2, 3):
            raise KeyError("a record's defect")
        return [], []

    async def changes(self, look_s: float) -> AsyncIterator[bool]:
        raise KeyError("a subscription's defect")
        yield False

    async def close(self) -> None: ...


async def test_the_registry_is_watched_on_after_an_unexpected_answer() -> None:
    told: list[int] = []
    registry = BrokenRegistry()
    metrics = RouterMetrics(Metrics())
    defects = Defects(logging.getLogger("test"), MonotonicClock(), metrics.defects.add)
    watch = RegistryWatch(
        registry,  # type: ignore[arg-type]
        lambda records: told.append(len(records)),
        WatchConfig(poll_s=0.01),
        MonotonicClock(),
        defects,
    )
    await watch.start()
    await until(lambda: len(told) > 3)
    await watch.close()
    assert metrics.defects.children[("registry",)].value >= 4


class Hand:
    """A clock."""

    now_s = 0.0

    def now(self) -> float:
        return self.now_s


def test_lines_of_one_kind_are_limited_and_what_was_left_out_is_told() -> None:
    clock = Hand()
    limit = LogLimit(clock, burst=2, window_s=10.0)
    assert [limit.admits("a") for _ in range(5)] == ["", "", None, None, None]
    assert limit.admits("b") == ""
    clock.now_s = 10.0
    assert limit.admits("a") == " (3 more like it were not logged)"
    assert limit.admits("a") == ""
