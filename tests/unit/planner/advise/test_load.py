"""A load that was seen, as a workload."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import fmean

import pytest

from baton.metrics import Metrics
from planner.advise.load import lengths, load_of
from planner.advise.samples import Distribution
from router.metrics import RouterMetrics
from tests.support.watched import window

BOUNDS = tuple(float(bound) for power in range(1, 18) for bound in (2**power * 3 // 4, 2**power))


def test_lengths_are_drawn_as_they_were_seen() -> None:
    rng = Random(1)
    values = [min(100_000, max(1, round(rng.lognormvariate(6.5, 1.0)))) for _ in range(3000)]
    draw, again = lengths(Distribution.of([(v, 1) for v in values], BOUNDS)), Random(2)
    drawn = [draw(again) for _ in range(6000)]
    assert fmean(drawn) == pytest.approx(fmean(values), rel=0.05)
    for share in (0.1, 0.5, 0.9):
        seen, made = (sorted(of)[int(share * len(of))] for of in (values, drawn))
        assert made == pytest.approx(seen, rel=0.2)
    assert min(drawn) >= 1


def test_one_length_alone_is_drawn_with_its_mean() -> None:
    draw, rng = lengths(Distribution.of([(700.0, 50)], BOUNDS)), Random(1)
    drawn = [draw(rng) for _ in range(500)]
    assert fmean(drawn) == pytest.approx(700, rel=0.02)
    assert lengths(Distribution.of([(1.0, 5)], BOUNDS))(rng) == 1


def test_what_came_is_what_ended_and_what_is_there_more() -> None:
    """Of two routers: 6 and 2 ended, of which 2 failed; 4 more are in flight; 3 were refused."""

    def router(ended: int, failed: int, in_flight: int, refused: int) -> tuple[Metrics, Metrics]:
        made = []
        for share in (0, 1):
            metrics = Metrics()
            counted = RouterMetrics(metrics)
            counted.outcomes.add("finished", "", amount=share * (ended - failed))
            counted.outcomes.add("failed", "InternalError", amount=share * failed)
            counted.refusals.add("Overloaded", amount=share * refused)
            counted.prompt_tokens.add(share * 100 * ended)
            counted.cached_tokens.add(share * 25 * ended)
            metrics.gauges("baton_sequences", "h", ("phase",), lambda n=share * in_flight: {("decoding",): float(n)})
            made.append(metrics)
        return made[0], made[1]

    load = load_of([window(*router(6, 1, 3, 3)), window(*router(2, 1, 1, 0))], 4.0)
    assert (load.rate, load.num_failed, load.num_refused, load.cached_share) == (3.0, 2, 3, 0.25)


def test_hits_of_prefix_caches_are_a_common_beginning() -> None:
    seen = Distribution.of([(1000.0, 100)], BOUNDS)
    metrics = Metrics()
    RouterMetrics(metrics)
    load = load_of([window(metrics, metrics)], 10.0)
    assert load.cached_share == 0
    plain = replace(load, rate=10.0, prompts=seen, outputs=seen)
    assert {request.prefix for request in plain.workload(50, 0).requests} == {""}
    shared = replace(plain, cached_share=0.4).workload(50, 0).requests
    assert {request.prefix for request in shared} == {"all"}
    assert all(request.num_prefix_tokens == int(0.4 * request.num_prompt_tokens) for request in shared)
    assert 35 < len(shared) < 65
