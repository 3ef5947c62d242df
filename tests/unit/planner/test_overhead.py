"""What processes take beside steps: what is made of the records of a cluster, and what a simulated one makes of it."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest

from baton.observe import Relay
from baton.types import TransferReport
from engine.step import StepShape
from planner.fitted import Line, RequestTimes, Sharing
from planner.overhead import (
    FREE_LOOP,
    NO_OVERHEAD,
    Busy,
    LoopTimes,
    Overhead,
    Spent,
    busy_of,
    busy_share,
    cores_of_step,
    expected,
    grown,
    loop_times,
    overhead,
    waits,
)
from planner.results import Run
from planner.sim.events import Events
from planner.sim.host import Host, Loop
from planner.steps import RecordedStep
from planner.workload import Request
from tests.support.simulated import CONFIG, design, run, traffic

ALONE = RequestTimes(0.01, 0.001, 0.002)


def relay(reserve_s: float, second_token_s: float = 0.0, network_s: float = 0.0) -> Relay:
    moved = TransferReport("shm", False, 1000, 1, 0.1, 0.004) if reserve_s else None
    return Relay(
        "p", "d", 0.0, 0.0, 0.1, 0.2, 1.0, 0.0, 0.0, 1, transfer=moved, reserve_s=reserve_s, network_s=network_s,
        second_token_s=second_token_s,
    )  # fmt: skip


def steps(share: float, node: str = "d", num_decoding: int = 4) -> list[RecordedStep]:
    """In each of ten seconds a step that takes this share of it."""
    shape = StepShape(num_decoding=num_decoding, num_kv_tokens=100 * num_decoding)
    return [RecordedStep(node, "h", shape, second + 1.0, share) for second in range(10)]


def test_a_loop_takes_so_much_for_a_request_a_step_and_a_token() -> None:
    loads = [(30, 90, 120, 9.0), (1, 63, 64, 0.5), (4, 66, 256, 0.6), (16, 80, 1024, 1.0), (32, 150, 2048, 2.5)]
    took_s = [0.002 * n + 3e-4 * k + 1e-4 * t + 0.01 * s for n, k, t, s in loads]
    spent = [Spent(*load, seconds, 2 * seconds, 0.0, 0.0) for load, seconds in zip(loads, took_s, strict=True)]
    found = overhead(spent, Busy((), (), 0.0), ALONE, None)
    for name, seconds in (("request_s", 0.002), ("step_s", 3e-4), ("token_s", 1e-4)):
        assert getattr(found.router, name) == pytest.approx(seconds, rel=0.02)
        assert getattr(found.client, name) == pytest.approx(2 * seconds, rel=0.02)
    assert found.slowest == found.client
    assert loop_times([], []) == FREE_LOOP
    assert not NO_OVERHEAD.slowest


def test_processors_count_where_all_processes_are_of_one_host() -> None:
    # Half as much again as they compute, 8 ms for each request and 10 ms a second for nothing.
    loads = [(30, 90, 120, 9.0, 0.5), (1, 63, 64, 0.5, 0.4), (4, 66, 256, 0.6, 0.5), (16, 80, 1024, 1.0, 1.7)]
    spent = [
        Spent(n, k, t, elapsed_s, 0.1, 0.1, 1.5 * steps_s + 0.008 * n + 0.01 * elapsed_s, steps_s)
        for n, k, t, elapsed_s, steps_s in loads
    ]
    quiet = Busy((), (), 0.0)
    assert overhead(spent, quiet, ALONE, 2).node_cores == pytest.approx(1.5, rel=0.01)
    # Of loads that are all alike all of it counts as their steps'.
    assert cores_of_step([Spent(10, 64, 640, 2.0, 0.1, 0.1, 0.0, 2.0)]) == 0
    # A node cannot use more than there are.
    assert overhead([spent[0]._replace(nodes_s=30.0)], quiet, ALONE, 2).node_cores == 2
    assert overhead(spent, quiet, ALONE, None).num_cores == 0
    assert overhead([], quiet, ALONE, 2) == NO_OVERHEAD
    two = Overhead(num_cores=2, node_cores=1)
    assert [two.crowding(count) for count in range(4)] == [1, 1, 1.5, 2]
    assert [NO_OVERHEAD.crowding(count) for count in (0, 9)] == [1, 1]


def test_processor_time_is_told_apart_by_process() -> None:
    before, after = {"": 1.0, "a:1": 2.0}, {"": 1.5, "a:1": 4.0, "b:1": 1.0}
    assert grown(before, after, is_router=True) == 0.5
    assert grown(before, after, is_router=False) == 3.0


def test_what_waits_for_a_node_is_of_those_that_met_it_computing() -> None:
    # A node that always computes: the median. Alone, two messages take 2 ms.
    always = Busy((relay(0.012),) * 5 + (relay(0.1),), tuple(steps(1.0)), 0.0)
    assert waits(always, ALONE)[0] == pytest.approx(0.005)
    # For a fifth of the time: of ten, the two that took longest.
    seldom = Busy((relay(0.002),) * 8 + (relay(0.012), relay(0.014)), tuple(steps(0.2)), 0.0)
    assert busy_share(seldom.steps) == pytest.approx(0.2, rel=0.2)
    assert waits(seldom, ALONE)[0] == pytest.approx(0.005)
    found = Overhead(busy_message_s=0.006)
    assert [said_s for said_s, _ in expected(found, ALONE, seldom)] == pytest.approx([0.001] * 8 + [0.007] * 2)
    # One node does all: its run, and the first token.
    whole = Busy((relay(0.0, network_s=0.008),) * 4, tuple(steps(1.0)), 0.0)
    assert waits(whole, ALONE) == (pytest.approx(0.003), 0.0)
    for told in (always._replace(steps=tuple(steps(0.05))), always._replace(relays=always.relays[:3])):
        assert not told.is_telling
        assert waits(told, ALONE) == (0.0, 0.0)


def test_a_hand_over_waits_beside_its_transfer_and_its_steps() -> None:
    line = Line(0.01, 1e-4, 0.0, 1e-3, 1e-6)
    step_s = line.step_s(StepShape(num_decoding=4, num_kv_tokens=400))
    relays = (relay(0.002, second_token_s=0.004 + 1.5 * step_s + ALONE.join_s + 0.007),) * 4
    # A prompt step beside it is no step of a second token.
    prompts = [RecordedStep("p", "h", StepShape().with_prompt(0, 500), 5.0, 0.5)]
    busy = busy_of(relays, [*steps(1.0), *prompts], line)
    assert waits(busy, ALONE) == (0.0, pytest.approx(0.007))


def test_a_loop_takes_up_what_comes_in_order() -> None:
    events = Events()
    loop = Loop(events, LoopTimes(request_s=0.1, token_s=0.01), None)
    assert [loop.begins_s(num_requests=1) for _ in range(3)] == pytest.approx([0, 0.1, 0.2])
    events.now_s = 0.25
    assert loop.begins_s(num_tokens=5) == pytest.approx(0.3)
    events.now_s = 9.0
    assert loop.begins_s() == 9.0
    # 120 tokens a second are more than it can pass on.
    load = loop.load(12, 0.1)
    loop.streams(load)
    events.now_s = 10.0
    assert loop.begins_s() == pytest.approx(10.2)
    loop.streams(-load)
    events.now_s = 10.1
    assert loop.begins_s() == pytest.approx(10.2)
    events.now_s = 11.0
    assert loop.begins_s() == 11.0


def test_a_loop_beside_nodes_that_compute_is_slower_and_keeps_the_order() -> None:
    events, host = Events(), Host(Sharing(), Overhead(num_cores=2, node_cores=1))
    loop = Loop(events, LoopTimes(request_s=0.1), host)
    nodes = [_Engine() for _ in range(3)]
    for node in nodes:
        host.changed(node, is_busy=True)
    assert host.crowding == 2
    assert [loop.begins_s(num_requests=1) for _ in range(2)] == pytest.approx([0, 0.2])
    for node in nodes:
        host.changed(node, is_busy=False)
    events.now_s = 0.01
    assert loop.begins_s() == pytest.approx(0.2)
    # Each is told of those that come and go while it computes.
    assert [node.num_disturbed for node in nodes] == [2, 2, 2]


class _Engine:
    num_disturbed = 0

    def disturbed(self) -> None:
        self.num_disturbed += 1


def test_a_message_waits_for_a_node_that_computes() -> None:
    """The second one is reserved for beside a decode."""
    requests = [Request(0, 0.0, 200, 300), Request(1, 1.0, 1000, 5)]
    plain = run(requests, design()).served
    config = replace(CONFIG, overhead=Overhead(busy_message_s=0.004, busy_join_s=0.03))
    later = run(requests, design(), config).served
    # Its reservation and the lease; its prompt goes to a node that has nothing to do.
    for one, other, seconds in ((plain[0], later[0], 0.0), (plain[1], later[1], 0.008)):
        assert one.first_token_s is not None
        assert other.first_token_s == pytest.approx(one.first_token_s + seconds)
    assert plain[1].second_token_s is not None
    assert later[1].second_token_s is not None
    # Then it waits for the step that runs.
    assert later[1].second_token_s - plain[1].second_token_s == pytest.approx(0.038, abs=0.013)
    alone = Request(0, 0.0, 1000, 5)
    assert run([alone], design(), config).served == run([alone], design()).served


def test_tokens_wait_for_a_router_that_cannot_pass_them_on() -> None:
    requests = [Request(number, 0.0, 20, 100) for number in range(8)]
    plain = run(requests, design())
    # Eight tokens a step of about 18 ms: 0.1 ms each is little, 4 ms are more than there is time for.
    for token_s, least, most in ((1e-4, 0.99, 1.05), (4e-3, 1.5, 2.5)):
        slow = run(requests, design(), replace(CONFIG, overhead=Overhead(router=LoopTimes(0.0, token_s, token_s))))
        assert all(each.is_whole for each in slow.served)
        assert least <= slow.ended_s / plain.ended_s <= most


def test_under_load_a_run_with_overheads_ends_and_is_repeated() -> None:
    given = Overhead(0.004, 0.01, LoopTimes(0.002, 1e-4, 1e-4), LoopTimes(0.001), 2, 1)
    config = replace(CONFIG, overhead=given, sharing=Sharing((1.2,), (1.3,)))
    first, second = (run(traffic(10, 8), design(2, 2), config) for _ in range(2))
    assert repr(first) == repr(second)
    assert all(each.is_whole for each in first.served)
    plain = run(traffic(10, 8), design(2, 2), replace(config, overhead=NO_OVERHEAD))
    assert _mean_ttft_s(first) > _mean_ttft_s(plain) + 2 * given.busy_message_s


def _mean_ttft_s(found: Run) -> float:
    return fmean((each.first_token_s or 0.0) - each.request.arrival_s for each in found.served)
