"""Engines that share a host: steps beside others take longer from when they begin, and less from when they end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.step import StepShape
from planner.fitted import Sharing, Wake
from planner.overhead import Overhead
from planner.sim.host import Host
from planner.sim.run import _Simulation
from planner.times import LinearTimes
from planner.workload import Request, Workload
from tests.support.simulated import CONFIG, LINE, MODEL, design, run, traffic

SHARING = Sharing(prompt=(2.0, 3.0), decode=(1.5,))
SHARED = replace(CONFIG, sharing=SHARING)
MESSAGES_S = 4 * CONFIG.message_s


class _Engine:
    num_disturbed = 0

    def disturbed(self) -> None:
        self.num_disturbed += 1


def test_an_engine_counts_others_and_is_told_of_them() -> None:
    host, one, two = Host(SHARING), _Engine(), _Engine()
    shape = StepShape(num_decoding=1)
    assert host.factor(one, shape) == 1
    for is_busy in (True, True, False, False, True):
        host.changed(two, is_busy=is_busy)
    assert (host.factor(one, shape), host.factor(two, shape)) == (1.5, 1)
    assert (one.num_disturbed, two.num_disturbed) == (0, 0)
    host.changed(one, is_busy=True)
    host.changed(one, is_busy=True)
    assert (one.num_disturbed, two.num_disturbed) == (0, 1)


def test_beside_more_nodes_than_were_measured_threads_share_processors() -> None:
    # A node needs one and a half of two processors: with a loop all takes 1.25 times as long, with two nodes twice.
    host = Host(Sharing(decode=(1.5,)), Overhead(num_cores=2, node_cores=1.5))
    one, two, three = _Engine(), _Engine(), _Engine()
    decode, prompt = StepShape(num_decoding=1), StepShape().with_prompt(0, 10)
    for engine in (one, two):
        host.changed(engine, is_busy=True)
    assert host.factor(one, decode) == 1.5
    # Prompts beside others were not measured at all.
    assert host.factor(one, prompt) == pytest.approx(2 / 1.25)
    host.changed(three, is_busy=True)
    assert host.factor(one, decode) == pytest.approx(1.5 * 2.75 / 2)
    assert host.factor(one, prompt) == pytest.approx(2.75 / 1.25)
    assert (one.num_disturbed, two.num_disturbed, three.num_disturbed) == (2, 1, 0)
    # Enough processors for all.
    wide = Host(Sharing(), Overhead(num_cores=8, node_cores=1.5))
    for engine in (one, two, three):
        wide.changed(engine, is_busy=True)
    assert wide.factor(one, decode) == 1


def test_one_engine_at_a_time_takes_what_it_takes_alone() -> None:
    requests = [Request(0, 0.0, 1000, 5), Request(1, 10.0, 1000, 5)]
    assert [each.ended_s for each in run(requests, design(), SHARED).served] == pytest.approx(
        [each.ended_s for each in run(requests, design(), CONFIG).served]
    )


def test_prompts_that_meet_take_longer_while_they_do() -> None:
    # 210 and 110 ms alone, from the same moment on: twice as long until the shorter one is over.
    requests = [Request(0, 0.0, 2000, 1), Request(1, 0.0, 1000, 1)]
    long, short = run(requests, design(2, 1), SHARED).served
    long_s, short_s = LINE.step_s(2000, 0, 0), LINE.step_s(1000, 0, 0)
    assert short.first_token_s == pytest.approx(2 * short_s + MESSAGES_S)
    assert long.first_token_s == pytest.approx(2 * short_s + (long_s - short_s) + MESSAGES_S)


def test_decodes_beside_a_prompt_take_longer_from_when_it_begins() -> None:
    requests = [Request(0, 0.0, 100, 200), Request(1, 1.0, 2000, 1)]
    (alone, _), (beside, _) = run(requests, design(2, 1), CONFIG).served, run(requests, design(2, 1), SHARED).served
    assert alone.ended_s is not None
    assert beside.ended_s is not None
    # While the other one computes its 2 * 210 ms they are a third of a step behind for each.
    assert beside.ended_s - alone.ended_s == pytest.approx(2 * LINE.step_s(2000, 0, 0) / 3, rel=0.1)


def test_under_load_nothing_is_lost_and_equal_runs_are_equal() -> None:
    requests = traffic(8.0, 10.0)
    first, second = (run(requests, design(2, 2), SHARED) for _ in range(2))
    assert all(each.is_whole for each in first.served)
    assert [each.ended_s for each in first.served] == [each.ended_s for each in second.served]
    assert first.ended_s > run(requests, design(2, 2), CONFIG).ended_s


def test_a_request_takes_its_fixed_time_before_all_else() -> None:
    requests = [Request(0, 1.0, 1000, 5), Request(1, 1.5, 1000, 5)]
    plain = run(requests, design(), CONFIG).served
    later = run(requests, design(), replace(CONFIG, request_s=0.25)).served
    for one, other in zip(plain, later, strict=True):
        assert one.first_token_s is not None
        assert other.first_token_s == pytest.approx(one.first_token_s + 0.25)


def test_nodes_that_have_served_before_tell_their_step_times() -> None:
    seen = tuple(
        (shape, LINE.step_s(shape.num_prompt_tokens, shape.num_decoding, shape.num_kv_tokens))
        for shape in (
            *(StepShape(num_prompt_tokens=n) for n in (100, 1000)),
            *(StepShape(num_decoding=n, num_kv_tokens=n * kv) for n in (1, 9) for kv in (100, 900)),
        )
    )
    for steps, known in (((), None), (seen, LINE)):
        config = replace(CONFIG, seen_steps=steps)
        simulation = _Simulation(Workload("w", ()), design(), MODEL, {"m": LinearTimes(LINE)}, config, {})
        told = simulation._nodes["decode-0"].status().step_times
        assert (told is None) is (known is None)
        if told is not None:
            assert told.step_s(300, 4, 2000) == pytest.approx(LINE.step_s(300, 4, 2000), rel=0.02)


def test_the_first_step_of_a_machine_that_had_nothing_to_do_takes_more() -> None:
    # Two at once, whose prompts come in a row, and a third one when all has been over for long.
    requests = [Request(0, 0.0, 1000, 40), Request(1, 0.0, 1000, 40), Request(2, 9.0, 1000, 40)]
    woken = replace(CONFIG, wake=Wake(prompt_s=0.03, decode_s=0.05))
    for plain, later in zip(run(requests, design()).served, run(requests, design(), woken).served, strict=True):
        assert plain.first_token_s is not None
        assert later.first_token_s == pytest.approx(plain.first_token_s + 0.03)
    (alone,), (slow,) = run(requests[2:], design()).served, run(requests[2:], design(), woken).served
    assert alone.ended_s is not None
    assert slow.ended_s == pytest.approx(alone.ended_s + 0.03 + 0.05)
