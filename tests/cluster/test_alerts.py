"""Two routers over one registry, watched by a real Prometheus: who dies for good is missed, who is drained is not."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.prometheus_files import IS_INSTALLED, filled_in, panel_queries
from tests.support.prometheus_server import Prometheus, numbers, running_prometheus
from tests.support.redis_server import RedisServer

pytestmark = [pytest.mark.skipif(not IS_INSTALLED, reason="prometheus is not installed"), pytest.mark.timeout(300)]
START_TIMEOUT_S = 90.0
# Scrapes and evaluations are every second, and no alert waits longer than 2 s here.
ALERT_TIMEOUT_S = 60.0


class Processes:
    """Processes of a cluster that are not restarted."""

    def __init__(self, folder: Path, model: Path, registry: str) -> None:
        self._folder = folder
        self._common = ("--model", str(model), "--model-name", "m", "--registry", registry, "--cluster", "west")
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "cli", *arguments, *self._common, "--grace", "1"]
        with (self._folder / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start_worker(self, name: str) -> None:
        self.start(name, "worker", "--role", "mixed", "--node-id", name, "--kv-mib", "32", "--listen", "127.0.0.1:0")

    def start_router(self, name: str) -> None:
        self.start(name, "router", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")

    def url_of(self, name: str) -> str:
        """Of a router, once it serves."""
        found = re.compile(r"serves http (http://\S+)")
        until(lambda: found.search(self.log(name)) is not None, f"address of {name}", START_TIMEOUT_S)
        match = found.search(self.log(name))
        assert match is not None
        return match[1]

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def end(self, name: str, number: signal.Signals) -> None:
        process = self._running.pop(name)
        process.send_signal(number)
        code = process.wait(30)
        assert code == (0 if number is signal.SIGTERM else -number), self.log(name)

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()


@pytest.fixture
def processes(tmp_path: Path, demo_model: Path, redis_server: RedisServer) -> Iterator[Processes]:
    found = Processes(tmp_path, demo_model, redis_server.url)
    try:
        yield found
    finally:
        found.close()


def until(condition: Callable[[], bool], what: str, timeout_s: float = ALERT_TIMEOUT_S) -> None:
    gives_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < gives_up_at, f"no {what} within {timeout_s} s"
        time.sleep(0.1)


def test_a_node_that_dies_for_good_is_missed_and_a_drained_one_is_not(processes: Processes, tmp_path: Path) -> None:
    for name in ("m0", "m1", "m2"):
        processes.start_worker(name)
    for name in ("r0", "r1"):
        processes.start_router(name)
    routers = [processes.url_of(name) for name in ("r0", "r1")]
    with running_prometheus(tmp_path / "prometheus", *routers) as prometheus:
        _wait_for_three_nodes_once(prometheus)
        processes.end("m2", signal.SIGTERM)
        until(lambda: numbers(prometheus.query("baton:nodes_missing:count == 1")) == [1], "drained node")
        _wait_for_evaluations(prometheus, "baton:nodes_missing:count == 1")
        assert prometheus.query("max(baton_node_drains_total) == 1")
        assert not prometheus.query('ALERTS{alertname="BatonNodeMissing"}')
        assert not [a for a in prometheus.alerts() if a["labels"]["severity"] == "page"]

        processes.end("m1", signal.SIGKILL)
        until(lambda: "BatonNodeMissing" in prometheus.firing(), "BatonNodeMissing")
        (alert,) = [a for a in prometheus.alerts() if a["labels"]["alertname"] == "BatonNodeMissing"]
        assert alert["annotations"]["summary"] == "nodes missing from the pool mixed of west: 1"
        assert alert["labels"].items() >= {"cluster": "west", "model_name": "m", "pool": "mixed"}.items()
        assert alert["annotations"]["runbook_url"].endswith("://baton.example/docs/runbook.md#batonnodemissing")
        # One loss, seen twice; and one node is left.
        assert not prometheus.firing() & {"BatonNodesLost", "BatonPoolStarved", "BatonNotReady", "BatonNoRouter"}

        _lose_the_routers(processes, prometheus)


def _wait_for_three_nodes_once(prometheus: Prometheus) -> None:
    """Three nodes are three, however many routers see them: in the rules, in the panel, and as targets."""
    seen = 'sum(baton_nodes{cluster="west", model_name="m", pool="mixed", state="ready"})'
    until(lambda: numbers(prometheus.query(seen)) == [6], "three nodes at two routers")
    ready = 'baton:nodes:count{cluster="west", pool="mixed", state="ready"}'
    until(lambda: numbers(prometheus.query(ready)) == [3], "three nodes in the rules")
    (panel,) = [q for q in panel_queries() if q.where == "baton-overview: Nodes by pool and state"]
    shown = {s["metric"].get("pool"): float(s["value"][1]) for s in prometheus.query(filled_in(panel))}
    assert shown["mixed"] == 3
    until(lambda: numbers(prometheus.query('count(up{job="baton-worker"} == 1)')) == [3], "three targets")
    until(lambda: numbers(prometheus.query("baton:routers:count")) == [2], "two routers")
    for job in ("router", "worker"):
        own = f'{{__name__=~"(baton_|process_|vllm:).+", job="baton-{job}"'
        assert prometheus.query(f"count({own}}})")
        assert not prometheus.query(f'{own}, cluster!="west"}} or {own}, model_name!="m"}}')


def _wait_for_evaluations(prometheus: Prometheus, condition: str) -> None:
    """Until it has been so for longer than any alert waits, with what a scrape and an evaluation take."""
    count = f"count_over_time(({condition})[1m:1s])"
    until(lambda: bool(numbers(prometheus.query(f"{count} >= 6"))), f"6 s of {condition}")


def _lose_the_routers(processes: Processes, prometheus: Prometheus) -> None:
    processes.end("r1", signal.SIGKILL)
    until(lambda: "BatonRouterDown" in prometheus.firing(), "BatonRouterDown")
    _wait_for_evaluations(prometheus, "baton:routers:count == 1")
    assert not [a for a in prometheus.alerts() if a["labels"]["severity"] == "page"], "one router is left"
    processes.end("r0", signal.SIGKILL)
    until(lambda: "BatonNoRouter" in prometheus.firing(), "BatonNoRouter")
    (alert,) = [a for a in prometheus.alerts() if a["labels"]["alertname"] == "BatonNoRouter"]
    assert alert["labels"].items() >= {"cluster": "west", "severity": "page"}.items()
