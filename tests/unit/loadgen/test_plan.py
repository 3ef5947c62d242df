"""Loads of what was asked."""

import statistics
from itertools import pairwise

import pytest

from baton.errors import BadConfig
from loadgen.load import poisson, prompts, same_size
from loadgen.plan import Plan
from loadgen.traces import Scale


def test_each_rate_and_each_number_of_streams_is_a_load():
    first, second, closed = Plan(rates=(0.5, 2.0), streams=(8,), seconds=30.0, num_requests=5).loads()
    assert (first.name, len(first.requests), first.rate) == ("512+64 0.5/s", 15, 0.5)
    assert (second.name, len(second.requests), second.streams) == ("512+64 2/s", 60, 0)
    assert (closed.name, len(closed.requests), closed.streams) == ("512+64 8 streams", 5, 8)


def test_a_trace_gives_sizes_and_arrivals_or_sizes_alone():
    scale = Scale(prompt=0.5, max_output_tokens=9)
    replayed, streams = Plan(trace="code", scale=scale, rates=(1.0,), streams=(2,), num_requests=50).loads()
    random, _ = Plan(trace="code", scale=scale, rates=(1.0,), streams=(2,), num_requests=50, is_poisson=True).loads()
    sizes = [(r.prompt_tokens, r.output_tokens) for r in replayed.requests]
    assert sizes[:2] == [(2404, 9), (1590, 8)]
    assert sizes == [(r.prompt_tokens, r.output_tokens) for r in random.requests]
    assert sizes == [(r.prompt_tokens, r.output_tokens) for r in streams.requests]
    assert replayed.last_due_s == pytest.approx(49.0)
    assert [r.due_s for r in replayed.requests] != [r.due_s for r in random.requests]
    assert random.name == "code 1/s poisson"


def test_rounds_have_other_poisson_arrivals_and_the_same_trace():
    plan, trace = Plan(rates=(1.0,)), Plan(trace="conv", rates=(1.0,))
    assert plan.loads(0) == plan.loads(0) != plan.loads(1)
    assert trace.loads(0) == trace.loads(1)


def test_poisson_arrivals_have_the_rate_and_its_spread():
    load = poisson("x", same_size(5000, 1, 1), 4.0, 1.0, "seed")
    gaps = [b.due_s - a.due_s for a, b in pairwise(load.requests)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.05)


def test_prompts_are_those_of_their_seed_and_share_no_beginning():
    first, second = prompts("x", [16, 8])
    assert [first, second] == prompts("x", [16, 8])
    assert (len(first), len(second)) == (16, 8)
    assert first[:4] != second[:4]
    assert prompts("y", [16])[0] != first


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "nothing to send"),
        ({"rates": (0.0,)}, "--rate is 0.0"),
        ({"rates": (float("nan"),)}, "--rate is nan"),
        ({"streams": (-1,)}, "--streams is -1"),
        ({"streams": (1,), "seconds": 5.0}, "needs --rate"),
        ({"rates": (1e6,), "seconds": 1e6}, "expected 1 to 1000000"),
        ({"streams": (1,), "num_requests": 0}, "would have 0 requests"),
    ],
)
def test_what_cannot_be_sent_is_refused(asked, said):
    with pytest.raises(BadConfig, match=said):
        Plan(**asked)
