"""Advice on clusters whose truth is a simulated run: the model fits, and what pays is what would."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from baton.errors import Unavailable
from planner.advise import report
from planner.advise.advice import Advice, AdviceConfig, Option, advised
from planner.advise.cluster import pool_uses
from planner.advise.samples import Samples
from planner.advise.setup import Setup
from planner.machines import catalogue
from planner.search.slos import slo
from planner.workload import Workload, drawn
from tests.support.watched import watched_as

QUICK = AdviceConfig(num_requests=250)


def work(rate: float, prompt: int, output: int, seconds: float = 60.0) -> Workload:
    """Lengths of which the longest is three times the shortest."""

    def around(mean: int) -> object:
        return lambda rng: rng.randint(mean // 2, mean * 3 // 2)

    prompts, outputs = around(prompt), around(output)
    return drawn("truth", prompts, outputs, rate=rate, seconds=seconds, seed=5)  # type: ignore[arg-type]


# Three quarters of a node's time for prompts, a tenth of another's for tokens.
PROMPTS = work(rate=10.0, prompt=1500, output=20)


def advice(today: Setup, load: Workload, *slos: str) -> Advice:
    return advised(watched_as(today, load), tuple(map(slo, slos)), config=QUICK)


def option(found: Advice, about: str) -> Option:
    return next(each for each in found.options if each.about == about)


def test_the_model_of_a_cluster_that_is_as_simulated_fits_it() -> None:
    found = advice(Setup(prefill=2, decode=2, disaggregation="always"), work(8.0, 800, 60))
    assert found.does_fit, found.fits
    assert {fit.name for fit in found.fits} >= {"TTFT_s p50", "TBT_s mean", "E2E_s p99", "tokens/s"}
    assert max(abs(fit.error) for fit in found.fits if not fit.name.endswith("p99")) < 0.15
    assert found.verdict == "the model fits today's cluster"
    assert found.load.rate == pytest.approx(8, rel=0.2)


def test_a_pool_that_is_too_small_gets_a_node_of_the_other_one() -> None:
    found = advice(Setup(prefill=2, decode=3, disaggregation="always"), PROMPTS)
    moved = option(found, "a node from decode to prefill")
    assert moved.pays, moved.reason
    assert moved.predicted.metrics["TTFT_s"].p99 < 0.8 * (found.today.metrics["TTFT_s"].p99 or 0)
    assert moved in found.best
    assert not option(found, "a node from prefill to decode").pays


def test_a_cluster_that_has_too_many_nodes_can_do_with_fewer() -> None:
    found = advice(Setup(mixed=6), work(1.0, 200, 10, 200.0), "TTFT_s:p99:1", "TBT_s:p99:0.1")
    less = option(found, "a node less in mixed")
    assert (less.pays, less.reason) == (True, "meets the objectives with fewer nodes")
    assert found.best[0] is less
    assert not option(found, "another node in mixed").pays


def test_no_change_pays_where_all_do_the_same() -> None:
    """One mixed node for requests that hardly meet."""
    found = advice(Setup(mixed=1), work(0.5, 200, 10, 400.0))
    assert found.best == ()
    assert {each.reason.split(":")[0] for each in found.options} <= {
        "nothing differs by as much as runs do", "costs a node", "worse", "better",
    }  # fmt: skip


def test_objectives_that_today_misses_may_cost_a_node() -> None:
    found = advice(Setup(prefill=1, decode=1, disaggregation="always"), PROMPTS.at_rate(6.0), "TTFT_s:p99:0.6")
    assert found.missed
    more = option(found, "another node in prefill")
    assert more.pays, more.reason
    assert more.reason.startswith("misses no objective; today misses TTFT_s:p99:0.6")


def test_what_was_seen_decides_what_is_simulated() -> None:
    today = Setup(prefill=1, decode=2, disaggregation="never", tbt_target_s=0.05, max_batch_tokens=512, max_num_seqs=64)
    found = advice(today, work(3.0, 300, 30, 80.0))
    assert found.setup == today
    assert found.warnings == ()


def test_a_model_that_does_not_fit_says_so() -> None:
    watched = watched_as(Setup(prefill=1, decode=1, disaggregation="always"), work(3.0, 300, 30, 80.0))
    # Its nodes record half of what steps take.
    steps = tuple(step._replace(turn_s=step.turn_s / 2) for step in watched.observed.steps)
    found = advised(replace(watched, observed=replace(watched.observed, steps=steps)), config=QUICK)
    assert not found.does_fit
    assert "does NOT fit" in found.verdict
    assert "TBT_s mean -5" in found.verdict


def test_too_few_requests_or_steps_are_no_basis() -> None:
    watched = watched_as(Setup(mixed=1), work(1.0, 100, 5, 50.0))
    with pytest.raises(
        Unavailable, match=r"4\d requests came and 4\d ended in .* s, expected at least 100: .* --seconds"
    ):
        advised(watched)
    (router,) = watched.routers
    full = Samples("router", {**router.before.values, ("baton_sequences", ()): 60.0})
    stopped = replace(watched, routers=(replace(router, before=full),))
    with pytest.raises(Unavailable, match=r"^0 requests came and 4\d ended"):
        advised(stopped, config=replace(QUICK, min_requests=10))
    idle = replace(watched, observed=replace(watched.observed, steps=()))
    with pytest.raises(Unavailable, match="recorded 0 steps, of too few shapes"):
        advised(idle, config=replace(QUICK, min_requests=10))


def test_the_report_has_all_of_it_and_the_same_bytes_each_time() -> None:
    watched = watched_as(Setup(prefill=1, decode=2, disaggregation="always"), PROMPTS.at_rate(4.0))
    price = catalogue()["h100-80gb"]
    told = []
    for _ in range(2):
        found = advised(watched, price=price, config=replace(QUICK, num_requests=150))
        commands = [("baton role x prefill",) for _ in found.best]
        told.append(json.dumps(report.as_json(found, tuple(pool_uses(watched)), commands)))
    assert told[0] == told[1]
    whole = json.loads(told[0])
    assert whole["model_fits"] is True
    assert whole["best"]
    assert {o["change"]: o["commands"] for o in whole["options"]}[whole["best"][0]] == ["baton role x prefill"]
    assert [pool["pool"] for pool in whole["pools"]] == ["prefill", "decode"]
    assert 0.5 < whole["pools"][0]["busy_share"] < 0.7
    assert whole["pools"][0]["kv_share"] == 0.25
    assert whole["today"]["dollars_per_hour"] == pytest.approx(3 * 8 * 4.76)
    assert 3 * 8 * price.idle_power_w < whole["today"]["watts"] < 3 * 8 * price.power_w
    assert len(report.rows(found)) == 1 + len(found.options)
    assert {len(row) for row in report.rows(found)} == {len(report.COLUMNS)}
    drawn = report.picture(found)
    ElementTree.fromstring(drawn)
    assert all(option.about in drawn for option in found.best)
    assert {"today, measured", "today, simulated", "pays", "does not pay"} <= set(
        re.findall(r">([^<>]+)</text>", drawn)
    )


def test_seeds_draw_other_requests_of_the_same_kind() -> None:
    load = advice(Setup(mixed=1), work(2.0, 200, 10, 100.0)).load
    first, again, other = (load.workload(300, seed) for seed in (1, 1, 2))
    assert first == again != other
