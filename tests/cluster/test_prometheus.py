"""A real Prometheus scrapes a real cluster under load: every panel and rule finds data, and an alert really fires."""

import asyncio
import itertools
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, StartCluster
from tests.support.load import Job, run_all
from tests.support.prometheus_files import IS_INSTALLED, Query, alerts, filled_in, panel_queries, rule_queries
from tests.support.prometheus_server import Prometheus, describe, numbers, running_prometheus
from tests.support.root import ROOT

pytestmark = [pytest.mark.skipif(not IS_INSTALLED, reason="prometheus is not installed")]
MODEL = ROOT / "demo" / "model"
DATA_TIMEOUT_S = 60.0
# Nothing here tells its power: there is no GPU, and RAPL belongs to root where it exists.
NEEDS_ENERGY = re.compile("joules|power_watts")
# Has data when something is wrong, by nature. What it asks about has to be there all the same.
MISSED = ("baton:nodes_missed:count", "baton:nodes_able_missed:count")
QUIET = re.compile("^({})$|: annotation ".format("|".join((*MISSED, *(alert["alert"] for alert in alerts())))))


class Traffic:
    """Prompts of all lengths, known and new ones, until the test has seen enough."""

    def __init__(self, cluster: Cluster) -> None:
        self._url = cluster.http
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._main)
        self.num_failed = 0

    def _main(self) -> None:
        for number in itertools.count(1):
            if self._is_over.is_set():
                return
            # Every other prompt is new. The rest is found in the prefix caches, and little of it is moved.
            jobs = [Job([1 + number % 2000 * (i % 2)] + [1 + i] * (10 + 150 * (i // 2 % 4)), 24) for i in range(12)]
            answers = asyncio.run(run_all(self._url, jobs, concurrency=6))
            self.num_failed += sum(not answer.is_complete for answer in answers)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def missing(prometheus: Prometheus, queries: list[Query]) -> list[Query]:
    return [query for query in queries if not numbers(prometheus.query(filled_in(query)))]


def test_every_panel_and_rule_finds_data_and_an_alert_fires_when_a_node_stops(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    # Objectives that are met even here.
    objectives = ("--slo-ttft-ms", "60000", "--slo-tbt-ms", "60000")
    arguments = ("--peak-tflops", "0.05", "--peak-gbps", "10", *objectives)
    cluster = start_cluster(MODEL, prefill=1, decode=1, arguments=arguments)
    written = [*panel_queries(), *rule_queries()]
    asked_about = {name for q in written if QUIET.search(q.where) for name in q.metrics} - set(MISSED)
    queries = [q for q in written if not QUIET.search(q.where)] + [Query(name, name) for name in sorted(asked_about)]
    without_energy = [q for q in queries if not NEEDS_ENERGY.search(q.expr)]
    with running_prometheus(tmp_path / "prometheus", cluster.http) as prometheus:
        with Traffic(cluster) as traffic:
            gives_up_at = time.monotonic() + DATA_TIMEOUT_S
            left = without_energy
            while (left := missing(prometheus, left)) and time.monotonic() < gives_up_at:
                time.sleep(0.5)
            found = {q.where: describe(prometheus.query(filled_in(q))) for q in left}
            assert not found, f"these found nothing: {found}"
        assert traffic.num_failed == 0
        assert len(without_energy) < len(queries), "the list of what needs energy is stale"
        # What a busy machine cannot bring about by being slow.
        assert not prometheus.firing() & {"BatonLedgerMismatch", "BatonDigestFailures", "BatonErrorBudgetBurnsFast"}
        _check_sums(prometheus)
        _stop_a_node(cluster, prometheus)


def _check_sums(prometheus: Prometheus) -> None:
    """Figures that have to agree, over the whole run."""
    # In one query: between two the router may have been scraped.
    stages_by_ttft = "sum(baton_ttft_stage_seconds_sum) / sum(baton_time_to_first_token_seconds_sum)"
    assert numbers(prometheus.query(stages_by_ttft)) == [pytest.approx(1)]
    (total,) = numbers(prometheus.query('sum(baton_kv_blocks{node="decode-0"})'))
    (free,) = numbers(prometheus.query('sum(baton_kv_blocks{node="decode-0", state=~"free|cached"})'))
    assert 0 < free <= total
    busy = numbers(prometheus.query("baton:engine_busy:ratio"))
    assert all(0 <= share <= 1.2 for share in busy)


def _stop_a_node(cluster: Cluster, prometheus: Prometheus) -> None:
    """SIGSTOP: the process is there and says nothing, as a hung machine."""
    node = cluster.nodes["decode-0"]
    os.kill(node.pid, signal.SIGSTOP)
    try:
        cluster.wait_until(lambda: "BatonNodeDown" in prometheus.firing(), "BatonNodeDown", 40.0)
        cluster.wait_until(lambda: "BatonPoolStarved" in prometheus.firing(), "BatonPoolStarved", 40.0)
    finally:
        os.kill(node.pid, signal.SIGCONT)
    assert numbers(prometheus.query('baton_node_losses_total{pool="decode"} >= 1'))
    cluster.wait_until(lambda: "BatonNodeDown" not in prometheus.firing(), "end of BatonNodeDown", 40.0)
