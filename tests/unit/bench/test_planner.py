"""The profile compat gives what the public simulator gave: summaries of all runs, and every single request."""

from __future__ import annotations

import pytest

from bench.planner.reference import SUMMARIES, Pair, compare, has_requests, pairs, requests_of

PAIRS = pairs()
WITH_REQUESTS = tuple(pair for pair in PAIRS if has_requests(pair))
# Arithmetic in another order differs in the last digits.
_ROUNDING = 1e-9


def test_the_reference_is_whole() -> None:
    assert (len(PAIRS), len(WITH_REQUESTS)) == (31, 17)
    assert all(set(SUMMARIES) < set(pair.metrics) for pair in PAIRS)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.config}-{pair.trace}")
def test_all_metrics_of_a_run_are_the_public_simulators(pair: Pair) -> None:
    comparison = compare(pair)
    wrong = {metric: comparison.error(metric) for metric in pair.metrics if comparison.error(metric) > _ROUNDING}
    assert wrong == {}


@pytest.mark.parametrize("pair", WITH_REQUESTS, ids=lambda pair: f"{pair.config}-{pair.trace}")
def test_every_request_ran_where_and_when_it_did_there(pair: Pair) -> None:
    requests = requests_of(compare(pair))
    assert requests is not None
    assert requests.num_elsewhere == 0
    assert max(requests.ttft_s, requests.e2e_s, requests.second_token_gap_s) < 1e-6
